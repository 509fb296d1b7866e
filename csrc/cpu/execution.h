// How a CPU kernel runs: aligned memory, chunks of work on torch's threads, and the call of the
// function that was compiled for the CPU's instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/row_map.h"

namespace realign_fast {

// Allocates on 64-byte cache lines, because a register that straddles two lines costs two accesses,
// and large buffers on huge pages.
template <class M>
struct LineAllocator {
  using value_type = M;
  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}
  M* allocate(size_t count) {
    void* memory = ::operator new(count * sizeof(M), alignment(count));
    request_huge_pages(memory, count * sizeof(M));
    return static_cast<M*>(memory);
  }
  void deallocate(M* p, size_t count) { ::operator delete(p, alignment(count)); }
  static std::align_val_t alignment(size_t count) {
    return std::align_val_t(count * sizeof(M) < kHugeBufferBytes ? 64 : kHugePage);
  }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};
template <class M>
using AlignedVector = std::vector<M, LineAllocator<M>>;

// Copies values [columns] (zeros if null) as M, with zeros up to a multiple of `width` entries.
template <class M>
AlignedVector<M> padded(const double* values, int64_t columns, int64_t width = 64 / sizeof(M)) {
  AlignedVector<M> copy(round_up(columns, width));
  for (int64_t j = 0; values && j < columns; ++j) copy[j] = static_cast<M>(values[j]);
  return copy;
}

// Calls body(chunk, scratch [scratch_size]) for every chunk on torch's threads. Each thread begins
// with its own part of the chunks, whose rows are in its caches if it computed them before, and
// takes half of what is left of it at a time. Then it takes from the others' parts, so a thread
// that the machine slows down does not delay the others. Most chunks follow one that the same
// thread has just read (and prefetched from).
template <class Body>
void for_each_chunk(int64_t chunks, int64_t scratch_size, const Body& body) {
  const int64_t workers = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  struct alignas(64) Part {
    std::atomic<int64_t> next;
  };
  std::vector<Part> parts(workers);
  for (int64_t i = 0; i < workers; ++i) parts[i].next = i * chunks / workers;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    AlignedVector<double> scratch(scratch_size);
    for (int64_t turn = 0; turn < workers; ++turn) {
      const int64_t part = (worker + turn) % workers, part_end = (part + 1) * chunks / workers;
      std::atomic<int64_t>& next = parts[part].next;
      for (int64_t first = next; first < part_end;) {
        const int64_t end = first + divide_up(part_end - first, 2);
        if (!next.compare_exchange_weak(first, end)) continue;
        for (int64_t chunk = first; chunk < end; ++chunk) body(chunk, scratch.data());
        first = next;
      }
    }
  });
}

// map_to_new_tensor (common/dispatch.h) on the CPU, where a large result lies on huge pages.
template <MapInPlace* map_in_place>
Tensor map_to_huge_pages(Tensor rows, Tensor linear, Tensor shift, std::optional<Tensor> recentre,
                         ScalarType dtype, std::optional<double> length, int64_t variant) {
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), dtype);
  request_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  map_in_place(out, rows, linear, shift, recentre, length, variant);
  return out;
}

// Returns the requested instruction set (0: the best one), checked against those of this CPU.
inline Isa checked_isa(int64_t requested) {
  const Isa best = best_isa();
  STD_TORCH_CHECK(requested >= 0 && requested <= static_cast<int64_t>(best), "variant ", requested,
                  " is not available here; expected 0 (the best instruction set) to ",
                  static_cast<int64_t>(best), ", the best that this CPU has");
  return requested == 0 ? best : static_cast<Isa>(requested);
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
