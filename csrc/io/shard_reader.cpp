#include "io/shard_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
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

constexpr int64_t kPage = 4096;
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

ShardReader::ShardReader(int descriptor, int64_t begin, int64_t end, int64_t block_bytes,
                         int64_t ahead, int threads)
    : begin_(begin), end_(end), block_bytes_(block_bytes), ahead_(ahead) {
  if (begin < 0 || end < begin || block_bytes < 1 || ahead < 1 || threads < 1) {
    throw std::invalid_argument(
        "ShardReader: expected 0 <= begin <= end, at least 1 for block_bytes, "
        "ahead and threads, got begin " +
        std::to_string(begin) + ", end " + std::to_string(end) + ", block_bytes " +
        std::to_string(block_bytes) + ", ahead " + std::to_string(ahead) + ", threads " +
        std::to_string(threads));
  }
  count_ = (end - begin + block_bytes - 1) / block_bytes;
  process_ = getpid();
  descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) throw_errno();
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

void start_writing(int descriptor, int64_t begin, int64_t bytes) {
  // This is only a request: if the file system does not support it, the final sync writes the
  // bytes.
  sync_file_range(descriptor, begin, bytes, SYNC_FILE_RANGE_WRITE);
}

}  // namespace realign_fast::io
