// What both row kernels share on the CPU: dtypes, padded vectors, the call for an instruction set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
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

// Whole registers of M on 64-byte lines: one that straddles two lines costs two accesses.
template <class M>
struct LineAllocator {
  using value_type = M;
  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}
  M* allocate(size_t count) {
    return static_cast<M*>(::operator new(count * sizeof(M), std::align_val_t(64)));
  }
  void deallocate(M* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};
template <class M>
using Registers = std::vector<M, LineAllocator<M>>;

// values [columns] (zeros if null) as M, with zeros to the end of a whole register (or `width`).
template <class M>
Registers<M> padded(const double* values, int64_t columns, int64_t width = 64 / sizeof(M)) {
  Registers<M> copy((columns + width - 1) / width * width);
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

// Calls body(chunk, scratch [size]) for every chunk on torch's threads. Whoever is free takes
// its share of what is left, so a thread that the machine slows down does not hold up the rest and
// most chunks follow one that the same thread has just read (and fetched ahead from).
template <class Body>
void for_each_chunk(int64_t chunks, int64_t size, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Registers<double> scratch(size);
    for (int64_t begin = next; begin < chunks;) {
      const int64_t end = begin + std::max<int64_t>(1, (chunks - begin) / (2 * workers));
      if (!next.compare_exchange_weak(begin, end)) continue;
      for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk, scratch.data());
      begin = next;
    }
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
