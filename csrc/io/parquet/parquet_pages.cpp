#include "io/parquet/parquet_pages.h"

#include <algorithm>
#include <string>

namespace realign_fast::io {
namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 56;  // so that sums of a few sizes do not overflow

bool is(int64_t number, Encoding encoding) { return number == static_cast<int64_t>(encoding); }

// The sequence of levels of rows that all have one length.
struct Levels {
  int width;       // bits of a level
  int all;         // for definition levels: the value of each of them
  int64_t row;     // for repetition levels: the values of a row, whose first has level 0; else 0
  int64_t column;  // the column of the next value

  // Whether the next `count` levels are all equal to `level`.
  bool are(uint64_t count, int level) const {
    if (row == 0) return level == all;
    if (level == 0) return column == 0 && (count == 1 || row == 1);
    return level == 1 && column > 0 && count <= static_cast<uint64_t>(row - column);
  }
  // The next levels, packed into a byte.
  int packed() const {
    if (row == 0) return all * (width == 1 ? 0xFF : 0x55);
    int byte = 0xFF;
    for (int64_t bit = column ? row - column : 0; bit < 8; bit += row) byte &= ~(1 << bit);
    return byte;
  }
  void advance(int64_t count) {
    column += row ? count : 0;
    if (column >= row && row) column %= row;
  }
};

[[noreturn]] void throw_not_full() {
  throw NotPlain("rows are null, contain nulls or do not all have one length");
}

// Compares `count` levels, in Parquet's hybrid of runs and bit-packed groups of 8, with `levels`.
void compare(Cursor cursor, int64_t count, Levels levels) {
  while (count > 0) {
    const auto head = cursor.varint();
    if (head & 1) {
      auto bytes = std::min<uint64_t>(head >> 1, kMaxBytes) * levels.width;
      for (; bytes > 0 && count > 0; bytes--) {
        const auto step = std::min<int64_t>(count, 8 / levels.width);
        const int mask = (1 << (step * levels.width)) - 1;
        if ((cursor.next() ^ levels.packed()) & mask) throw_not_full();
        levels.advance(step);
        count -= step;
      }
    } else {
      const auto step = std::min<uint64_t>(head >> 1, count);
      const auto level = cursor.next();
      if (step && !levels.are(step, level)) throw_not_full();
      levels.advance(static_cast<int64_t>(step));
      count -= static_cast<int64_t>(step);
    }
  }
}

}  // namespace

ParquetPages::ParquetPages(int descriptor, const ColumnChunk& chunk)
    : chunk_(chunk), window_(descriptor, chunk.begin, chunk.end) {
  const bool sizes = chunk.rows >= 0 && chunk.row_values > 0 && chunk.value_bytes > 0;
  if (!sizes || chunk.row_values > kMaxBytes / chunk.value_bytes ||
      chunk.rows > kMaxBytes / (chunk.row_values * chunk.value_bytes)) {
    throw std::invalid_argument(
        "ParquetPages: expected rows >= 0, row_values >= 1 and value_bytes >= 1, and fewer than "
        "2^56 "
        "bytes in all");
  }
  if (chunk.max_repetition < 0 || chunk.max_repetition > 1 || chunk.max_definition < 0 ||
      chunk.max_definition > 3) {
    throw NotPlain("its column is nested more deeply than a list of numbers");
  }
  restart();
}

void ParquetPages::read(int64_t row, int64_t rows, std::byte* out) {
  std::lock_guard lock(mutex_);
  if (row < 0 || rows < 0 || rows > chunk_.rows || row > chunk_.rows - rows) {
    throw std::out_of_range("ParquetPages: the chunk has " + std::to_string(chunk_.rows) +
                            " rows, asked for " + std::to_string(rows) + " from row " +
                            std::to_string(row));
  }
  auto value = row * chunk_.row_values;
  const auto end = value + rows * chunk_.row_values;
  if (value < page_.first) restart();
  while (value < end) {
    if (value >= page_.first + page_.values) {
      next_page();
      continue;
    }
    if (!page_.checked) check_levels();
    const auto count = std::min(end, page_.first + page_.values) - value;
    const auto bytes = count * chunk_.value_bytes;
    window_.copy(page_.data + (value - page_.first) * chunk_.value_bytes, bytes, out);
    value += count, out += bytes;
  }
}

void ParquetPages::check() {
  std::lock_guard lock(mutex_);
  restart();
  while (page_.first + page_.values < chunk_.rows * chunk_.row_values) {
    next_page();
    check_levels();
  }
}

// Reads the header of the next page, but not its values.
void ParquetPages::next_page() {
  Cursor cursor{window_, page_.end, chunk_.end};
  const auto head = read_page_header(cursor);
  const auto first = page_.first + page_.values;
  const bool v2 = head.type == static_cast<int64_t>(PageType::data_v2) && head.has_data_v2;
  if (!v2 && !(head.type == static_cast<int64_t>(PageType::data) && head.has_data)) {
    throw NotPlain("it has pages other than data pages");
  }
  if (head.has_data && head.has_data_v2) throw NotPlain("a page header is of two versions");
  if (!is(head.encoding, Encoding::plain)) throw NotPlain("a page is not encoded PLAIN");
  if (head.has_checksum) throw NotPlain("a page has a checksum, which pyarrow compares");
  if (head.bytes < 0 || head.bytes != head.uncompressed_bytes) {
    throw NotPlain("a page is compressed");
  }
  if (head.bytes > chunk_.end - cursor.at) throw NotPlain("a page ends beyond its column chunk");
  if (head.values < 0 || head.values > chunk_.rows * chunk_.row_values - first ||
      head.values > head.bytes / chunk_.value_bytes) {
    throw NotPlain("a page has nulls, or more or fewer values than the rows of its chunk");
  }
  if (v2 && (head.nulls != 0 || head.values % chunk_.row_values != 0 ||
             head.rows != head.values / chunk_.row_values || head.repetition_bytes < 0 ||
             head.definition_bytes < 0)) {
    throw_not_full();
  }
  if (!v2 && ((chunk_.max_repetition && !is(head.repetition_encoding, Encoding::rle)) ||
              (chunk_.max_definition && !is(head.definition_encoding, Encoding::rle)))) {
    throw NotPlain("its levels are not encoded RLE");
  }
  const auto end = cursor.at + head.bytes;
  page_ = {first, head.values, cursor.at, end - head.values * chunk_.value_bytes, end, -1, -1};
  if (v2) {
    page_.definition_bytes = head.definition_bytes, page_.repetition_bytes = head.repetition_bytes;
  }
}

// Checks that the page has no nulls and that its rows begin at every row_values-th value.
void ParquetPages::check_levels() {
  auto at = page_.levels;
  if (chunk_.max_repetition || page_.repetition_bytes > 0) {
    const auto levels = levels_of(at, page_.repetition_bytes);
    const Levels expected{1, 0, chunk_.row_values, page_.first % chunk_.row_values};
    if (chunk_.max_repetition) compare(levels, page_.values, expected);
  }
  if (chunk_.max_definition || page_.definition_bytes > 0) {
    const auto levels = levels_of(at, page_.definition_bytes);
    const Levels expected{chunk_.max_definition > 1 ? 2 : 1, chunk_.max_definition, 0, 0};
    if (chunk_.max_definition) compare(levels, page_.values, expected);
  }
  if (at != page_.data) throw NotPlain("a page has more or fewer bytes than its values");
  page_.checked = true;
}

// Returns the range of levels that begins at `at`, and moves `at` to its end.
Cursor ParquetPages::levels_of(int64_t& at, int64_t bytes) {
  if (bytes < 0) {
    Cursor prefix{window_, at, page_.data};
    bytes = 0;
    for (int shift = 0; shift < 32; shift += 8) bytes |= int64_t{prefix.next()} << shift;
    at = prefix.at;
  }
  if (bytes > page_.data - at) throw NotPlain("the levels of a page end beyond it");
  const auto begin = at;
  at += bytes;
  return {window_, begin, at};
}

}  // namespace realign_fast::io
