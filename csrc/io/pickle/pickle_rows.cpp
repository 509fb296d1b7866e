#include "io/pickle/pickle_rows.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "io/pickle/pickle_values.h"

namespace realign_fast::io {
namespace {

constexpr int64_t kWindowBytes = 128 << 10;
constexpr int64_t kBufferBytes = 256 << 10;
constexpr uint8_t kFrame = 0x95;  // an opcode that is followed by 8 bytes

// Appends to a file through a buffer.
class BufferedWriter {
 public:
  explicit BufferedWriter(int descriptor) : descriptor_(descriptor) {
    buffer_.reserve(kBufferBytes);
  }

  void put(const std::byte* data, int64_t bytes) {
    if (std::ssize(buffer_) + bytes > kBufferBytes) flush();
    if (bytes > kBufferBytes) return write(data, bytes);
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
      const auto written = ::write(descriptor_, data, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw_errno();
      data += written, bytes -= written;
    }
  }

  int descriptor_;
  std::vector<std::byte> buffer_;
};

// Iterates over the offsets of the numbers of a list, each of which follows its opcode.
class Reals {
 public:
  Reals(Window& window, int64_t begin) : window_(window), at_(begin) {}

  // Returns the offset of the next number. The opcodes before it push no value: find_rows has
  // checked them.
  int64_t next() {
    for (;;) {
      const auto code = window_.byte(at_);
      if (code == 'G') break;
      if (!is_between_reals(code))
        throw NotPlain("the file has changed since its rows were located");
      at_ += code == kFrame ? 9 : 1;
    }
    at_ += 9;
    return at_ - 8;
  }
  // Returns the offset after `count` more numbers.
  int64_t skip(int64_t count) {
    while (count-- > 0) next();
    return at_;
  }

 private:
  Window& window_;
  int64_t at_;
};

// Converts a number between the big-endian order of the file and that of memory.
uint64_t swap_bytes(const std::byte* number) {
  uint64_t bits;
  std::memcpy(&bits, number, sizeof bits);
  return __builtin_bswap64(bits);
}

void read_reals(Window& window, int64_t begin, int64_t count, std::byte* out) {
  Reals reals(window, begin);
  for (; count > 0; count--, out += 8) {
    std::array<std::byte, 8> number;
    window.copy(reals.next(), 8, number.data());
    const auto bits = swap_bytes(number.data());
    std::memcpy(out, &bits, sizeof bits);
  }
}

// Writes other numbers in place of those of a list, with the opcodes between them, and returns the
// offset after the last one.
int64_t write_reals(Window& window, int64_t begin, int64_t count, const std::byte* numbers,
                    BufferedWriter& writer) {
  Reals reals(window, begin);
  for (; count > 0; count--, numbers += 8) {
    const auto offset = reals.next();
    writer.copy(window, begin, offset);
    const auto bits = swap_bytes(numbers);
    writer.put(reinterpret_cast<const std::byte*>(&bits), sizeof bits);
    begin = offset + 8;
  }
  return begin;
}

}  // namespace

PickledRows::PickledRows(int descriptor, int64_t bytes, const std::vector<std::string>& names,
                         int64_t most_steps)
    : bytes_(bytes) {
  if (names.empty() || names.size() > kNames) {
    throw std::invalid_argument("PickledRows: expected one or two keys, got " +
                                std::to_string(names.size()));
  }
  Window window(descriptor, 0, bytes, kWindowBytes);
  list_ = find_rows(window, names, most_steps);
}

int64_t PickledRows::end_of(int64_t row, Window& window) const {
  const int64_t begin = list_.rows[row];
  return list_.lists ? Reals(window, begin).skip(list_.columns) : begin + row_bytes();
}

void PickledRows::check(int64_t first, int64_t rows) const {
  if (first < 0 || rows < 0 || rows > this->rows() || first > this->rows() - rows) {
    throw std::out_of_range("PickledRows: the list has " + std::to_string(this->rows()) +
                            " rows, asked for " + std::to_string(rows) + " from row " +
                            std::to_string(first));
  }
}

void PickledRows::read(int descriptor, int64_t first, int64_t rows, std::byte* out) const {
  check(first, rows);
  Window window(descriptor, 0, bytes_, kWindowBytes);
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
  Window window(descriptor, 0, bytes_, kWindowBytes);
  BufferedWriter writer(target);
  auto copied_to = first ? end_of(first - 1, window) : 0;
  for (auto row = first; row < first + rows; row++, numbers += row_bytes()) {
    const int64_t begin = list_.rows[row];
    writer.copy(window, copied_to, begin);
    if (list_.lists) {
      copied_to = write_reals(window, begin, list_.columns, numbers, writer);
    } else {
      writer.put(numbers, row_bytes());
      copied_to = begin + row_bytes();
    }
  }
  if (rows == 0) writer.copy(window, copied_to, bytes_);
  writer.flush();
}

}  // namespace realign_fast::io
