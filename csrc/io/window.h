// The bytes of a file, looked at here and there through one small buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace realign_fast::io {

// Data of another kind than we read, or damaged: the words say which.
struct NotPlain : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The bytes begin..end of a file, through one small buffer; long stretches go past it.
class Window {
 public:
  static constexpr int64_t kSmall = 16 << 10;  // of a buffer: the head of most parquet pages
  // Keeps a descriptor of its own. Its methods throw NotPlain where bytes are asked for that are
  // not between begin and end or not in the file, std::system_error where reading fails.
  Window(int descriptor, int64_t begin, int64_t end, int64_t buffer_bytes = kSmall);
  ~Window();
  Window(const Window&) = delete;

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  uint8_t byte(int64_t offset) {
    if (offset < low_ || offset >= high_) fill(offset);
    return buffer_[offset - low_];
  }
  void copy(int64_t offset, int64_t bytes, std::byte* out);
  // The bytes from `offset` on, one or more of them; they stay until the next call.
  std::span<const uint8_t> view(int64_t offset);

 private:
  void fill(int64_t offset);
  int64_t read(int64_t offset, int64_t bytes, void* out);
  void announce(int64_t offset, int64_t bytes);

  int descriptor_;
  int64_t begin_, end_;
  int64_t low_ = 0, high_ = 0;  // what the buffer holds of the file
  int64_t next_ = 0;            // where the last read ended
  int64_t announced_ = 0;       // up to here the kernel was asked to read ahead
  std::vector<uint8_t> buffer_;
};

}  // namespace realign_fast::io
