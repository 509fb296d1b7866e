// What a parquet file says before each page of a column chunk: Thrift's compact protocol, read
// through a small window of the file. Every length is checked against the chunk before it is used.
#pragma once

#include <cstdint>

#include "io/window.h"

namespace realign_fast::io {

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
