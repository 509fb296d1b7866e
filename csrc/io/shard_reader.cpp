#include "io/shard_reader.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14; an older kernel answers EINVAL
#endif

namespace realign_fast::io {
namespace {

constexpr int64_t kPage = 4096;     // of memory, and what O_DIRECT asks of offsets and sizes
constexpr int64_t kHuge = 2 << 20;  // on this grid cached files can be mapped by huge pages

int64_t down(int64_t bytes, int64_t grid) { return bytes - bytes % grid; }
int64_t up(int64_t bytes, int64_t grid) { return down(bytes + grid - 1, grid); }

[[noreturn]] void fail() { throw std::system_error(errno, std::generic_category()); }

std::byte* allocate(int64_t bytes) {
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kHuge, up(bytes, kHuge)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

struct Ring::Free {
  std::mutex mutex;
  std::vector<std::byte*> buffers;
  std::vector<std::byte*> owned;  // all that the ring was made with
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

// A block may begin and end inside pages: two more of them hold it.
Ring::Ring(int64_t buffers, int64_t bytes)
    : bytes_(up(bytes, kPage) + 2 * kPage), free_(std::make_shared<Free>()) {
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
  if (begin < 0 || end < begin || block_bytes < 1 || ahead < 1 || threads < 1) {
    throw std::invalid_argument(
        "ShardReader: expected 0 <= begin <= end and at least one byte a "
        "block, block ahead and thread");
  }
  if (ring_ && ring_->bytes() < up(block_bytes, kPage) + 2 * kPage) {
    throw std::invalid_argument("ShardReader: the ring was made for smaller blocks");
  }
  count_ = (end - begin + block_bytes - 1) / block_bytes;
  descriptor_ = -1;
  if (ring_ && direct) {  // a second opening of the same file, which may be another kind of opening
    const auto path = "/proc/self/fd/" + std::to_string(descriptor);
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = descriptor_ >= 0;
  }
  if (descriptor_ < 0) descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) fail();
  const auto wanted = std::min<int64_t>({threads, ahead, count_});
  for (int64_t i = 0; i < wanted; i++) threads_.emplace_back(&ShardReader::work, this);
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

Block ShardReader::next() {
  std::unique_lock lock(mutex_);
  if (next_given_ == count_) return {};
  changed_.wait(lock, [&] { return ready_.contains(next_given_); });
  if (const auto error = ready_[next_given_].error) std::rethrow_exception(error);  // and it stays
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

Block ShardReader::fill(int64_t index) const {
  const auto begin = begin_ + index * block_bytes_;
  const auto bytes = std::min(block_bytes_, end_ - begin);
  return ring_ ? read(begin, bytes) : map(begin, bytes);
}

void ShardReader::check_length() const {
  struct stat state;
  if (fstat(descriptor_, &state) != 0) fail();
  if (state.st_size < end_) throw std::length_error("the file ends before it should");
}

Block ShardReader::map(int64_t begin, int64_t bytes) const {
  check_length();  // touching a page that is gone would be a SIGBUS
  const auto low = down(begin, kHuge);
  const auto length = static_cast<size_t>(begin + bytes - low);
  void* window = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor_, low);
  if (window == MAP_FAILED) fail();
  std::shared_ptr<std::byte> memory(static_cast<std::byte*>(window),
                                    [length](std::byte* used) { munmap(used, length); });
  const auto first = down(begin - low, kPage);
  if (madvise(memory.get() + first, length - first, MADV_POPULATE_READ) != 0 && errno != EINVAL) {
    if (errno == EFAULT) check_length();
    fail();
  }
  return {memory, memory.get() + (begin - low), bytes};
}

Block ShardReader::read(int64_t begin, int64_t bytes) const {
  auto memory = ring_->take();
  const auto low = direct_ ? down(begin, kPage) : begin;
  const auto wanted = begin + bytes - low;
  const auto length = direct_ ? up(wanted, kPage) : wanted;
  for (int64_t done = 0; done < wanted;) {
    const auto got = pread(descriptor_, memory.get() + done, length - done, low + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail();
    if (got == 0) throw std::length_error("the file ends before it should");
    done += got;
    // (O_DIRECT goes on from a page: what came beyond the last whole one is read again.)
    if (direct_ && done < wanted) done = down(done, kPage);
    if (direct_ && done < wanted && got < kPage) check_length();
  }
  return {memory, memory.get() + (begin - low), bytes};
}

void start_writing(int descriptor, int64_t begin, int64_t bytes) {
  // (Only advice: where the file system has no such thing, the sync at the end does it all.)
  sync_file_range(descriptor, begin, bytes, SYNC_FILE_RANGE_WRITE);
}

}  // namespace realign_fast::io
