// Where the rows of a pickled list of dicts lie in its file: the twin of corpus/unpickle.py.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "io/pickle/pickle_list.h"
#include "io/window.h"

namespace realign_fast::io {

// Runs the pickle in `window`, which it reads once and in order. It knows the opcodes and globals
// that Python's twin knows, does not recurse, and remembers no more than the file has opcodes.
// Anything else, and all that is rare, throws NotPlain: then the other machine says what it is.
PickledList find_rows(Window& window, std::span<const std::string> names, int64_t most_steps);

}  // namespace realign_fast::io
