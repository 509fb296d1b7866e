// Rows out of the data pages of one parquet column chunk, if their numbers lie there as they are.
// No Python, no torch, no Arrow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "io/parquet/page_header.h"

namespace realign_fast::io {

// A chunk of rows that all hold `row_values` values, as the footer of the file describes it.
// Levels (Dremel's) say where rows begin and what is null; `max_...` are those of a value that is
// there. A list has max_repetition 1, a fixed-size binary of one value a row has 0.
struct ColumnChunk {
  int64_t begin, end;  // bytes of the file
  int64_t rows, row_values, value_bytes;
  int max_definition, max_repetition;
};

// Reads uncompressed PLAIN pages, v1 and v2, whose rows are all there and of one length. Anything
// else, a damaged page too, throws NotPlain, and std::system_error where reading fails. As every
// row has as many values, a row is found from the heads of the pages before it alone.
class ParquetPages {
 public:
  ParquetPages(int descriptor, const ColumnChunk& chunk);

  int64_t row_bytes() const { return chunk_.row_values * chunk_.value_bytes; }
  // Rows row..row+rows into `out`. Reading onwards is cheap; going back begins with the first page.
  void read(int64_t row, int64_t rows, std::byte* out);
  // The heads and levels of all pages, without their values.
  void check();

 private:
  struct Page {
    int64_t first = 0, values = 0;          // place of its first value in the chunk; how many
    int64_t levels = 0, data = 0, end = 0;  // where they begin in the file
    int64_t definition_bytes = -1, repetition_bytes = -1;  // -1: written before them (v1)
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
