#include "io/shard_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/huge_pages.h"
#include "io/errors.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14; an older kernel answers EINVAL
#endif

namespace realign_fast::io {
namespace {

constexpr int64_t kPage =
    4096;  // a page, to which O_DIRECT requires offsets and sizes to be aligned
constexpr int64_t kHuge =
    kHugePage;  // the alignment at which cached files can be mapped by huge pages

// One mapping holds many blocks: mapping and unmapping each block takes as long as reading it from
// the page cache. It is not the whole file, for the sake of limits of the address space.
constexpr int64_t kMappingBytes = 256 << 20;

int64_t round_down(int64_t bytes, int64_t multiple) { return bytes - bytes % multiple; }
int64_t round_up(int64_t bytes, int64_t multiple) {
  return round_down(bytes + multiple - 1, multiple);
}

[[noreturn]] void throw_too_short(int64_t end) {
  throw std::length_error("the file ends before byte " + std::to_string(end) +
                          ", up to which it is read; it may have become shorter");
}

std::byte* allocate(int64_t bytes) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kHuge, round_up(bytes, kHuge)));
  if (memory == nullptr) throw std::bad_alloc();
  request_huge_pages(memory, static_cast<size_t>(bytes));
  return memory;
}

}  // namespace

// A mapped window of a file: the bytes low..low+length.
struct ShardReader::Mapping {
  int64_t low;
  size_t length;
  std::byte* window;
  std::optional<MappedRange> range;
  Mapping(int descriptor, int64_t low, size_t length) : low(low), length(length) {
    constexpr int kFlags = MAP_PRIVATE | MAP_NORESERVE;
    void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, kFlags, descriptor, low);
    if (mapped == MAP_FAILED) throw_errno();
    window = static_cast<std::byte*>(mapped);
    range.emplace(window, static_cast<int64_t>(length));
  }
  ~Mapping() {
    range.reset();  // first: the addresses may be mapped again at once
    munmap(window, length);
  }
};

struct Ring::Free {
  std::mutex mutex;
  std::vector<std::byte*> buffers;
  std::vector<std::byte*> owned;  // all buffers that the ring was created with
  ~Free() {
    for (auto* buffer : owned) std::free(buffer);
  }
  void give_back(std::byte* buffer) {
    std::lock_guard lock(mutex);
    if (std::find(owned.begin(), owned.end(), buffer) == owned.end()) {
      std::free(buffer);
    } else {
      buffers.push_back(buffer);
    }
  }
};

// A block may begin and end inside a page, so its buffer holds two more pages.
Ring::Ring(int64_t buffers, int64_t bytes)
    : bytes_(round_up(bytes, kPage) + 2 * kPage), free_(std::make_shared<Free>()) {
  for (int64_t i = 0; i < buffers; i++) free_->owned.push_back(allocate(bytes_));
  free_->buffers = free_->owned;
}

std::shared_ptr<std::byte> Ring::take() {
  std::byte* buffer = nullptr;
  {
    std::lock_guard lock(free_->mutex);
    if (!free_->buffers.empty()) {
      buffer = free_->buffers.back();
      free_->buffers.pop_back();
    }
  }
  if (buffer == nullptr) buffer = allocate(bytes_);
  return {buffer, [free = free_](std::byte* used) { free->give_back(used); }};
}

std::vector<uintptr_t> Ring::addresses() const {
  std::vector<uintptr_t> all;
  for (auto* buffer : free_->owned) all.push_back(reinterpret_cast<uintptr_t>(buffer));
  return all;
}

int64_t Ring::free() const {
  std::lock_guard lock(free_->mutex);
  return static_cast<int64_t>(free_->buffers.size());
}

ShardReader::ShardReader(int descriptor, int64_t begin, int64_t end, int64_t block_bytes,
                         int64_t ahead, int threads, std::shared_ptr<Ring> ring, bool direct)
    : begin_(begin), end_(end), block_bytes_(block_bytes), ahead_(ahead), ring_(std::move(ring)) {
  if (begin < 0 || end < begin || block_bytes < 1 || ahead < 1 || threads < 0) {
    throw std::invalid_argument(
        "ShardReader: expected 0 <= begin <= end, at least 1 for block_bytes and ahead and at "
        "least 0 for threads, got begin " +
        std::to_string(begin) + ", end " + std::to_string(end) + ", block_bytes " +
        std::to_string(block_bytes) + ", ahead " + std::to_string(ahead) + ", threads " +
        std::to_string(threads));
  }
  if (ring_ && ring_->bytes() < round_up(block_bytes, kPage) + 2 * kPage) {
    throw std::invalid_argument(
        "ShardReader: the ring was created for smaller blocks: a buffer has " +
        std::to_string(ring_->bytes()) + " bytes, a block " + std::to_string(block_bytes));
  }
  count_ = (end - begin + block_bytes - 1) / block_bytes;
  process_ = getpid();
  descriptor_ = -1;
  if (ring_ && direct) {  // opens the same file again, because O_DIRECT is a flag of an open file
    const auto path = "/proc/self/fd/" + std::to_string(descriptor);
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = descriptor_ >= 0;
  }
  if (descriptor_ < 0) descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) throw_errno();
  without_threads_ = threads == 0;
  const auto thread_count = std::min<int64_t>({threads, ahead, count_});
  for (int64_t i = 0; i < thread_count; i++) threads_.emplace_back(&ShardReader::work, this);
}

ShardReader::~ShardReader() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (auto& thread : threads_) thread.join();
  close(descriptor_);
}

bool ShardReader::was_forked() const { return getpid() != process_; }

Block ShardReader::next() {
  if (was_forked()) {
    throw std::runtime_error(
        "ShardReader: this process was forked from the one whose threads read; open the file "
        "again here");
  }
  std::unique_lock lock(mutex_);
  if (without_threads_) {
    if (next_given_ == count_) return {};
    auto block = fill(next_given_);
    next_given_++;  // an error comes again
    return block;
  }
  // Another thread may take the block that this one waits for, and it may be the last.
  changed_.wait(lock, [&] { return next_given_ == count_ || ready_.contains(next_given_); });
  if (next_given_ == count_) return {};
  if (const auto error = ready_[next_given_].error) std::rethrow_exception(error);
  auto block = std::move(ready_.extract(next_given_++).mapped().block);
  lock.unlock();
  changed_.notify_all();
  return block;
}

void ShardReader::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock,
                  [&] { return stop_ || next_read_ < std::min(count_, next_given_ + ahead_); });
    if (stop_) return;
    const auto index = next_read_++;
    lock.unlock();
    Result result;
    try {
      result.block = fill(index);
    } catch (...) {
      result.error = std::current_exception();
    }
    lock.lock();
    ready_.emplace(index, std::move(result));
    changed_.notify_all();
  }
}

Block ShardReader::fill(int64_t index) {
  const auto begin = begin_ + index * block_bytes_;
  const auto bytes = std::min(block_bytes_, end_ - begin);
  return ring_ ? read(begin, bytes) : map(index, begin, bytes);
}

void ShardReader::check_length() const {
  struct stat state;
  if (fstat(descriptor_, &state) != 0) throw_errno();
  if (state.st_size < end_) throw_too_short(end_);
}

// Returns the mapping that holds a block.
std::shared_ptr<ShardReader::Mapping> ShardReader::mapping_of(int64_t index) {
  const auto blocks = std::max<int64_t>(1, kMappingBytes / block_bytes_);
  const auto begin = begin_ + index / blocks * blocks * block_bytes_;
  const auto low = round_down(begin, kHuge);
  std::lock_guard lock(mapping_mutex_);
  if (!mapping_ || mapping_->low != low) {
    const auto end = std::min(end_, begin + blocks * block_bytes_);
    mapping_ = std::make_shared<Mapping>(descriptor_, low, static_cast<size_t>(end - low));
  }
  return mapping_;
}

Block ShardReader::map(int64_t index, int64_t begin, int64_t bytes) {
  check_length();  // an error is better than what MappedRange does about pages that are gone
  const auto mapping = mapping_of(index);
  auto* const data = mapping->window + (begin - mapping->low);
  const auto first = round_down(begin - mapping->low, kPage);
  const auto end = begin - mapping->low + bytes;
  if (madvise(mapping->window + first, end - first, MADV_POPULATE_READ) != 0 && errno != EINVAL) {
    if (errno == EFAULT) check_length();
    throw_errno();
  }
  // The pages that are of this block alone are let go of with it.
  const auto own = round_up(begin - mapping->low, kPage), own_end = round_down(end, kPage);
  const auto release = [mapping, own, own_end](std::byte*) {
    if (own < own_end) madvise(mapping->window + own, own_end - own, MADV_DONTNEED);
  };
  return {{data, release}, data, bytes, &*mapping->range};
}

Block ShardReader::read(int64_t begin, int64_t bytes) const {
  auto memory = ring_->take();
  const auto low = direct_ ? round_down(begin, kPage) : begin;
  const auto needed = begin + bytes - low;
  const auto length = direct_ ? round_up(needed, kPage) : needed;
  for (int64_t done = 0; done < needed;) {
    const auto bytes_read = pread(descriptor_, memory.get() + done, length - done, low + done);
    if (bytes_read < 0 && errno == EINTR) continue;
    if (bytes_read < 0) throw_errno();
    if (bytes_read == 0) throw_too_short(end_);
    done += bytes_read;
    // O_DIRECT continues at a page, so bytes beyond the last whole page are read again.
    if (direct_ && done < needed) done = round_down(done, kPage);
    if (direct_ && done < needed && bytes_read < kPage) check_length();
  }
  return {memory, memory.get() + (begin - low), bytes};
}

void start_writing(int descriptor, int64_t begin, int64_t bytes) {
  // This is only a request: if the file system does not support it, the final sync writes the
  // bytes.
  sync_file_range(descriptor, begin, bytes, SYNC_FILE_RANGE_WRITE);
}

}  // namespace realign_fast::io
