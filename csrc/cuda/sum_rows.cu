// sum_rows: the sum, the energy and the counts of rows, of their directions, or of their images
// under a row map, with one read of each row. The reference is realign_fast/ops/reference.py.
//
// A row's image is alpha x + beta b + gamma h (common/row_map_math.h), so the sum over rows is
// sum(alpha x) + b sum(beta) + h sum(gamma): only the first of the three sums has the length of a
// row. The rows are cut into chunks whose borders depend on N alone, and one block sums one chunk.
// Its teams take turns at its rows and sum up to kGroupRows of them in registers; then one team
// after the other adds to the chunk's float64 sums. Chunks are added in a tree of fixed shape. The
// bytes therefore depend neither on the number of multiprocessors nor on the order in which blocks
// run.
#include "cuda/row_map.cuh"
#include "cuda/tree_sum.cuh"

namespace realign_fast {
namespace {

constexpr int kGroupRows = 64;        // rows that one team sums in the arithmetic type
constexpr int64_t kMaxChunks = 2048;  // partial sums [D] in memory
constexpr int64_t kMinChunkRows = 128;
constexpr int kScalars = 6;  // beside the sum: energy, beta, gamma and three counts

template <class T, class M>
struct SumTask {
  DeviceMap map;
  const M* shift;  // b and h in team order
  const M* recentre;
  const T* rows;  // [N, D]
  int64_t count, columns, row_stride, chunk_rows, chunks;
  int64_t padded;  // D, rounded up to whole packs of the team
  bool aligned, normalize;
  double* partial;  // [chunks, padded + kScalars], columns in the order of `sum_place`
};

// The scalars that a team sums in shared memory; only its first thread writes them.
struct RowScalars {
  double energy = 0, beta = 0, gamma = 0;
  double rows = 0, zero = 0, nonfinite = 0;  // exact, because they are integers below 2^53
};
static_assert(sizeof(RowScalars) == kScalars * sizeof(double));

// Adds a row to the chunk's float64 sums, step by step in float64.
template <class T, class M, int SIZE>
__device__ void sum_exactly(Team<SIZE>& team, int64_t i, const SumTask<T, M>& task, double* sums,
                            RowScalars& scalars) {
  const T* row = task.rows + i * task.row_stride;
  const ExactRow exact = exact_row(team, row, task.columns, task.map);
  if (!exact.finite) {
    if (team.thread == 0) scalars.nonfinite += 1;
    return;
  }
  const double s = task.map.given ? task.map.numbers->scale : 0;
  double squares[1] = {0}, energy[1];
#pragma unroll 1
  for (int64_t j = team.thread; j < task.columns; j += SIZE) {
    const double x = static_cast<double>(row[j]);
    const double v = task.normalize ? exact_value(exact, task.map, s, x, j) : x;
    sums[sum_place<kEntries<T>>(j, SIZE)] += v;
    squares[0] += v * v;
  }
  team.sum(squares, energy);
  if (team.thread != 0) return;
  scalars.energy += energy[0];
  scalars.rows += 1;
  scalars.zero += exact.zero ? 1 : 0;
}

// Writes the row's weight in the sum to `weight`. Returns false if the row must be added step by
// step.
template <class T, class M, int SIZE, int PACKS>
__device__ bool row_weight(Team<SIZE>& team, const TeamRow<T, SIZE, PACKS> (&row)[1],
                           const SumTask<T, M>& task, const MapNumbers& numbers, M& weight,
                           RowScalars& scalars) {
  // Rows of fewer than 64 bits are summed in float64 only if there is no map.
  constexpr bool kMayMap = std::is_same_v<M, float> || std::is_same_v<T, double>;
  double dots[3];
  dot_products(team, row, task.shift, task.recentre, kMayMap && task.map.given, dots);
  if (!in_range<M>(dots[0])) return false;
  const bool writes = team.thread == 0;
  if (kMayMap && task.map.given) {
    const RowCoefficients c = row_coefficients(numbers, dots[0], dots[1], dots[2]);
    if (c.cancelled) return false;
    weight = static_cast<M>(c.alpha);
    if (writes) scalars.energy += 1, scalars.beta += c.beta, scalars.gamma += c.gamma;
  } else {
    weight = task.normalize ? static_cast<M>(rsqrt(dots[0])) : static_cast<M>(1);
    if (writes) scalars.energy += task.normalize ? 1 : dots[0];
  }
  if (writes) scalars.rows += 1;
  return true;
}

// Sums rows [first, end), at most kGroupRows, of one team into `held` or, if PACKS is 0, into
// `sums`. The bits of the result name the rows that remain for sum_exactly.
template <class T, class M, int SIZE, int PACKS>
__device__ unsigned long long sum_group(Team<SIZE>& team, int64_t first, int64_t end,
                                        const SumTask<T, M>& task, const MapNumbers& numbers,
                                        M (&held)[PACKS ? PACKS : 1][kEntries<T>], double* sums,
                                        RowScalars& scalars) {
  unsigned long long remaining = 0;
#pragma unroll 1
  for (int64_t i = first; i < end; ++i) {
    TeamRow<T, SIZE, PACKS> row[1] = {
        {task.rows + i * task.row_stride, task.columns, team.thread, task.aligned}};
    M weight;
    if (!row_weight(team, row, task, numbers, weight, scalars)) {
      remaining |= 1ull << (i - first);
      continue;
    }
    row[0].forget_widened();
    row[0].for_each_pack([&](int p, int64_t column, const Pack<T>& pack) {
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
  return remaining;
}

template <class T, class M, int SIZE, int PACKS>
__device__ void sum_chunk(Team<SIZE>& team, int64_t chunk_first, int64_t chunk_end,
                          const SumTask<T, M>& task, double* sums, RowScalars& scalars) {
  constexpr int kTeams = Team<SIZE>::kTeams;
  const MapNumbers numbers = task.map.given ? *task.map.numbers : MapNumbers{};
  const int64_t share = (task.chunk_rows + kTeams - 1) / kTeams;
  const int64_t group = share < kGroupRows ? share : kGroupRows;
  for (int64_t base = chunk_first; base < chunk_end; base += group * kTeams) {
    M held[PACKS ? PACKS : 1][kEntries<T>] = {};
    const int64_t first = base + team.team * group;
    const int64_t end = first + group < chunk_end ? first + group : chunk_end;
    unsigned long long remaining =
        sum_group<T, M, SIZE, PACKS>(team, first, end, task, numbers, held, sums, scalars);
#pragma unroll 1
    for (int turn = 0; turn < kTeams; ++turn) {  // the teams, always in this order
      if (turn == team.team) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
#pragma unroll
          for (int e = 0; e < kEntries<T>; ++e)
            if (int64_t(p) * SIZE * kEntries<T> < task.columns)
              sums[(p * kEntries<T> + e) * SIZE + team.thread] += static_cast<double>(held[p][e]);
        team.wait();
#pragma unroll 1
        for (int64_t i = first; remaining; ++i, remaining >>= 1)
          if (remaining & 1) sum_exactly(team, i, task, sums, scalars);
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
    RowScalars& team_scalars = reinterpret_cast<RowScalars*>(scalars)[team.team];
    if (team.thread == 0) team_scalars = RowScalars();
    __syncthreads();
    const int64_t first = chunk * task.chunk_rows;
    const int64_t end = first + task.chunk_rows < task.count ? first + task.chunk_rows : task.count;
    sum_chunk<T, M, SIZE, PACKS>(team, first, end, task, sums,
                                 team_scalars);  // ends with a barrier
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

// total = sums + beta b + gamma h, with its entries in the order of the columns.
template <int E>
__global__ void __launch_bounds__(256)
    finish_sums(const double* sums, int64_t columns, int64_t padded, int size, const double* shift,
                const double* recentre, double* total, double* energy, int64_t* counts) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const double* scalars = sums + padded;
  if (j < columns) {
    double sum = sums[sum_place<E>(j, size)];
    if (shift) sum += scalars[1] * shift[j];
    if (recentre) sum += scalars[2] * recentre[j];
    total[j] = sum;
  }
  if (j == 0) *energy = scalars[0];
  if (j < 3) counts[j] = static_cast<int64_t>(scalars[3 + j]);
}

// The rows of a chunk of a sum; it depends on N alone.
int64_t rows_of_a_sum(int64_t rows) {
  return round_up(std::max(divide_up(rows, kMaxChunks), kMinChunkRows), kMinChunkRows);
}

template <class T, class M>
void sum_typed(const Tensor& rows, const double* scale, const double* shift, const double* recentre,
               bool normalize, const RowSums& result) {
  CallResources resources(rows);
  const int64_t count = rows.size(0), columns = rows.size(1);
  const auto* first_row = static_cast<const T*>(rows.const_data_ptr());
  dispatch_team<T>(columns, [&](auto size, auto packs) {
    using Members = Team<size()>;
    const int64_t padded = round_up(columns, size() * kEntries<T>), width = padded + kScalars;
    SumTask<T, M> task{};
    task.map = {nullptr, shift, recentre, shift != nullptr, {}};
    if (shift) {
      const auto vectors =
          prepare<M, kEntries<T>>(resources, shift, recentre, scale, columns, size());
      task.map.numbers = vectors.numbers;
      task.shift = vectors.first;
      task.recentre = vectors.second;
    }
    task.rows = first_row, task.count = count, task.columns = columns;
    task.row_stride = rows.stride(0), task.aligned = is_aligned(first_row, rows.stride(0));
    task.chunk_rows = rows_of_a_sum(count), task.chunks = divide_up(count, task.chunk_rows);
    task.padded = padded, task.normalize = normalize;
    task.partial = resources.allocate<double>(task.chunks * width);
    size_t shared = Members::kSharedBytes + sizeof(RowScalars) * Members::kTeams;
    if (size() == 32) shared += sizeof(double) * static_cast<size_t>(padded);
    launch(sum_kernel<T, M, size(), packs()>, persistent_blocks(task.chunks, 16), Members::kThreads,
           shared, resources.stream(), task);
    const double* sums = add_all(resources, task.partial, task.chunks, width);
    launch(finish_sums<kEntries<T>>,
           static_cast<unsigned>(divide_up(std::max<int64_t>(columns, 3), 256)), 256, 0,
           resources.stream(), sums, columns, padded, size(), shift, recentre, result.total,
           result.energy, result.counts);
  });
}

std::tuple<Tensor, Tensor, Tensor> sum_rows(Tensor rows, std::optional<Tensor> scale,
                                            std::optional<Tensor> shift,
                                            std::optional<Tensor> recentre, bool normalize,
                                            int64_t) {
  constexpr const char* op = "sum_rows";
  check_sum_arguments(op, rows, scale, shift, recentre, normalize);
  check_dtype(op, rows);
  const RowSums result(rows);
  if (rows.size(0) == 0) return result.tensors();
  // Rows that are summed as they are have no common length, so their energy needs float64.
  dispatch_arithmetic(op, rows, !normalize, [&](auto row_value, auto arithmetic) {
    sum_typed<decltype(row_value), decltype(arithmetic)>(rows, doubles(scale), doubles(shift),
                                                         doubles(recentre), normalize, result);
  });
  return result.tensors();
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) { library.impl("sum_rows", TORCH_BOX(&realign_fast::sum_rows)); }
