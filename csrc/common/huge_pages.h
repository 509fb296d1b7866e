// Huge pages for large buffers. The first touch of new memory costs a page fault for every 4 KiB,
// which takes longer than a row kernel needs for the same bytes; a huge page has 2 MiB.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace realign_fast {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kHugeBufferBytes = 2 * kHugePage;  // smaller buffers stay as they are

// Asks the system for huge pages for memory of at least kHugeBufferBytes that has not been written
// yet. Linux grants them if `/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`.
// Only the pages change, so the memory is freed, resized and shared as before. The range is rounded
// outwards to whole pages, because a range inside of a mapping would split it into three.
inline void request_huge_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kHugeBufferBytes) return;
  constexpr uintptr_t page = 4096;
  const auto first = reinterpret_cast<uintptr_t>(memory) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes + page - 1) / page * page;
  // A refusal (no such pages, or larger small pages) leaves the memory as it is.
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace realign_fast
