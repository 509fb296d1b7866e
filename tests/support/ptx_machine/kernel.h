// A kernel as the machine runs it. The parser (parser.cpp) makes it from the text of PTX.
//
// Every operand of an instruction is the number of a slot: 32 words of 64 bits, one for each lane
// of a warp. Registers, constants, special registers such as %tid.x, and the addresses of
// parameters all have slots, so an instruction never asks what kind of operand it reads.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;
using Slot = std::array<uint64_t, kLanes>;

// What a program did wrong, in words: the kernel then fails as on a device, and the host is told.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Warp;
struct Instruction;
// Executes an instruction for the lanes of the mask.
using Execute = void (*)(Warp& warp, const Instruction& instruction, uint32_t mask);

enum class Control { none, branch, exit, barrier };

struct Instruction {
  Execute execute = nullptr;
  Control control = Control::none;
  bool whole_warp = false;  // all 32 lanes must take part
  int predicate = -1;       // the slot that decides, or -1
  bool negated = false;
  std::array<int, 14> operands{};
  int64_t offset = 0, second_offset = 0;  // of the addresses among the operands
  int width = 1;    // elements of a vector load, store, pack or unpack; operands of a cp.async
  int target = -1;  // of a branch
  std::string text;
  mutable int64_t executed = 0;            // times, by a warp
  mutable unsigned recent_allocation = 0;  // where its last access to global memory lay
};

struct Parameter {
  int offset, bytes;
};

enum class Special { thread, block_x, block_y, blocks_x, blocks_y, threads };

struct Kernel {
  std::string name;
  std::vector<Instruction> instructions;
  int slots = 0;
  std::vector<std::pair<int, uint64_t>> constants;  // slot and value
  std::vector<std::pair<int, Special>> specials;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int most_threads = 1024;  // .maxntid
  int64_t launches = 0, blocks = 0;
};

// Where the spaces begin in the addresses of a program. Shared memory is addressed from 0.
constexpr uint64_t kParameterBase = 0x10000;
constexpr uint64_t kGenericSharedBase = 0x7e0000000000;

}  // namespace ptx
