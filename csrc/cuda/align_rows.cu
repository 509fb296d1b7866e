// align_rows: c unit(unit(s u + b) + h) with one read and one write of each row. The reference is
// realign_fast/ops/reference.py.
//
// A team of threads (row_team.cuh) holds a row in registers, reduces three dot products, computes
// three coefficients from them (common/row_map_math.h), and writes alpha x + beta b + gamma h. A
// team takes two rows at a time, which share the loads of b and h, unless the rows are float64; a
// last row without a partner is taken twice. bfloat16 results have the dot products of float64.
// Teams walk over the rows in a persistent grid. A row is computed from itself alone, so its bytes
// depend neither on its neighbours nor on the size of the device.
#include "cuda/row_map.cuh"

namespace realign_fast {
namespace {

template <class T, class M>
struct AlignTask {
  DeviceMap map;
  const M* shift;  // b and h in team order
  const M* recentre;
  const float* narrow_shift;  // the same in float32, for bfloat16 results of float64; or null
  const float* narrow_recentre;
  const T* rows;  // [N, D]
  int64_t count, columns, row_stride;
  bool aligned;
  RowOutput out;
};

// The rows that a team takes at a time.
template <class T>
constexpr int kTeamRows = std::is_same_v<T, double> ? 1 : 2;

template <class T, class M, int SIZE>
__device__ void align_exactly(Team<SIZE>& team, int64_t i, const AlignTask<T, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const ExactRow exact = exact_row(team, row, task.columns, task.map);
  const double s = task.map.numbers->scale;
#pragma unroll 1
  for (int64_t j = team.thread; j < task.columns; j += SIZE)
    store_entry(
        task.out, i, j,
        exact.finite ? exact_value(exact, task.map, s, static_cast<double>(row[j]), j) : nan(""));
}

// The coefficients of a row for float32 arithmetic whose results become bfloat16, and a bound of
// its error. Let u = 2^-24 and y = alpha x + beta b + gamma h in float32. The roundings of alpha,
// of the sum, and of the float64 value to float32 move y by at most 3 u |y| + u (|beta b| + |gamma
// h|), the others by 3 u |beta b| + 4 u |gamma h|, so the error is below 4 u |y| + 6 u (|beta b| +
// |gamma h|). Coefficients for which a product or an entry of the map could underflow or overflow
// do not fit.
struct NarrowCoefficients {
  float alpha, beta, gamma, map_error;
  bool fit;

  __device__ NarrowCoefficients(double alpha, double beta, double gamma)
      : alpha(static_cast<float>(alpha)),
        beta(static_cast<float>(beta)),
        gamma(static_cast<float>(gamma)) {
    map_error = 6.5f / (1 << 24) * fmaxf(fabsf(this->beta), fabsf(this->gamma));
    fit = fabs(alpha) > 1e-30 && fabs(alpha) < 1e30 && fabs(beta) < 1e3 && fabs(gamma) < 1e3;
  }
};

// Writes a pack of bfloat16 results, each the float64 value rounded to float32 and then to
// bfloat16. Where the least and the largest value that float32 leaves open round to the same
// number, that is the result; other entries, one in some thousands, are computed in float64.
template <class T, class M>
__device__ __forceinline__ void store_narrow(const AlignTask<T, M>& task, int64_t i, int64_t column,
                                             const NarrowCoefficients& c, double alpha, double beta,
                                             double gamma, const Pack<T>& pack,
                                             const float (&b)[kEntries<T>],
                                             const float (&h)[kEntries<T>]) {
  constexpr int E = kEntries<T>;
  float y[E], margin[E];
#pragma unroll
  for (int e = 0; e < E; ++e) {
    y[e] = c.alpha * static_cast<float>(pack.values[e]) + (c.beta * b[e] + c.gamma * h[e]);
    margin[e] =
        c.map_error * (fabsf(b[e]) + fabsf(h[e])) + (4.5f / (1 << 24) * fabsf(y[e]) + 1e-33f);
  }
#pragma unroll
  for (int e = 0; e < E; e += 2) {
    const unsigned least = round_pair<BFloat16>(y[e] - margin[e], y[e + 1] - margin[e + 1]);
    const unsigned most = round_pair<BFloat16>(y[e] + margin[e], y[e + 1] + margin[e + 1]);
    if (least == most) continue;
#pragma unroll
    for (int k = e; k < e + 2; ++k) {
      const int64_t j = column + k;
      if (j >= task.columns) continue;
      const double wide_h = task.map.recentre ? task.map.recentre[j] : 0;
      y[k] = static_cast<float>(alpha * static_cast<double>(pack.values[k]) +
                                (beta * task.map.shift[j] + gamma * wide_h));
    }
  }
  store_as<BFloat16>(task.out.data, i * task.out.row_stride, column, task.columns, task.out.aligned,
                     y);
}

// The coefficients of a team's rows. Threads with even numbers compute those of the first row, the
// others those of the second, and neighbours exchange them.
template <class M, int ROWS>
struct TeamCoefficients {
  M alpha[ROWS], beta[ROWS], gamma[ROWS];
  unsigned regular;  // bit r of row r; other rows are computed step by step

  __device__ TeamCoefficients(const MapNumbers& numbers, const double (&dots)[3 * ROWS]) {
    const int own = ROWS == 1 ? 0 : static_cast<int>(threadIdx.x) % 2;
    double xx = dots[0], xb = dots[1], xh = dots[2];
    if (own) xx = dots[3 * ROWS - 3], xb = dots[3 * ROWS - 2], xh = dots[3 * ROWS - 1];
    const RowCoefficients c = row_coefficients(numbers, xx, xb, xh);
    spread(own, static_cast<M>(c.alpha), alpha);
    spread(own, static_cast<M>(c.beta), beta);
    spread(own, static_cast<M>(c.gamma), gamma);
    unsigned fits[ROWS];
    spread(own, !c.cancelled && in_range<M>(xx) ? 1u : 0u, fits);
    regular = fits[0] | fits[ROWS - 1] << (ROWS - 1);
  }

 private:
  template <class V>
  __device__ static void spread(int own, V value, V (&values)[ROWS]) {
    values[0] = value;
    if constexpr (ROWS == 2) {
      const V other = __shfl_xor_sync(0xffffffffu, value, 1);
      values[0] = own ? other : value;
      values[1] = own ? value : other;
    }
  }
};

// Writes those of a team's rows whose bfloat16 results float32 arithmetic can find, and returns
// their bits.
template <class T, class M, int SIZE, int PACKS, int ROWS>
__device__ __forceinline__ unsigned align_narrowly(const Team<SIZE>& team, int64_t i,
                                                   const AlignTask<T, M>& task,
                                                   const TeamRow<T, SIZE, PACKS> (&rows)[ROWS],
                                                   const TeamCoefficients<M, ROWS>& c) {
  constexpr int E = kEntries<T>;
  unsigned written = 0;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    written |= NarrowCoefficients(c.alpha[r], c.beta[r], c.gamma[r]).fit ? 1u << r : 0;
  written &= c.regular;
  if (!written) return 0;
  rows[0].for_each_place([&](int p, int64_t column) {
    float b[E], h[E];
    load_vector(task.narrow_shift, p, team.thread, SIZE, b);
    load_vector(task.narrow_recentre, p, team.thread, SIZE, h);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (written >> r & 1)
        store_narrow(task, i + r < task.count ? i + r : i, column,
                     NarrowCoefficients(c.alpha[r], c.beta[r], c.gamma[r]), c.alpha[r], c.beta[r],
                     c.gamma[r], rows[r].pack(p), b, h);
  });
  return written;
}

template <class T, class M, int SIZE, int PACKS>
__global__ void __launch_bounds__(128, sizeof(M) == 8 ? 3 : 4) align_kernel(AlignTask<T, M> task) {
  constexpr int E = kEntries<T>, kRows = kTeamRows<T>;
  Team<SIZE> team(shared_memory());
  const int64_t step = int64_t(gridDim.x) * Team<SIZE>::kTeams * kRows;
  for (int64_t i = (int64_t(blockIdx.x) * Team<SIZE>::kTeams + team.team) * kRows; i < task.count;
       i += step) {
    const auto index = [&](int r) { return i + r < task.count ? i + r : i; };
    TeamRow<T, SIZE, PACKS> rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      rows[r] = {task.rows + index(r) * task.row_stride, task.columns, team.thread, task.aligned};
    double dots[3 * kRows];
    dot_products(team, rows, task.shift, task.recentre, true, dots);
    MapNumbers numbers = *task.map.numbers;  // (registers are scarce, and a cache holds them)
    numbers.length = task.map.length;
    const TeamCoefficients<M, kRows> c(numbers, dots);
    unsigned left = c.regular;
    if constexpr (std::is_same_v<M, double> && !std::is_same_v<T, double>) {
      if (task.narrow_shift) left &= ~align_narrowly(team, i, task, rows, c);
    }
    if (left)
      rows[0].for_each_place([&](int p, int64_t column) {
        M b[E], h[E], y[E];
        load_vector(task.shift, p, team.thread, SIZE, b);
        load_vector(task.recentre, p, team.thread, SIZE, h);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Pack<T> pack = rows[r].pack(p);
#pragma unroll
          for (int e = 0; e < E; ++e)
            y[e] = c.alpha[r] * static_cast<M>(pack.values[e]) +
                   (c.beta[r] * b[e] + c.gamma[r] * h[e]);
          if (left >> r & 1) store_pack(task.out, index(r), column, task.columns, y);
        }
      });
#pragma unroll 1
    for (int r = 0; r < kRows; ++r)
      if (!(c.regular >> r & 1)) align_exactly(team, index(r), task);
  }
}

template <class T, class M>
void align_typed(const Tensor& out, const Tensor& rows, const double* scale, const DeviceMap& map) {
  CallResources resources(rows);
  const int64_t count = rows.size(0), columns = rows.size(1);
  const auto* first_row = static_cast<const T*>(rows.const_data_ptr());
  dispatch_team<T>(columns, [&](auto size, auto packs) {
    using Members = Team<size()>;
    const auto vectors =
        prepare<M, kEntries<T>>(resources, map.shift, map.recentre, scale, columns, size());
    OrderedVectors<float> narrow{};
    if constexpr (std::is_same_v<M, double> && !std::is_same_v<T, double>)
      if (out.scalar_type() == ScalarType::BFloat16)
        narrow = prepare<float, kEntries<T>>(resources, map.shift, map.recentre, nullptr, columns,
                                             size());
    const AlignTask<T, M> task{{vectors.numbers, map.shift, map.recentre, true, map.length},
                               vectors.first,
                               vectors.second,
                               narrow.first,
                               narrow.second,
                               first_row,
                               count,
                               columns,
                               rows.stride(0),
                               is_aligned(first_row, rows.stride(0)),
                               row_output(out)};
    const int64_t blocks = divide_up(count, Members::kTeams * kTeamRows<T>);
    launch(align_kernel<T, M, size(), packs()>, persistent_blocks(blocks, 16), Members::kThreads,
           Members::kSharedBytes, resources.stream(), task);
  });
}

void align_rows_(Tensor out, Tensor rows, Tensor scale, Tensor shift,
                 std::optional<Tensor> recentre, std::optional<double> length, int64_t) {
  constexpr const char* op = "align_rows";
  check_out(op, out, rows, scale, shift, recentre);
  check_map(op, scale, shift, recentre, rows);
  if (rows.size(0) == 0) return;
  check_dtype(op, out);
  const bool needs_double = align_needs_double(rows.scalar_type(), out.scalar_type());
  const DeviceMap map{nullptr, doubles(shift), doubles(recentre), true, result_length(length)};
  dispatch_arithmetic(op, rows, needs_double, [&](auto row_value, auto arithmetic) {
    align_typed<decltype(row_value), decltype(arithmetic)>(out, rows, doubles(scale), map);
  });
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) {
  using namespace realign_fast;
  library.impl("align_rows", TORCH_BOX(&map_to_new_tensor<align_rows_>));
  library.impl("align_rows_", TORCH_BOX(&align_rows_));
}
