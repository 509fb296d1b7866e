#include "io/window.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace realign_fast::io {
namespace {

constexpr int64_t kReadAhead = 16 << 20;  // bytes that the kernel is asked to read ahead

}  // namespace

Window::Window(int descriptor, int64_t begin, int64_t end, int64_t buffer_bytes)
    : begin_(begin), end_(end), buffer_(buffer_bytes) {
  if (begin < 0 || end < begin) throw NotPlain("its byte range is not valid");
  descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) throw_errno();
}

Window::~Window() {
  if (descriptor_ >= 0) close(descriptor_);
}

void Window::copy(int64_t offset, int64_t bytes, std::byte* out) {
  while (bytes > 0) {
    int64_t copied = 0;
    if (offset >= low_ && offset < high_) {
      copied = std::min(bytes, high_ - offset);
      std::memcpy(out, buffer_.data() + (offset - low_), copied);
    } else if (bytes >= std::ssize(buffer_)) {
      copied = read(offset, bytes, out);
    } else {
      fill(offset);
    }
    offset += copied, out += copied, bytes -= copied;
  }
}

std::span<const uint8_t> Window::view(int64_t offset) {
  byte(offset);
  return std::span<const uint8_t>(buffer_).subspan(offset - low_, high_ - offset);
}

void Window::fill(int64_t offset) {
  low_ = high_ = offset;  // the buffer is empty if reading fails
  high_ += read(offset, std::min<int64_t>(std::ssize(buffer_), end_ - offset), buffer_.data());
}

int64_t Window::read(int64_t offset, int64_t bytes, void* out) {
  if (offset < begin_ || bytes <= 0 || bytes > end_ - offset) {
    throw NotPlain("it ends beyond the end of the file or of its range");
  }
  if (descriptor_ < 0) {
    std::memcpy(out, memory_.data() + offset, bytes);
    return bytes;
  }
  if (offset >= next_ && offset - next_ < std::ssize(buffer_)) request_read_ahead(offset, bytes);
  for (;;) {
    const auto bytes_read = pread(descriptor_, out, bytes, offset);
    if (bytes_read < 0 && errno == EINTR) continue;
    if (bytes_read < 0) throw_errno();
    if (bytes_read == 0) throw NotPlain("the file has become shorter");
    next_ = offset + bytes_read;
    return bytes_read;
  }
}

// Asks the kernel to read ahead of a sequential reader, unless the file is cached already: the
// request costs time even then.
void Window::request_read_ahead(int64_t offset, int64_t bytes) {
  const auto needed_end = offset + bytes + kReadAhead / 2;
  if (needed_end <= requested_ || requested_ >= end_) return;
  const auto first = std::max(requested_, offset);
  requested_ = std::min(needed_end + kReadAhead / 2, end_);
  uint8_t last = 0;
  const iovec target = {&last, 1};
  if (preadv2(descriptor_, &target, 1, requested_ - 1, RWF_NOWAIT) == 1) return;
  posix_fadvise(descriptor_, first, requested_ - first, POSIX_FADV_WILLNEED);
}

}  // namespace realign_fast::io
