// Checks that a pickle holds plain data, and finds the rows of a pickled list of dicts in its file.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "io/pickle/pickle_list.h"
#include "io/window.h"

namespace realign_fast::io {

// Runs the pickle in `window`, which it reads once and in order, for at most `max_steps` opcodes.
// It supports the opcodes and globals by which protocols 2 to 5 write plain data, NumPy's arrays
// and torch's tensors, does not recurse, and its memory is bounded by the size of the file.
// Everything else throws NotPlain, which names the row or the byte.
//
// Python's own unpickler may build the values of a pickle that passes: every global, every argument
// and every state is one that NumPy or torch writes, keys are texts and numbers, no opcode takes
// memory by a size that the file states alone, and all objects take at most 64 MiB and 32 bytes for
// each byte of the file.
PickledList find_rows(Window& window, std::span<const std::string> names, int64_t max_steps);

}  // namespace realign_fast::io
