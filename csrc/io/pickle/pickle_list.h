// A pickled list of dicts whose rows can be copied out of its file.
#pragma once

#include <cstdint>
#include <vector>

#include "io/pickle/pickle_values.h"

namespace realign_fast::io {

// A list of dicts, each with a row of as many numbers of one type.
struct PickledList {
  std::vector<uint32_t> rows;  // where the numbers of each begin
  int name = 0;                // which of the asked-for keys holds them
  int64_t columns = 0;
  int value_bytes = 0;       // of a little-endian float; in lists 8, big-endian and behind a 'G'
  bool lists = false;        // lists of floats, not arrays
  bool has_others = false;   // there are other keys
  bool replaceable = false;  // rows lie in order, and no other value is made of their bytes
};

// What a value is as such a list. `values` knows what stands in several places. NotPlain says what
// is missing: a list of dicts with rows of one kind and length.
PickledList list_of(Values& values, Value root);

}  // namespace realign_fast::io
