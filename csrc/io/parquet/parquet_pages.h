// Copies rows from the data pages of one Parquet column chunk whose numbers are stored without
// encoding or compression. No Python, no torch, no Arrow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "io/parquet/page_header.h"

namespace realign_fast::io {

// A chunk of rows that all hold `row_values` values, as the footer of the file describes it.
// Dremel's levels say where rows begin and which values are null; `max_...` are the levels of a
// value that is present. A list has max_repetition 1, a fixed-size binary with one value per row
// has 0.
struct ColumnChunk {
  int64_t begin, end;  // bytes of the file
  int64_t rows, row_values, value_bytes;
  int max_definition, max_repetition;
};

// Reads uncompressed PLAIN pages, versions 1 and 2, without nulls and with rows of one length. It
// throws NotPlain for anything else, damaged pages included, and std::system_error if reading
// fails. Because all rows have the same number of values, the headers of the pages before a row are
// enough to find it.
class ParquetPages {
 public:
  ParquetPages(int descriptor, const ColumnChunk& chunk);

  int64_t row_bytes() const { return chunk_.row_values * chunk_.value_bytes; }
  // Copies rows row..row+rows to `out`. Reading forward is cheap; reading backward starts again at
  // the first page.
  void read(int64_t row, int64_t rows, std::byte* out);
  // Checks the headers and levels of all pages without reading their values.
  void check();

 private:
  struct Page {
    int64_t first = 0, values = 0;          // its first value in the chunk, and their number
    int64_t levels = 0, data = 0, end = 0;  // their offsets in the file
    int64_t definition_bytes = -1, repetition_bytes = -1;  // -1 if version 1
    bool checked = false;
  };
  void restart() { page_ = Page{.end = chunk_.begin}; }
  void next_page();
  void check_levels();
  Cursor levels_of(int64_t& at, int64_t bytes);

  std::mutex mutex_;
  ColumnChunk chunk_;
  Window window_;
  Page page_;
};

}  // namespace realign_fast::io
