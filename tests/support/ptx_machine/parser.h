// Reads PTX: the kernels of a module, and their instructions.
#pragma once

#include <map>
#include <string>

#include "kernel.h"

namespace ptx {

// The text of each kernel in a module, from its name to its closing brace, by name.
std::map<std::string, std::string> kernels_of(const std::string& module);

// Reads the text of one kernel. A Fault names what the machine does not know.
Kernel parse_kernel(const std::string& text);

}  // namespace ptx
