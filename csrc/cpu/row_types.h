// What both row kernels share on the CPU: dtypes, padded vectors, the call for an instruction set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "isa.h"
#include "row_map.h"

namespace realign_fast {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// float32 carries every 16-bit and float32 row to a float16 or float32 result. A bfloat16 result
// has the exponents to show the error of an entry that cancels to almost nothing, so it takes
// float64.
template <class T, class O>
inline constexpr bool kNeedsDouble =
    std::is_same_v<T, double> || std::is_same_v<O, double> || std::is_same_v<O, BFloat16>;
template <class T, class O>
using Arithmetic = std::conditional_t<kNeedsDouble<T, O>, double, float>;

// values [columns] (zeros if null) as M, with zeros to the end of a whole register.
template <class M>
std::vector<M> padded(const double* values, int64_t columns) {
  constexpr int64_t lanes = 64 / sizeof(M);
  std::vector<M> copy((columns + lanes - 1) / lanes * lanes);
  for (int64_t j = 0; values && j < columns; ++j) copy[j] = static_cast<M>(values[j]);
  return copy;
}

// Calls `body` with a value of the tensor's element type.
template <class Body>
void dispatch_rows(const char* op, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return body(Half());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    default: STD_TORCH_CHECK(false, op, ": expected rows of float16, bfloat16, float32 or float64");
  }
}

// Calls body(chunk, scratch [columns]) for every chunk on torch's threads. Whoever is free takes
// the next one, so a thread that the machine slows down does not hold up the rest.
template <class Body>
void for_each_chunk(int64_t chunks, int64_t columns, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    std::vector<double> scratch(columns);
    for (int64_t chunk = next++; chunk < chunks; chunk = next++) body(chunk, scratch.data());
  });
}

// The instruction set asked for, checked against what this CPU has.
inline Isa usable_isa(int64_t asked) {
  const Isa best = best_isa();
  STD_TORCH_CHECK(asked >= 0 && asked <= static_cast<int64_t>(best), "isa ", asked,
                  " is not available here; the best is ", static_cast<int64_t>(best));
  return asked == 0 ? best : static_cast<Isa>(asked);
}

}  // namespace realign_fast

#if defined(__x86_64__)
#define REALIGN_CALL(isa, function, ...)                    \
  switch (isa) {                                            \
    case Isa::avx512: avx512::function(__VA_ARGS__); break; \
    case Isa::avx2: avx2::function(__VA_ARGS__); break;     \
    default: baseline::function(__VA_ARGS__); break;        \
  }
#else
#define REALIGN_CALL(isa, function, ...) (void)isa, baseline::function(__VA_ARGS__)
#endif
