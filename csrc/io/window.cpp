#include "io/window.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace realign_fast::io {
namespace {

constexpr int64_t kAhead = 16 << 20;  // what the kernel is asked to read ahead

[[noreturn]] void fail() { throw std::system_error(errno, std::generic_category()); }

}  // namespace

Window::Window(int descriptor, int64_t begin, int64_t end, int64_t buffer_bytes)
    : begin_(begin), end_(end), buffer_(buffer_bytes) {
  if (begin < 0 || end < begin) throw NotPlain("it lies nowhere in the file");
  descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) fail();
}

Window::~Window() { close(descriptor_); }

void Window::copy(int64_t offset, int64_t bytes, std::byte* out) {
  while (bytes > 0) {
    int64_t got = 0;
    if (offset >= low_ && offset < high_) {
      got = std::min(bytes, high_ - offset);
      std::memcpy(out, buffer_.data() + (offset - low_), got);
    } else if (bytes >= std::ssize(buffer_)) {
      got = read(offset, bytes, out);
    } else {
      fill(offset);
    }
    offset += got, out += got, bytes -= got;
  }
}

std::span<const uint8_t> Window::view(int64_t offset) {
  byte(offset);
  return std::span<const uint8_t>(buffer_).subspan(offset - low_, high_ - offset);
}

void Window::fill(int64_t offset) {
  low_ = high_ = offset;  // (empty, should reading fail)
  high_ += read(offset, std::min<int64_t>(std::ssize(buffer_), end_ - offset), buffer_.data());
}

int64_t Window::read(int64_t offset, int64_t bytes, void* out) {
  if (offset < begin_ || bytes <= 0 || bytes > end_ - offset) {
    throw NotPlain("it ends beyond the bytes that are there");
  }
  if (offset >= next_ && offset - next_ < std::ssize(buffer_)) announce(offset, bytes);
  for (;;) {
    const auto got = pread(descriptor_, out, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail();
    if (got == 0) throw NotPlain("the file has become shorter");
    next_ = offset + got;
    return got;
  }
}

// Who reads on and on is read ahead for, unless the file is cached: asking has its price.
void Window::announce(int64_t offset, int64_t bytes) {
  const auto wanted = offset + bytes + kAhead / 2;
  if (wanted <= announced_ || announced_ >= end_) return;
  const auto begin = std::max(announced_, offset);
  announced_ = std::min(wanted + kAhead / 2, end_);
  uint8_t last = 0;
  const iovec place = {&last, 1};
  if (preadv2(descriptor_, &place, 1, announced_ - 1, RWF_NOWAIT) == 1) return;
  posix_fadvise(descriptor_, begin, announced_ - begin, POSIX_FADV_WILLNEED);
}

}  // namespace realign_fast::io
