// sum_rows: sum, energy and counts of rows, of their directions, or of their images under a row
// map, in one read each. Reference: ops/reference.py.
//
// A row's image is alpha x + beta b + gamma h (row_map.cuh), so the sum over rows is
// sum(alpha x) + b sum(beta) + h sum(gamma): only the first is of row length. The rows are cut into
// chunks whose borders depend on N alone; a chunk is one block's work. Its teams take its rows in
// turn and add up to kGroupRows of them in registers, then one team after the other adds to the
// chunk's float64 sums. Chunks are added in a tree of fixed shape. So the bytes depend neither on
// the number of multiprocessors nor on the order in which blocks run.
#include "row_map.cuh"

namespace realign_fast {
namespace {

constexpr int kGroupRows = 64;         // rows that one team adds up in the arithmetic type
constexpr int64_t kMostChunks = 2048;  // partial sums [D] in memory
constexpr int64_t kLeastChunkRows = 128;
constexpr int kFan = 64;     // chunks that one thread adds up
constexpr int kScalars = 6;  // beyond the sum: energy, beta, gamma and three counts

template <class T, class M>
struct SumTask {
  DeviceMap map;
  const M* shift;  // b and h in team order
  const M* recentre;
  const T* rows;  // [N, D]
  int64_t count, columns, row_stride, chunk_rows, chunks;
  int64_t padded;  // D up to whole packs of the team
  bool aligned, normalize;
  double* partial;  // [chunks, padded + kScalars], columns in the order of `place`
};

// What a team counts, in shared memory; its first thread writes.
struct RowScalars {
  double energy = 0, beta = 0, gamma = 0;
  double rows = 0, zero = 0, nonfinite = 0;  // (whole numbers below 2^53 are exact)
};
static_assert(sizeof(RowScalars) == kScalars * sizeof(double));

// A row that is not plain sailing, term by term into the chunk's float64 sums.
template <class T, class M, int SIZE>
__device__ void sum_directly(Team<SIZE>& team, int64_t i, const SumTask<T, M>& task, double* sums,
                             RowScalars& scalars) {
  const T* row = task.rows + i * task.row_stride;
  const DirectRow direct = direct_row(team, row, task.columns, task.map);
  if (!direct.finite) {
    if (team.thread == 0) scalars.nonfinite += 1;
    return;
  }
  const double s = task.map.given ? task.map.numbers->scale : 0;
  double squares[1] = {0}, energy[1];
#pragma unroll 1
  for (int64_t j = team.thread; j < task.columns; j += SIZE) {
    const double x = static_cast<double>(row[j]);
    const double v = task.normalize ? direct_value(direct, task.map, s, x, j) : x;
    sums[place<kEntries<T>>(j, SIZE)] += v;
    squares[0] += v * v;
  }
  team.sum(squares, energy);
  if (team.thread != 0) return;
  scalars.energy += energy[0];
  scalars.rows += 1;
  scalars.zero += direct.zero ? 1 : 0;
}

// The row's weight in the sum into `weight`; false if it has to be done term by term.
template <class T, class M, int SIZE, int PACKS>
__device__ bool row_weight(Team<SIZE>& team, const TeamRow<T, SIZE, PACKS>& row,
                           const SumTask<T, M>& task, const MapNumbers& numbers, M& weight,
                           RowScalars& scalars) {
  constexpr int E = kEntries<T>;
  // (Narrow rows are done in float64 only as they are, without a map.)
  constexpr bool kMayMap = std::is_same_v<M, float> || std::is_same_v<T, double>;
  M parts[3] = {0, 0, 0};
  double dots[3];
  row.for_each_pack([&](int p, int64_t, const Pack<T>& pack) {
    M b[E] = {}, h[E] = {};
    if (kMayMap && task.map.given) {
      load_vector(task.shift, p, team.thread, SIZE, b);
      load_vector(task.recentre, p, team.thread, SIZE, h);
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const M x = static_cast<M>(pack.values[e]);
      parts[0] += x * x;
      parts[1] += x * b[e];
      parts[2] += x * h[e];
    }
  });
  team.sum(parts, dots);
  if (!in_range<M>(dots[0])) return false;
  const bool counts = team.thread == 0;
  if (kMayMap && task.map.given) {
    const Coefficients c = row_coefficients(numbers, dots[0], dots[1], dots[2]);
    if (c.cancelled) return false;
    weight = static_cast<M>(c.alpha);
    if (counts) scalars.energy += 1, scalars.beta += c.beta, scalars.gamma += c.gamma;
  } else {
    weight = task.normalize ? static_cast<M>(rsqrt(dots[0])) : static_cast<M>(1);
    if (counts) scalars.energy += task.normalize ? 1 : dots[0];
  }
  if (counts) scalars.rows += 1;
  return true;
}

// Up to kGroupRows rows [first, last) of one team. What it adds up is in `held` (or, where PACKS is
// 0, in `sums` at once); the bits of the result are the rows that it left for sum_directly.
template <class T, class M, int SIZE, int PACKS>
__device__ unsigned long long sum_group(Team<SIZE>& team, int64_t first, int64_t last,
                                        const SumTask<T, M>& task, const MapNumbers& numbers,
                                        M (&held)[PACKS ? PACKS : 1][kEntries<T>], double* sums,
                                        RowScalars& scalars) {
  unsigned long long left = 0;
#pragma unroll 1
  for (int64_t i = first; i < last; ++i) {
    TeamRow<T, SIZE, PACKS> row(task.rows + i * task.row_stride, task.columns, team.thread,
                                task.aligned);
    M weight;
    if (!row_weight(team, row, task, numbers, weight, scalars)) {
      left |= 1ull << (i - first);
      continue;
    }
    row.forget_widened();
    row.for_each_pack([&](int p, int64_t column, const Pack<T>& pack) {
#pragma unroll
      for (int e = 0; e < kEntries<T>; ++e) {
        const M v = weight * static_cast<M>(pack.values[e]);
        if constexpr (PACKS > 0) {
          held[p][e] += v;
        } else if (column + e < task.columns) {
          sums[(int64_t(p) * kEntries<T> + e) * SIZE + team.thread] += static_cast<double>(v);
        }
      }
    });
  }
  return left;
}

template <class T, class M, int SIZE, int PACKS>
__device__ void sum_chunk(Team<SIZE>& team, int64_t begin, int64_t end, const SumTask<T, M>& task,
                          double* sums, RowScalars& scalars) {
  constexpr int kTeams = Team<SIZE>::kTeams;
  const MapNumbers numbers = task.map.given ? *task.map.numbers : MapNumbers{};
  const int64_t share = (task.chunk_rows + kTeams - 1) / kTeams;
  const int64_t group = share < kGroupRows ? share : kGroupRows;
  for (int64_t base = begin; base < end; base += group * kTeams) {
    M held[PACKS ? PACKS : 1][kEntries<T>] = {};
    const int64_t first = base + team.team * group;
    const int64_t last = first + group < end ? first + group : end;
    unsigned long long left =
        sum_group<T, M, SIZE, PACKS>(team, first, last, task, numbers, held, sums, scalars);
#pragma unroll 1
    for (int turn = 0; turn < kTeams; ++turn) {  // one team after the other, always in this order
      if (turn == team.team) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
#pragma unroll
          for (int e = 0; e < kEntries<T>; ++e)
            if (int64_t(p) * SIZE * kEntries<T> < task.columns)
              sums[(p * kEntries<T> + e) * SIZE + team.thread] += static_cast<double>(held[p][e]);
        team.wait();
#pragma unroll 1
        for (int64_t i = first; left; ++i, left >>= 1)
          if (left & 1) sum_directly(team, i, task, sums, scalars);
      }
      __syncthreads();
    }
  }
}

template <class T, class M, int SIZE, int PACKS>
__global__ void __launch_bounds__(128, 3) sum_kernel(SumTask<T, M> task) {
  using Members = Team<SIZE>;
  unsigned char* shared = shared_memory();
  Members team(shared);
  auto* scalars = reinterpret_cast<double*>(shared + Members::kSharedBytes);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t chunk = blockIdx.x; chunk < task.chunks; chunk += gridDim.x) {
    double* out = task.partial + chunk * (task.padded + kScalars);
    double* sums = SIZE == 32 ? scalars + kScalars * Members::kTeams : out;
    for (int64_t j = thread; j < task.padded; j += Members::kThreads) sums[j] = 0;
    RowScalars& own = reinterpret_cast<RowScalars*>(scalars)[team.team];
    if (team.thread == 0) own = RowScalars();
    __syncthreads();
    const int64_t begin = chunk * task.chunk_rows;
    const int64_t end = begin + task.chunk_rows < task.count ? begin + task.chunk_rows : task.count;
    sum_chunk<T, M, SIZE, PACKS>(team, begin, end, task, sums, own);
    __syncthreads();
    if (SIZE == 32)
      for (int64_t j = thread; j < task.padded; j += Members::kThreads) out[j] = sums[j];
    if (thread < kScalars) {
      double sum = 0;
      for (int t = 0; t < Members::kTeams; ++t) sum += scalars[t * kScalars + thread];
      out[task.padded + thread] = sum;
    }
    __syncthreads();  // before the next chunk clears the sums
  }
}

// to [ceil(count / kFan), width] = sums of kFan neighbours of from [count, width].
__global__ void __launch_bounds__(128)
    add_chunks(const double* from, double* to, int64_t count, int64_t width) {
  const int64_t j = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (j >= width) return;
  const int64_t first = int64_t(blockIdx.y) * kFan;
  const int64_t last = first + kFan < count ? first + kFan : count;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = first; i < last; ++i) sum += from[i * width + j];
  to[blockIdx.y * width + j] = sum;
}

// total = sums + beta b + gamma h, in the order of columns.
template <int E>
__global__ void __launch_bounds__(256)
    finish_sums(const double* sums, int64_t columns, int64_t padded, int size, const double* shift,
                const double* recentre, double* total, double* energy, int64_t* counts) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const double* scalars = sums + padded;
  if (j < columns) {
    double sum = sums[place<E>(j, size)];
    if (shift) sum += scalars[1] * shift[j];
    if (recentre) sum += scalars[2] * recentre[j];
    total[j] = sum;
  }
  if (j == 0) *energy = scalars[0];
  if (j < 3) counts[j] = static_cast<int64_t>(scalars[3 + j]);
}

struct SumOutput {
  double *total, *energy;
  int64_t* counts;
};

int64_t chunk_rows_of(int64_t rows) {
  const int64_t share = (rows + kMostChunks - 1) / kMostChunks;
  return (std::max(share, kLeastChunkRows) + kLeastChunkRows - 1) / kLeastChunkRows *
         kLeastChunkRows;
}

template <class T, class M>
void sum_typed(const Tensor& rows, const double* scale, const double* b, const double* h,
               bool normalize, const SumOutput& result) {
  Work work(rows);
  const int64_t n = rows.size(0), columns = rows.size(1);
  const auto* x = static_cast<const T*>(rows.const_data_ptr());
  dispatch_team<T>(columns, [&](auto size, auto packs) {
    using Members = Team<size()>;
    constexpr int64_t tile = size() * kEntries<T>;
    const int64_t padded = (columns + tile - 1) / tile * tile, width = padded + kScalars;
    SumTask<T, M> task{};
    task.map = {nullptr, b, h, b != nullptr};
    if (b) {
      const auto vectors = prepare<M, kEntries<T>>(work, b, h, scale, columns, size());
      task.map.numbers = vectors.numbers;
      task.shift = vectors.first;
      task.recentre = vectors.second;
    }
    task.rows = x, task.count = n, task.columns = columns, task.row_stride = rows.stride(0);
    task.chunk_rows = chunk_rows_of(n), task.padded = padded;
    task.chunks = (n + task.chunk_rows - 1) / task.chunk_rows;
    task.aligned = on_16_bytes(x, rows.stride(0)), task.normalize = normalize;
    task.partial = work.take<double>(task.chunks * width);
    size_t shared = Members::kSharedBytes + sizeof(RowScalars) * Members::kTeams;
    if (size() == 32) shared += sizeof(double) * static_cast<size_t>(padded);
    launch(sum_kernel<T, M, size(), packs()>, persistent_blocks(task.chunks, 16), Members::kThreads,
           shared, work.stream(), task);
    const double* sums = task.partial;
    const unsigned across = static_cast<unsigned>((width + 127) / 128);
    for (int64_t count = task.chunks; count > 1; count = (count + kFan - 1) / kFan) {
      const int64_t fewer = (count + kFan - 1) / kFan;
      double* to = work.take<double>(fewer * width);
      launch(add_chunks, dim3(across, static_cast<unsigned>(fewer)), 128, 0, work.stream(), sums,
             to, count, width);
      sums = to;
    }
    launch(finish_sums<kEntries<T>>,
           static_cast<unsigned>((std::max<int64_t>(columns, 3) + 255) / 256), 256, 0,
           work.stream(), sums, columns, padded, size(), b, h, result.total, result.energy,
           result.counts);
  });
}

const double* values_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const double*>(tensor->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> sum_rows(Tensor rows, std::optional<Tensor> scale,
                                            std::optional<Tensor> shift,
                                            std::optional<Tensor> recentre, bool normalize,
                                            int64_t) {
  constexpr const char* op = "sum_rows";
  check_rows(op, rows);
  STD_TORCH_CHECK(
      scale.has_value() == shift.has_value() && (shift || !recentre) && (normalize || !shift), op,
      ": a map needs scale, shift and normalize=True");
  if (shift) check_map(op, *scale, *shift, recentre, rows);
  Tensor total = torch::stable::new_zeros(rows, {rows.size(1)}, ScalarType::Double);
  Tensor energy = torch::stable::new_zeros(rows, {}, ScalarType::Double);
  Tensor counts = torch::stable::new_zeros(rows, {3}, ScalarType::Long);
  const SumOutput result{static_cast<double*>(total.mutable_data_ptr()),
                         static_cast<double*>(energy.mutable_data_ptr()),
                         static_cast<int64_t*>(counts.mutable_data_ptr())};
  const double *s = values_of(scale), *b = values_of(shift), *h = values_of(recentre);
  dispatch_rows(op, rows, [&](auto t) {
    using T = decltype(t);
    if (rows.size(0) == 0) return;
    // Rows summed as they are have no common length, so their energy needs float64 throughout.
    if constexpr (!std::is_same_v<T, double>) {
      if (normalize) return sum_typed<T, float>(rows, s, b, h, normalize, result);
    }
    sum_typed<T, double>(rows, s, b, h, normalize, result);
  });
  return {total, energy, counts};
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(m) { m.impl("sum_rows", TORCH_BOX(&realign_fast::sum_rows)); }
