#include "pickled_rows.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "pickle_values.h"

namespace realign_fast::io {
namespace {

constexpr int64_t kWindow = 128 << 10;
constexpr int64_t kBuffer = 256 << 10;

// A file that is appended to, through a buffer.
class Sink {
 public:
  explicit Sink(int descriptor) : descriptor_(descriptor) { buffer_.reserve(kBuffer); }

  void put(const std::byte* data, int64_t bytes) {
    if (std::ssize(buffer_) + bytes > kBuffer) flush();
    if (bytes > kBuffer) return write(data, bytes);
    buffer_.insert(buffer_.end(), data, data + bytes);
  }
  void copy(Window& window, int64_t begin, int64_t end) {
    while (begin < end) {
      const auto piece = window.view(begin);
      const auto bytes = std::min<int64_t>(std::ssize(piece), end - begin);
      put(reinterpret_cast<const std::byte*>(piece.data()), bytes);
      begin += bytes;
    }
  }
  void flush() {
    write(buffer_.data(), std::ssize(buffer_));
    buffer_.clear();
  }

 private:
  void write(const std::byte* data, int64_t bytes) const {
    while (bytes > 0) {
      const auto done = ::write(descriptor_, data, bytes);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) throw std::system_error(errno, std::generic_category());
      data += done, bytes -= done;
    }
  }

  int descriptor_;
  std::vector<std::byte> buffer_;
};

// Between the numbers of a list in the file, big-endian and behind a 'G' each, and in memory.
uint64_t turned(const std::byte* number) {
  uint64_t bits;
  std::memcpy(&bits, number, sizeof bits);
  return __builtin_bswap64(bits);
}

}  // namespace

PickledRows::PickledRows(int descriptor, int64_t bytes, const std::vector<std::string>& names,
                         int64_t most_steps)
    : bytes_(bytes) {
  if (names.empty() || names.size() > kNames) {
    throw std::invalid_argument("PickledRows: expected one or two keys to look for");
  }
  Window window(descriptor, 0, bytes, kWindow);
  list_ = find_rows(window, names, most_steps);
}

int64_t PickledRows::span() const {
  return list_.lists ? real_offset(list_.columns - 1) + 9 : row_bytes();
}

void PickledRows::check(int64_t first, int64_t rows) const {
  if (first < 0 || rows < 0 || rows > this->rows() || first > this->rows() - rows) {
    throw std::out_of_range("PickledRows: the list has " + std::to_string(this->rows()) + " rows");
  }
}

void PickledRows::read(int descriptor, int64_t first, int64_t rows, std::byte* out) const {
  check(first, rows);
  Window window(descriptor, 0, bytes_, kWindow);
  std::vector<std::byte> reals(list_.lists ? span() : 0);
  for (auto row = first; row < first + rows; row++, out += row_bytes()) {
    if (!list_.lists) {
      window.copy(list_.rows[row], span(), out);
      continue;
    }
    window.copy(list_.rows[row], span(), reals.data());
    for (int64_t i = 0; i < list_.columns; i++) {
      const auto bits = turned(reals.data() + real_offset(i) + 1);
      std::memcpy(out + 8 * i, &bits, sizeof bits);
    }
  }
}

void PickledRows::write(int descriptor, int64_t first, int64_t rows, const std::byte* numbers,
                        int target) const {
  check(first, rows);
  if (!list_.replaceable) throw NotPlain("its rows are not its own bytes");
  Window window(descriptor, 0, bytes_, kWindow);
  Sink sink(target);
  std::vector<std::byte> reals(list_.lists ? span() : 0);
  auto done = first ? list_.rows[first - 1] + span() : 0;
  for (auto row = first; row < first + rows; row++, numbers += row_bytes()) {
    sink.copy(window, done, list_.rows[row]);
    done = list_.rows[row] + span();
    if (!list_.lists) {
      sink.put(numbers, span());
      continue;
    }
    window.copy(list_.rows[row], span(), reals.data());
    for (int64_t i = 0; i < list_.columns; i++) {
      const auto bits = turned(numbers + 8 * i);
      std::memcpy(reals.data() + real_offset(i) + 1, &bits, sizeof bits);
    }
    sink.put(reals.data(), span());
  }
  if (rows == 0) sink.copy(window, done, bytes_);
  sink.flush();
}

}  // namespace realign_fast::io
