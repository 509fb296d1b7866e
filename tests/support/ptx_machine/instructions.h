// What each PTX instruction does.
#pragma once

#include <string>

#include "kernel.h"

namespace ptx {

struct Decoded {
  Execute execute = nullptr;
  Control control = Control::none;
  bool whole_warp = false;
};

// Returns how to execute an opcode such as "add.f64"; a Fault if the machine does not know it.
// `vector` is the number of registers in braces among its operands, 1 without braces.
Decoded decode(const std::string& opcode);

// Splits "ld.global.v4.u32" at its dots.
std::vector<std::string> parts_of(const std::string& opcode);

}  // namespace ptx
