// Where the rows of a pickled list of dicts lie in its file: the twin of corpus/unpickle.py.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "window.h"

namespace realign_fast::io {

// A list of dicts, each with a row of as many numbers of one type.
struct PickledList {
  std::vector<uint32_t> rows;  // where the numbers of each begin
  int name = 0;                // which of the asked-for keys holds them
  int64_t columns = 0;
  int value_bytes = 0;  // of a little-endian float; 8 in lists, where it is big-endian, behind 'G'
  bool lists = false;   // lists of floats, not arrays
  bool has_others = false;  // there are other keys
  bool replaceable =
      false;  // rows lie in order, and nothing else in the list is made of their bytes
};

// Runs the pickle in `window`, which it reads once and in order. It knows the opcodes and globals
// that Python's twin knows, does not recurse, and remembers no more than the file has opcodes.
// Anything else, and all that is rare, throws NotPlain: then the other machine says what it is.
PickledList find_rows(Window& window, std::span<const std::string> names, int64_t most_steps);

}  // namespace realign_fast::io
