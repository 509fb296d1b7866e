// A pickled list of dicts whose rows can be copied out of its file.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "io/pickle/pickle_values.h"

namespace realign_fast::io {

// A list of dicts, each with a row of the same number of values of one type.
struct PickledList {
  std::vector<uint32_t> rows;  // the offset of the numbers of each
  int name = 0;                // the index of the requested key that holds them
  int64_t columns = 0;
  int value_bytes =
      0;  // of a little-endian float; 8 in lists, where floats are big-endian after a 'G'
  bool lists = false;        // rows are lists of floats, not arrays
  bool has_others = false;   // dicts have other keys
  bool replaceable = false;  // rows are in order and share their bytes with no other value
};

// Returns the value as such a list, or nothing if it is not a list of dicts with rows of one type
// and length. `values` must know which values occur more than once.
std::optional<PickledList> list_of(Values& values, Value root);

}  // namespace realign_fast::io
