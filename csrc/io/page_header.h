// What a parquet file says before each page of a column chunk: Thrift's compact protocol, read
// through a small window of the file. Every length is checked against the chunk before it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace realign_fast::io {

// A page of another kind than we read, or a damaged one: the words say which.
struct NotPlain : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The bytes begin..end of a file, through one small buffer; long stretches go past it.
class Window {
 public:
  // Keeps a descriptor of its own. Its methods throw NotPlain where bytes are asked for that are
  // not between begin and end or not in the file, std::system_error where reading fails.
  Window(int descriptor, int64_t begin, int64_t end);
  ~Window();
  Window(const Window&) = delete;

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  uint8_t byte(int64_t offset) {
    if (offset < low_ || offset >= high_) fill(offset);
    return buffer_[offset - low_];
  }
  void copy(int64_t offset, int64_t bytes, std::byte* out);

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

// A place in a window that moves on and never beyond `end`.
struct Cursor {
  Window& window;
  int64_t at, end;

  uint8_t next() {
    if (at >= end) throw NotPlain("a page ends too early");
    return window.byte(at++);
  }
  uint64_t varint();
  void skip(uint64_t bytes);
};

enum class PageType { data = 0, index = 1, dictionary = 2, data_v2 = 3 };
enum class Encoding { plain = 0, rle = 3 };

// PageHeader of parquet.thrift, with the fields of its DataPageHeader or DataPageHeaderV2.
// -1: the file does not say.
struct PageHeader {
  int64_t type = -1, uncompressed_bytes = -1, bytes = -1;
  bool has_checksum = false, has_data = false, has_data_v2 = false;
  int64_t values = -1, encoding = -1;
  int64_t definition_encoding = -1, repetition_encoding = -1;                   // of v1
  int64_t nulls = -1, rows = -1, definition_bytes = -1, repetition_bytes = -1;  // of v2
};

// Leaves the cursor at the first byte behind the header.
PageHeader read_page_header(Cursor& cursor);

}  // namespace realign_fast::io
