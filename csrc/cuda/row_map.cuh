// The row map on the device: its vectors in the order in which teams of threads read them, the dot
// products of a row, and the exact evaluation in float64 of rows that the expansion of
// common/row_map_math.h cannot represent.
#pragma once

#include "common/row_map_math.h"
#include "cuda/row_team.cuh"

namespace realign_fast {

struct DeviceMap {
  const MapNumbers* numbers;  // on the device, where prepare_vectors writes them
  const double* shift;        // b [D]
  const double* recentre;     // h [D] or null
  bool given;                 // false if there is no map
  ResultLength length;
};

// The order of vectors of M that teams read: the 16-byte chunk c of pack p of thread t is at
// ((p * chunks + c) * SIZE + t), so that neighbouring threads read neighbouring chunks.
template <class M, int E>
struct VectorOrder {
  static constexpr int kWide = 16 / sizeof(M);  // entries of a chunk
  static constexpr int kChunks = E / kWide;
  static_assert(E % kWide == 0);  // float64 rows are never computed in float32

  __device__ static int64_t place(int64_t column, int size) {
    const int64_t pack = column / E, e = column % E;
    return ((pack / size * kChunks + e / kWide) * size + pack % size) * kWide + e % kWide;
  }
  static int64_t padded(int64_t columns, int size) {
    const int64_t tile = int64_t(size) * E;
    return (columns + tile - 1) / tile * size * kChunks * kWide;
  }
};

template <class M, int E>
__device__ __forceinline__ void load_vector(const M* vector, int p, int thread, int size,
                                            M (&values)[E]) {
  using Order = VectorOrder<M, E>;
#pragma unroll
  for (int c = 0; c < Order::kChunks; ++c) {
    const int64_t chunk = (int64_t(p) * Order::kChunks + c) * size + thread;
    const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(vector) + chunk);
    memcpy(values + c * Order::kWide, &bytes, 16);
  }
}

// One block writes two vectors as M, zero beyond D, and the numbers of the map. `first` and
// `second` may be null, which means zeros. So may `scale`: then no numbers are written.
template <class M, int E>
__global__ void __launch_bounds__(256)
    prepare_vectors(const double* first, const double* second, const double* scale, int64_t columns,
                    int64_t padded, int size, M* ordered_first, M* ordered_second,
                    MapNumbers* numbers) {
  Team<256> team(shared_memory());
  for (int64_t i = team.thread; i < padded; i += 256)
    ordered_first[i] = ordered_second[i] = static_cast<M>(0);
  __syncthreads();
  double parts[3] = {0, 0, 0}, sums[3];
  for (int64_t j = team.thread; j < columns; j += 256) {
    const double b = first ? first[j] : 0, h = second ? second[j] : 0;
    const int64_t place = VectorOrder<M, E>::place(j, size);
    ordered_first[place] = static_cast<M>(b);
    ordered_second[place] = static_cast<M>(h);
    parts[0] += b * b;
    parts[1] += b * h;
    parts[2] += h * h;
  }
  team.sum(parts, sums);
  if (scale && team.thread == 0)
    *numbers = MapNumbers{*scale, sums[0], sums[1], sums[2], second != nullptr, {}};
}

template <class M>
struct OrderedVectors {
  M *first, *second;
  MapNumbers* numbers;
};

template <class M, int E>
OrderedVectors<M> prepare(CallResources& resources, const double* first, const double* second,
                          const double* scale, int64_t columns, int size) {
  const int64_t padded = VectorOrder<M, E>::padded(columns, size);
  OrderedVectors<M> vectors{resources.allocate<M>(padded), resources.allocate<M>(padded),
                            resources.allocate<MapNumbers>(1)};
  launch(prepare_vectors<M, E>, 1, 256, Team<256>::kSharedBytes, resources.stream(), first, second,
         scale, columns, padded, size, vectors.first, vectors.second, vectors.numbers);
  return vectors;
}

// The dot products of ROWS rows with themselves, with b and with h, three numbers a row; the last
// two are 0 without a map. The rows share the loads of b and h.
template <int ROWS, class T, class M, int SIZE, int PACKS>
__device__ __forceinline__ void dot_products(Team<SIZE>& team,
                                             const TeamRow<T, SIZE, PACKS> (&rows)[ROWS],
                                             const M* shift, const M* recentre, bool has_map,
                                             double (&dots)[3 * ROWS]) {
  constexpr int E = kEntries<T>;
  M parts[3 * ROWS] = {};
  rows[0].for_each_place([&](int p, int64_t) {
    M b[E] = {}, h[E] = {};
    if (has_map) {
      load_vector(shift, p, team.thread, SIZE, b);
      load_vector(recentre, p, team.thread, SIZE, h);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const Pack<T> pack = rows[r].pack(p);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const M x = static_cast<M>(pack.values[e]);
        parts[3 * r] += x * x;
        parts[3 * r + 1] += x * b[e];
        parts[3 * r + 2] += x * h[e];
      }
    }
  });
  team.sum(parts, dots);
}

// The divisors of a row that is computed step by step in float64: at each of the three
// normalisations it is divided by its largest entry, so that no square overflows, and then by its
// norm. A vector of zeros is divided by 1.
struct ExactRow {
  bool finite, zero;
  double peak = 1, norm = 1, peak_r = 1, norm_r = 1, peak_q = 1, norm_q = 1;

  __device__ double direction(double x) const { return x / peak / norm; }
  __device__ double shifted_unit(double v) const { return v / peak_r / norm_r; }
  __device__ double recentred_unit(double v) const { return v / peak_q / norm_q; }
};

// Returns the image of entry x in column j, or that of u if there is no map.
__device__ inline double exact_value(const ExactRow& row, const DeviceMap& map, double scale,
                                     double x, int64_t j) {
  double v = row.direction(x);
  if (map.given) {
    v = row.shifted_unit(scale * v + map.shift[j]);
    if (map.recentre) v = row.recentred_unit(v + map.recentre[j]);
    v *= map.length.value;
  }
  return v;
}

// Computes the largest size and the norm of value(x, j) over the row's entries.
template <int SIZE, class T, class Value>
__device__ void exact_norm(Team<SIZE>& team, const T* row, int64_t columns, const Value& value,
                           double& peak, double& norm) {
  double most = 0, squares[1] = {0}, sum[1];
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += SIZE)
    most = fmax(most, fabs(value(static_cast<double>(row[j]), j)));
  most = team.peak(most);
  if (most == 0) return;
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += SIZE) {
    const double v = value(static_cast<double>(row[j]), j) / most;
    squares[0] += v * v;
  }
  team.sum(squares, sum);
  peak = most;
  norm = sqrt(sum[0]);
}

// Computes the divisors of the normalisations that follow s u + b, whose entries are shifted(x, j).
template <int SIZE, class T, class Shifted>
__device__ void exact_norms(Team<SIZE>& team, const T* row, int64_t columns, const DeviceMap& map,
                            ExactRow& exact, const Shifted& shifted) {
  if (map.recentre || map.length.given)
    exact_norm(team, row, columns, shifted, exact.peak_r, exact.norm_r);
  if (!map.recentre || !map.length.given) return;
  const auto recentred = [&](double x, int64_t j) {
    return exact.shifted_unit(shifted(x, j)) + map.recentre[j];
  };
  exact_norm(team, row, columns, recentred, exact.peak_q, exact.norm_q);
}

// Such rows are rare, so it reads the row again, entry by entry, which needs few registers.
template <int SIZE, class T>
__device__ ExactRow exact_row(Team<SIZE>& team, const T* row, int64_t columns,
                              const DeviceMap& map) {
  ExactRow exact;
  double parts[2] = {0, 0}, counts[2];  // entries that are not finite, that are not zero
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += SIZE) {
    const double x = static_cast<double>(row[j]);
    parts[0] += isfinite(x) ? 0 : 1;
    parts[1] += x == 0 ? 0 : 1;
  }
  team.sum(parts, counts);
  exact.finite = counts[0] == 0;
  exact.zero = counts[1] == 0;
  if (!exact.finite) return exact;
  exact_norm(team, row, columns, [](double x, int64_t) { return x; }, exact.peak, exact.norm);
  if (!map.given) return exact;
  const double s = map.numbers->scale;
  exact_norms(team, row, columns, map, exact,
              [&](double x, int64_t j) { return s * exact.direction(x) + map.shift[j]; });
  return exact;
}

}  // namespace realign_fast
