// A small buffer through which a file is inspected.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "io/errors.h"

namespace realign_fast::io {

// The bytes begin..end of a file, or all of a piece of memory, read through one small buffer. Long
// ranges bypass the buffer.
class Window {
 public:
  static constexpr int64_t kSmallBuffer = 16 << 10;  // enough for the head of most Parquet pages
  // Duplicates the descriptor. The methods throw NotPlain if the requested bytes are not between
  // begin and end or not in the file, and std::system_error if reading fails.
  Window(int descriptor, int64_t begin, int64_t end, int64_t buffer_bytes = kSmallBuffer);
  // Reads memory, which must live as long as the window.
  explicit Window(std::span<const uint8_t> memory, int64_t buffer_bytes = kSmallBuffer)
      : descriptor_(-1),
        begin_(0),
        end_(std::ssize(memory)),
        memory_(memory),
        buffer_(buffer_bytes) {}
  ~Window();
  Window(const Window&) = delete;

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  uint8_t byte(int64_t offset) {
    if (offset < low_ || offset >= high_) fill(offset);
    return buffer_[offset - low_];
  }
  void copy(int64_t offset, int64_t bytes, std::byte* out);
  // Returns the bytes from `offset` on, at least one; they are valid until the next call.
  std::span<const uint8_t> view(int64_t offset);

 private:
  void fill(int64_t offset);
  int64_t read(int64_t offset, int64_t bytes, void* out);
  void request_read_ahead(int64_t offset, int64_t bytes);

  int descriptor_;
  int64_t begin_, end_;
  int64_t low_ = 0, high_ = 0;  // the range of the file that the buffer holds
  int64_t next_ = 0;            // the end of the last read
  int64_t requested_ = 0;       // the end of the range that the kernel was asked to read ahead
  std::span<const uint8_t> memory_;
  std::vector<uint8_t> buffer_;
};

}  // namespace realign_fast::io
