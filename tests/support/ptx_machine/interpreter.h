// Runs the threads of a kernel: warps, blocks, and the order in which they proceed.
//
// The lanes of a warp that stand at the lowest instruction go on together, so lanes that have
// diverged meet again where their paths join. A warp runs until it waits at a barrier, and the next
// one follows in the chosen order. Blocks run one after another.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "memory.h"

namespace ptx {

enum class Order { forward, backward, shuffled };

struct Grid {
  uint32_t x, y;
};

// A launch, and the block of it that runs.
struct Block {
  const Kernel& kernel;
  Grid grid;
  int threads;
  std::vector<unsigned char> parameters;
  GlobalMemory& global;
  SharedMemory& shared;
  uint32_t x = 0, y = 0;
  uint32_t epoch = 0;  // barriers that the block has passed
};

// A cp.async copy of 16 bytes on its way; those after the first `bytes` are zeros.
struct Copy {
  uint64_t shared, global;
  size_t bytes;
};

class Warp {
 public:
  Warp(Block& block, int index, Slot* slots) : block(block), index_(index), slots_(slots) {}

  // Readies the warp for the block that starts now.
  void begin_block();
  // Runs until every lane waits at a barrier or has ended.
  void run();
  bool finished() const { return !live_; }
  // The instruction at which the lanes wait; a fault if they wait at different ones.
  int barrier() const;
  void pass_barrier();

  Slot& slot(int number) { return slots_[number]; }
  Access access(int lane) const {
    return {block.y * block.grid.x + block.x + 1, static_cast<uint32_t>(index_ * kLanes + lane),
            block.epoch, epoch_};
  }
  void pass_warp_barrier() { ++epoch_; }
  // Copies that a lane has begun since its last commit, and the groups before, oldest first.
  std::vector<Copy>& open_copies(int lane) { return open_[lane]; }
  void commit_copies(int lane);
  void finish_copies(int lane, size_t newest);

  Block& block;

 private:
  uint32_t lanes_that_take_part(const Instruction& instruction, uint32_t mask);
  void end_lanes(uint32_t mask);

  int index_;
  Slot* slots_;
  std::array<int, kLanes> next_{};  // instruction of each lane
  uint32_t live_ = 0, waiting_ = 0;
  uint32_t epoch_ = 0;
  int64_t steps_ = 0;
  std::array<std::vector<Copy>, kLanes> open_;
  std::array<std::vector<std::vector<Copy>>, kLanes> groups_;
};

class Machine {
 public:
  // Runs a grid of blocks. Throws a Fault that names the instruction.
  void run(Kernel& kernel, Grid grid, int threads, size_t shared_bytes,
           std::vector<unsigned char> parameters);

  GlobalMemory global;
  Order order = Order::forward;

 private:
  std::vector<int> ordered(int count);
  void run_block(Block& block, std::vector<Warp>& warps);

  SharedMemory shared_;
  std::vector<Slot> slots_;
  unsigned random_ = 1;
};

}  // namespace ptx
