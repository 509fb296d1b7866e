#include "io/pickle/pickle_rows.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "io/pickle/pickle_values.h"

namespace realign_fast::io {
namespace {

constexpr int64_t kWindow = 128 << 10;
constexpr int64_t kBuffer = 256 << 10;
constexpr uint8_t kFrame = 0x95;  // an opcode with 8 bytes behind it

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

// The places of the numbers of a list, one after the other, each behind its opcode.
class Reals {
 public:
  Reals(Window& window, int64_t begin) : window_(window), at_(begin) {}

  // The place of the next one. What lies before it builds nothing: the machine has seen it.
  int64_t next() {
    for (;;) {
      const auto code = window_.byte(at_);
      if (code == 'G') break;
      if (!is_between_reals(code)) throw NotPlain("it has changed");
      at_ += code == kFrame ? 9 : 1;
    }
    at_ += 9;
    return at_ - 8;
  }
  int64_t skip(int64_t count) {  // to behind so many
    while (count-- > 0) next();
    return at_;
  }

 private:
  Window& window_;
  int64_t at_;
};

// Big-endian, as it is in the file, or in memory: each makes the other.
uint64_t turned(const std::byte* number) {
  uint64_t bits;
  std::memcpy(&bits, number, sizeof bits);
  return __builtin_bswap64(bits);
}

void read_reals(Window& window, int64_t begin, int64_t count, std::byte* out) {
  Reals reals(window, begin);
  for (; count > 0; count--, out += 8) {
    std::array<std::byte, 8> number;
    window.copy(reals.next(), 8, number.data());
    const auto bits = turned(number.data());
    std::memcpy(out, &bits, sizeof bits);
  }
}

// Other numbers in their places, with what lies between them; returns where the last one ends.
int64_t write_reals(Window& window, int64_t begin, int64_t count, const std::byte* numbers,
                    Sink& sink) {
  Reals reals(window, begin);
  for (; count > 0; count--, numbers += 8) {
    const auto place = reals.next();
    sink.copy(window, begin, place);
    const auto bits = turned(numbers);
    sink.put(reinterpret_cast<const std::byte*>(&bits), sizeof bits);
    begin = place + 8;
  }
  return begin;
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

int64_t PickledRows::end_of(int64_t row, Window& window) const {
  const int64_t begin = list_.rows[row];
  return list_.lists ? Reals(window, begin).skip(list_.columns) : begin + row_bytes();
}

void PickledRows::check(int64_t first, int64_t rows) const {
  if (first < 0 || rows < 0 || rows > this->rows() || first > this->rows() - rows) {
    throw std::out_of_range("PickledRows: the list has " + std::to_string(this->rows()) + " rows");
  }
}

void PickledRows::read(int descriptor, int64_t first, int64_t rows, std::byte* out) const {
  check(first, rows);
  Window window(descriptor, 0, bytes_, kWindow);
  for (auto row = first; row < first + rows; row++, out += row_bytes()) {
    if (list_.lists) {
      read_reals(window, list_.rows[row], list_.columns, out);
    } else {
      window.copy(list_.rows[row], row_bytes(), out);
    }
  }
}

void PickledRows::write(int descriptor, int64_t first, int64_t rows, const std::byte* numbers,
                        int target) const {
  check(first, rows);
  if (!list_.replaceable) throw NotPlain("its rows share their bytes with other values");
  Window window(descriptor, 0, bytes_, kWindow);
  Sink sink(target);
  auto done = first ? end_of(first - 1, window) : 0;
  for (auto row = first; row < first + rows; row++, numbers += row_bytes()) {
    const int64_t begin = list_.rows[row];
    sink.copy(window, done, begin);
    if (list_.lists) {
      done = write_reals(window, begin, list_.columns, numbers, sink);
    } else {
      sink.put(numbers, row_bytes());
      done = begin + row_bytes();
    }
  }
  if (rows == 0) sink.copy(window, done, bytes_);
  sink.flush();
}

}  // namespace realign_fast::io
