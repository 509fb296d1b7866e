// Packs rows into the operands of a matrix product: normalised, shifted, weighted, scaled and
// split, with one read of each row. Row i becomes
//
//   v = root_i (u_i - c) scale,   high = round(v),   low = round(v - high)
//
// as float16 (scale_j is a power of two that puts column j at the upper end of float16's range, see
// half_scale), or v itself as float32 or float64. root_i is sqrt(w_i) times the power of two that
// brings the largest root to [1, 2), because float32 holds the roots of few of the weights that
// float64 holds. Non-finite rows and rows beyond N become zeros. Packing also computes what a
// caller needs beside the product: the sums over rows of root (high + low) and of low^2, from the
// same numbers that are multiplied, and the counts of rows.
#pragma once

#include "cuda/row_map.cuh"

namespace realign_fast {

constexpr int kPackRows = 16;  // rows of a block

template <class T, class V>
struct PackTask {
  using M = std::conditional_t<std::is_same_v<V, double>, double, float>;
  const T* rows;             // [count, D]
  const double* weights;     // [count] or null
  const double* root_scale;  // []; read if there are weights
  const double* centre;      // c [D]
  const double* scale;       // [stride]
  const M* ordered_centre;
  const M* ordered_scale;
  int64_t count, padded_count, columns, row_stride;
  bool aligned, normalize;
  V *high, *low;               // [padded_count, stride]; low may be null
  int64_t stride;              // D, rounded up to whole tiles
  int64_t padded;              // D, rounded up to whole packs of the team
  double* sums;                // [blocks, width], columns in the order of `sum_place`; or null
  unsigned char* finite;       // [padded_count] or null
  unsigned long long* counts;  // [3]: rows, zero rows, non-finite rows; or null

  // Of the sums of a block: those of root (high + low), and those of low^2 if there are low terms.
  __host__ __device__ int64_t width() const { return low ? 2 * padded : padded; }
};

template <class T, class V, int SIZE, int PACKS>
struct PackSums {
  using M = typename PackTask<T, V>::M;
  static constexpr bool kLow = std::is_same_v<V, Half>;  // only float16 has low terms
  M total[PACKS ? PACKS : 1][kEntries<T>];
  M low[PACKS && kLow ? PACKS : 1][kLow ? kEntries<T> : 1];
};

// Returns the power of two that scales the largest size of a column, above 0, to [2^13, 2^14).
__device__ inline double half_scale(double peak) {
  const int exponent = 13 - ilogb(peak);
  return ldexp(1.0, exponent > 120 ? 120 : exponent < -120 ? -120 : exponent);
}

template <class V, class M>
__device__ __forceinline__ void split(M v, V& high, V& low) {
  high = static_cast<V>(v);
  low = static_cast<V>(v - static_cast<M>(high));
}

// Returns the scaled root of a row's weight.
template <class T, class V>
__device__ __forceinline__ double weight_root(const PackTask<T, V>& task, int64_t i) {
  return task.weights ? sqrt(task.weights[i]) * *task.root_scale : 1;
}

// Packs one row step by step in float64 and adds its sums to `sums` [width].
template <class T, class V, int SIZE>
__device__ void pack_exactly(Team<SIZE>& team, int64_t i, const PackTask<T, V>& task,
                             double* sums) {
  const T* row = task.rows + i * task.row_stride;
  const ExactRow exact = exact_row(team, row, task.columns, DeviceMap{});
  const double factor = weight_root(task, i);
  V* high_row = task.high + i * task.stride;
#pragma unroll 1
  for (int64_t j = team.thread; j < task.stride; j += SIZE) {
    double v = 0;
    if (exact.finite && j < task.columns) {
      const double x = static_cast<double>(row[j]);
      v = factor * ((task.normalize ? exact.direction(x) : x) - task.centre[j]) * task.scale[j];
    }
    V high, low;
    if constexpr (std::is_same_v<V, Half>) {
      high = static_cast<V>(static_cast<float>(v));
      low = static_cast<V>(static_cast<float>(v - static_cast<float>(high)));
    } else {
      high = static_cast<V>(v);
      low = 0;
    }
    high_row[j] = high;
    double packed = static_cast<double>(high);
    if (task.low) {
      task.low[i * task.stride + j] = low;
      packed += static_cast<double>(low);
    }
    if (sums && j < task.columns) {
      const int64_t at = sum_place<kEntries<T>>(j, SIZE);
      sums[at] += factor * packed;
      if (task.low) sums[task.padded + at] += static_cast<double>(low) * static_cast<double>(low);
    }
  }
  if (team.thread != 0) return;
  if (task.finite) task.finite[i] = exact.finite ? 1 : 0;
  if (task.counts) {
    atomicAdd(task.counts + (exact.finite ? 0 : 2), 1ull);
    if (exact.finite && exact.zero) atomicAdd(task.counts + 1, 1ull);
  }
}

// Packs one row in the arithmetic type. Returns false, and writes nothing, if the row must be
// packed step by step.
template <class T, class V, int SIZE, int PACKS>
__device__ bool pack_regular(Team<SIZE>& team, int64_t i, const PackTask<T, V>& task,
                             PackSums<T, V, SIZE, PACKS>& held, double* sums) {
  using M = typename PackTask<T, V>::M;
  constexpr int E = kEntries<T>;
  TeamRow<T, SIZE, PACKS> row(task.rows + i * task.row_stride, task.columns, team.thread,
                              task.aligned);
  M parts[1] = {0};
  double xx[1];
  row.for_each_pack([&](int, int64_t, const Pack<T>& pack) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const M x = static_cast<M>(pack.values[e]);
      parts[0] += x * x;
    }
  });
  team.sum(parts, xx);
  if (!in_range<M>(xx[0])) return false;
  const M a = static_cast<M>(task.normalize ? rsqrt(xx[0]) : 1.0);
  const M factor = static_cast<M>(weight_root(task, i));
  row.forget_widened();
  row.for_each_pack([&](int p, int64_t column, const Pack<T>& pack) {
    M c[E], scale[E], high_m[E], low_m[E];
    load_vector(task.ordered_centre, p, team.thread, SIZE, c);
    load_vector(task.ordered_scale, p, team.thread, SIZE, scale);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const M v = factor * (a * static_cast<M>(pack.values[e]) - c[e]) * scale[e];
      V high = static_cast<V>(v), low = static_cast<V>(static_cast<M>(0));
      if (task.low) split(v, high, low);
      high_m[e] = static_cast<M>(high);
      low_m[e] = static_cast<M>(low);
      const M total = factor * (high_m[e] + low_m[e]), square = low_m[e] * low_m[e];
      if constexpr (PACKS > 0) {
        held.total[p][e] += total;
        if constexpr (std::is_same_v<V, Half>) held.low[p][e] += square;
      } else if (sums && column + e < task.columns) {
        const int64_t at = (int64_t(p) * E + e) * SIZE + team.thread;
        sums[at] += static_cast<double>(total);
        if (task.low) sums[task.padded + at] += static_cast<double>(square);
      }
    }
    if (column >= task.stride) return;
    store_as<V, true>(task.high, i * task.stride, column, task.stride, true, high_m);
    if (task.low) store_as<V, true>(task.low, i * task.stride, column, task.stride, true, low_m);
  });
  if (team.thread == 0 && task.finite) task.finite[i] = 1;
  return true;
}

// Packs zeros for row i beyond N.
template <class T, class V, int SIZE>
__device__ void pack_zeros(const Team<SIZE>& team, int64_t i, const PackTask<T, V>& task) {
  const V zero = static_cast<V>(0.0f);
#pragma unroll 1
  for (int64_t j = team.thread; j < task.stride; j += SIZE) {
    task.high[i * task.stride + j] = zero;
    if (task.low) task.low[i * task.stride + j] = zero;
  }
}

// Writes the sums of a block's regular rows, which each of its teams holds in registers.
template <class T, class V, int SIZE, int PACKS>
__device__ void write_sums(const Team<SIZE>& team, const PackTask<T, V>& task,
                           const PackSums<T, V, SIZE, PACKS>& held, void* shared, double* out) {
  using M = typename PackTask<T, V>::M;
  constexpr int E = kEntries<T>, kTeams = Team<SIZE>::kTeams;
  const int64_t width = task.width();
  std::conditional_t<kTeams == 1, double, M>* own;
  if constexpr (kTeams == 1) {
    own = out;
  } else {
    own = static_cast<M*>(shared) + team.team * width;
  }
#pragma unroll
  for (int p = 0; p < PACKS; ++p) {
    if (int64_t(p) * SIZE * E >= task.columns) break;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int64_t place = (p * E + e) * SIZE + team.thread;
      own[place] = held.total[p][e];
      if constexpr (std::is_same_v<V, Half>)
        if (task.low) own[task.padded + place] = held.low[p][e];
    }
  }
  if constexpr (kTeams > 1) {
    __syncthreads();
    for (int64_t j = threadIdx.x; j < width; j += Team<SIZE>::kThreads) {
      double sum = 0;
#pragma unroll
      for (int t = 0; t < kTeams; ++t)
        sum += static_cast<double>(static_cast<const M*>(shared)[t * width + j]);
      out[j] = sum;
    }
  }
}

template <class T, class V, int SIZE, int PACKS>
__global__ void __launch_bounds__(128, 3) pack_kernel(PackTask<T, V> task) {
  using Members = Team<SIZE>;
  constexpr int kGroup = kPackRows / Members::kTeams;
  unsigned char* shared = shared_memory();
  Members team(shared);
  double* out = task.sums ? task.sums + blockIdx.x * task.width() : nullptr;
  if (PACKS == 0 && out)  // (each thread clears the columns that it adds to)
    for (int64_t j = threadIdx.x; j < task.width(); j += Members::kThreads) out[j] = 0;

  PackSums<T, V, SIZE, PACKS> held = {};
  const int64_t first = int64_t(blockIdx.x) * kPackRows + team.team * kGroup;
  unsigned remaining = 0;
  int regular_rows = 0;
#pragma unroll 1
  for (int k = 0; k < kGroup && first + k < task.padded_count; ++k) {
    if (first + k >= task.count) {
      pack_zeros(team, first + k, task);
    } else if (pack_regular(team, first + k, task, held, out)) {
      ++regular_rows;
    } else {
      remaining |= 1u << k;
    }
  }
  if (team.thread == 0 && task.counts && regular_rows)
    atomicAdd(task.counts, static_cast<unsigned long long>(regular_rows));
  if (PACKS > 0 && out) write_sums(team, task, held, shared + Members::kSharedBytes, out);
  __syncthreads();
#pragma unroll 1
  for (int turn = 0; turn < Members::kTeams; ++turn) {  // the teams, always in this order
    if (turn == team.team)
#pragma unroll 1
      for (int64_t i = first; remaining; ++i, remaining >>= 1)
        if (remaining & 1) pack_exactly(team, i, task, out);
    __syncthreads();
  }
}

// The vectors and sizes of a call that are the same for every chunk of its rows.
template <class T, class V>
struct Packing {
  PackTask<T, V> task;
  int64_t columns;

  Packing(CallResources& resources, const Tensor& rows, const double* centre, const double* scale,
          int64_t stride)
      : task{}, columns(rows.size(1)) {
    task.rows = static_cast<const T*>(rows.const_data_ptr());
    task.centre = centre;
    task.scale = scale;
    task.columns = columns;
    task.row_stride = rows.stride(0);
    task.aligned = is_aligned(task.rows, rows.stride(0));
    task.stride = stride;
    using M = typename PackTask<T, V>::M;
    dispatch_team<T>(columns, [&](auto size, auto) {
      task.padded = round_up(columns, size() * kEntries<T>);
      const auto vectors =
          prepare<M, kEntries<T>>(resources, centre, scale, nullptr, columns, size());
      task.ordered_centre = vectors.first;
      task.ordered_scale = vectors.second;
    });
  }

  static int64_t blocks(int64_t padded_count) { return divide_up(padded_count, kPackRows); }

  void run(CallResources& resources, const PackTask<T, V>& chunk) const {
    dispatch_team<T>(columns, [&](auto size, auto packs) {
      using Members = Team<size()>;
      size_t shared = Members::kSharedBytes;
      if (Members::kTeams > 1 && chunk.sums)
        shared +=
            Members::kTeams * sizeof(*chunk.ordered_scale) * static_cast<size_t>(chunk.width());
      launch(pack_kernel<T, V, size(), packs()>, static_cast<unsigned>(blocks(chunk.padded_count)),
             Members::kThreads, shared, resources.stream(), chunk);
    });
  }
};

// Returns the size of the team, as `sum_place` needs it, for rows of T with so many columns.
template <class T>
int team_size(int64_t columns) {
  int threads = 0;
  dispatch_team<T>(columns, [&](auto size, auto) { threads = size(); });
  return threads;
}

}  // namespace realign_fast
