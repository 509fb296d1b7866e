// Copies the rows of a pickled list from its file, and writes copies of the file with other rows.
// No Python, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/pickle/pickle_interpreter.h"

namespace realign_fast::io {

// Holds the offsets of the rows, 4 bytes for each, and keeps no file open: every call takes a
// descriptor of the same file. The methods throw NotPlain if the file has become shorter and
// std::system_error if reading or writing fails. Several threads may use one object.
class PickledRows {
 public:
  PickledRows(int descriptor, int64_t bytes, const std::vector<std::string>& names,
              int64_t most_steps);

  const PickledList& list() const { return list_; }
  int64_t rows() const { return static_cast<int64_t>(list_.rows.size()); }
  int64_t row_bytes() const { return list_.columns * list_.value_bytes; }

  // Copies rows first..first+rows as little-endian floats to `out`.
  void read(int descriptor, int64_t first, int64_t rows, std::byte* out) const;
  // Appends to `target` the bytes of the file from the end of row first-1 to the end of the last of
  // `rows` rows, with `numbers` in place of their own. If `rows` is 0, appends the rest of the
  // file.
  void write(int descriptor, int64_t first, int64_t rows, const std::byte* numbers,
             int target) const;

 private:
  int64_t end_of(int64_t row, Window& window) const;  // the offset after its last number
  void check(int64_t first, int64_t rows) const;

  int64_t bytes_;
  PickledList list_;
};

}  // namespace realign_fast::io
