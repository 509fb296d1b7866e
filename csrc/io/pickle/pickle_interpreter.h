// Finds the rows of a pickled list of dicts in its file. The counterpart in Python is
// realign_fast/corpus/formats/pickle_interpreter.py.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "io/pickle/pickle_list.h"
#include "io/window.h"

namespace realign_fast::io {

// Runs the pickle in `window`, which it reads once and in order, for at most `max_steps` opcodes.
// It supports the opcodes and globals that the Python counterpart supports, does not recurse, and
// its memory is bounded by the size of the file. Everything else, and rare forms of pickles, throws
// NotPlain: the Python interpreter then reads the file or names its fault.
PickledList find_rows(Window& window, std::span<const std::string> names, int64_t max_steps);

}  // namespace realign_fast::io
