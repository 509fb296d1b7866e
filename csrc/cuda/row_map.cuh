// The row map unit(unit(s u + b) + h), u = x / |x| (arXiv 2602.07026, section 4), as three numbers
// a row: result = alpha x + beta b + gamma h. The algebra is that of csrc/cpu/row_map.h:
//   r^2 = |s u + b|^2 = s^2 + 2 s u.b + b.b
//   q^2 = |e' + h|^2  = 1 + 2 (s u.h + b.h) / r + h.h
// and so is the refuge: where a squared norm comes out below 1/8 of its terms, or x.x is beyond
// what the arithmetic can square, the row is done term by term in float64.
#pragma once

#include "row_team.cuh"

namespace realign_fast {

// Numbers of the map that every row needs, written on the device by prepare_map.
struct MapNumbers {
  double scale, bb, bh, hh;
};

struct DeviceMap {
  const MapNumbers* numbers;
  const double* shift;     // b [D]
  const double* recentre;  // h [D] or null
  bool given;              // false: there is no map
};

// Vectors as M in the order in which teams read them: chunk c of 16 bytes of pack p of thread t is
// at ((p * chunks + c) * SIZE + t), so that neighbours read neighbouring chunks.
template <class M, int E>
struct VectorOrder {
  static constexpr int kWide = 16 / sizeof(M);  // entries of a chunk
  static constexpr int kChunks = E / kWide;
  static_assert(E % kWide == 0);  // float64 rows are never done in float32

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

// One block: vectors as M, zero beyond D, and the numbers of the map. `first` and `second` may be
// null (zeros), `scale` too (then no numbers are written).
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
  if (scale && team.thread == 0) *numbers = MapNumbers{*scale, sums[0], sums[1], sums[2]};
}

template <class M>
struct OrderedVectors {
  M *first, *second;
  MapNumbers* numbers;
};

template <class M, int E>
OrderedVectors<M> prepare(Work& work, const double* first, const double* second,
                          const double* scale, int64_t columns, int size) {
  const int64_t padded = VectorOrder<M, E>::padded(columns, size);
  OrderedVectors<M> vectors{work.take<M>(padded), work.take<M>(padded), work.take<MapNumbers>(1)};
  launch(prepare_vectors<M, E>, 1, 256, Team<256>::kSharedBytes, work.stream(), first, second,
         scale, columns, padded, size, vectors.first, vectors.second, vectors.numbers);
  return vectors;
}

struct Coefficients {
  double alpha, beta, gamma;
  bool cancelled;
};

constexpr double kCancelled = 1.0 / 8;  // as in csrc/cpu/row_map.h

// From xx = x.x, xb = x.b and xh = x.h (0 without h).
__device__ inline Coefficients row_coefficients(const MapNumbers& map, double xx, double xb,
                                                double xh) {
  const double s = map.scale, inverse = rsqrt(xx);
  const double rr = s * s + 2 * s * inverse * xb + map.bb;
  const double inverse_r = rsqrt(rr);
  const double eh = (s * inverse * xh + map.bh) * inverse_r;
  const double qq = 1 + 2 * eh + map.hh;
  Coefficients c;
  c.gamma = rsqrt(qq);
  c.beta = c.gamma * inverse_r;
  c.alpha = c.beta * s * inverse;
  c.cancelled = !(rr > kCancelled * (s * s + map.bb)) || !(qq > kCancelled * (1 + map.hh));
  return c;
}

// False if x.x is too large or too small for M, or zero or NaN.
template <class M>
__device__ __forceinline__ bool in_range(double xx) {
  constexpr double limit = sizeof(M) == 4 ? 1e30 : 1e280;
  return xx > 1 / limit && xx < limit;
}

// A row done term by term in float64: what divides it at every step. (A peak first, so that no
// square overflows; a vector of zeros is divided by 1.)
struct DirectRow {
  bool finite, zero;
  double peak = 1, norm = 1, peak_r = 1, norm_r = 1, peak_q = 1, norm_q = 1;

  __device__ double unit(double x) const { return x / peak / norm; }
  __device__ double half(double v) const { return v / peak_r / norm_r; }
  __device__ double whole(double v) const { return v / peak_q / norm_q; }
};

// The image of entry x in column j, or u where there is no map.
__device__ inline double direct_value(const DirectRow& row, const DeviceMap& map, double scale,
                                      double x, int64_t j) {
  double v = row.unit(x);
  if (map.given) {
    v = row.half(scale * v + map.shift[j]);
    if (map.recentre) v = row.whole(v + map.recentre[j]);
  }
  return v;
}

// peak and norm of value(x, j) over the row's entries.
template <int SIZE, class T, class Value>
__device__ void direct_norm(Team<SIZE>& team, const T* row, int64_t columns, const Value& value,
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

// (Rare, so it reads the row again, entry by entry, and needs few registers.)
template <int SIZE, class T>
__device__ DirectRow direct_row(Team<SIZE>& team, const T* row, int64_t columns,
                                const DeviceMap& map) {
  DirectRow direct;
  double bad[2] = {0, 0}, found[2];  // entries that are not finite, that are not zero
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += SIZE) {
    const double x = static_cast<double>(row[j]);
    bad[0] += isfinite(x) ? 0 : 1;
    bad[1] += x == 0 ? 0 : 1;
  }
  team.sum(bad, found);
  direct.finite = found[0] == 0;
  direct.zero = found[1] == 0;
  if (!direct.finite) return direct;
  direct_norm(team, row, columns, [](double x, int64_t) { return x; }, direct.peak, direct.norm);
  if (!map.given) return direct;
  const double s = map.numbers->scale;
  const auto moved = [&](double x, int64_t j) { return s * direct.unit(x) + map.shift[j]; };
  direct_norm(team, row, columns, moved, direct.peak_r, direct.norm_r);
  if (!map.recentre) return direct;
  const auto recentred = [&](double x, int64_t j) {
    return direct.half(moved(x, j)) + map.recentre[j];
  };
  direct_norm(team, row, columns, recentred, direct.peak_q, direct.norm_q);
  return direct;
}

}  // namespace realign_fast
