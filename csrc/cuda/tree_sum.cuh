// Sums over partial results in a tree of fixed shape, so that they do not depend on the order in
// which blocks run.
#pragma once

#include "cuda/device.cuh"

namespace realign_fast {

constexpr int kFan = 64;  // partial results that one thread sums

// to [ceil(count / FAN), width] = the sums of FAN neighbours in from [count, width].
template <int FAN>
__global__ void __launch_bounds__(128)
    add_neighbours(const double* from, double* to, int64_t count, int64_t width) {
  const int64_t j = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (j >= width) return;
  const int64_t first = int64_t(blockIdx.y) * FAN;
  const int64_t end = first + FAN < count ? first + FAN : count;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = first; i < end; ++i) sum += from[i * width + j];
  to[blockIdx.y * width + j] = sum;
}

// Computes one level of the tree and returns how many sums are left.
inline int64_t add_level(CallResources& resources, const double* from, double* to, int64_t count,
                         int64_t width) {
  const int64_t fewer = divide_up(count, kFan);
  launch(add_neighbours<kFan>,
         dim3(static_cast<unsigned>(divide_up(width, 128)), static_cast<unsigned>(fewer)), 128, 0,
         resources.stream(), from, to, count, width);
  return fewer;
}

// Returns the sum [width] of sums [count, width].
inline const double* add_all(CallResources& resources, const double* sums, int64_t count,
                             int64_t width) {
  while (count > 1) {
    double* target = resources.allocate<double>(divide_up(count, kFan) * width);
    count = add_level(resources, sums, target, count, width);
    sums = target;
  }
  return sums;
}

}  // namespace realign_fast
