// The rows of a pickled list, copied out of its file and into a copy of it. No Python, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/pickle/pickle_interpreter.h"

namespace realign_fast::io {

// Knows where the rows lie, 4 bytes a row, and keeps no file open: give each call a descriptor of
// the file that was looked through. Throws NotPlain where it has become shorter, std::system_error
// where reading or writing fails. Several threads may use it at once.
class PickledRows {
 public:
  PickledRows(int descriptor, int64_t bytes, const std::vector<std::string>& names,
              int64_t most_steps);

  const PickledList& list() const { return list_; }
  int64_t rows() const { return static_cast<int64_t>(list_.rows.size()); }
  int64_t row_bytes() const { return list_.columns * list_.value_bytes; }

  // Rows first..first+rows as little-endian floats into `out`.
  void read(int descriptor, int64_t first, int64_t rows, std::byte* out) const;
  // Appends to `target` what the file has behind row first-1 and up to the last of `rows` rows,
  // with their numbers in place of its own; no rows: what is behind the last one.
  void write(int descriptor, int64_t first, int64_t rows, const std::byte* numbers,
             int target) const;

 private:
  int64_t end_of(int64_t row, Window& window) const;  // behind its last number
  void check(int64_t first, int64_t rows) const;

  int64_t bytes_;
  PickledList list_;
};

}  // namespace realign_fast::io
