#include "interpreter.h"

#include <algorithm>
#include <climits>
#include <numeric>
#include <random>

namespace ptx {
namespace {

constexpr int64_t kMostSteps = 20'000'000;  // of a warp in a block, before it counts as endless

}  // namespace

void Warp::begin_block() {
  live_ = kWholeWarp;
  waiting_ = 0;
  steps_ = 0;
  next_.fill(0);
  for (int lane = 0; lane < kLanes; ++lane) open_[lane].clear(), groups_[lane].clear();
  for (const auto& [number, value] : block.kernel.constants) slot(number).fill(value);
  for (const auto& [number, special] : block.kernel.specials) {
    Slot& values = slot(number);
    switch (special) {
      case Special::thread: std::iota(values.begin(), values.end(), index_ * kLanes); break;
      case Special::block_x: values.fill(block.x); break;
      case Special::block_y: values.fill(block.y); break;
      case Special::blocks_x: values.fill(block.grid.x); break;
      case Special::blocks_y: values.fill(block.grid.y); break;
      case Special::threads: values.fill(static_cast<uint64_t>(block.threads));
    }
  }
}

int Warp::barrier() const {
  int place = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(live_ >> lane & 1)) throw Fault("a thread has ended while others wait at a barrier");
    if (place >= 0 && place != next_[lane]) throw Fault("threads wait at different barriers");
    place = next_[lane];
  }
  return place;
}

void Warp::pass_barrier() {
  waiting_ = 0;
  ++epoch_;
}

void Warp::commit_copies(int lane) {
  groups_[lane].push_back(std::move(open_[lane]));
  open_[lane].clear();
}

void Warp::finish_copies(int lane, size_t newest) {
  auto& groups = groups_[lane];
  if (groups.size() <= newest) return;
  const auto end = groups.end() - static_cast<std::ptrdiff_t>(newest);
  for (auto group = groups.begin(); group != end; ++group)
    for (const Copy& copy : *group)
      block.shared.end_copy(copy.shared, reinterpret_cast<const void*>(copy.global), copy.bytes,
                            access(lane));
  groups.erase(groups.begin(), end);
}

void Warp::end_lanes(uint32_t mask) {
  live_ &= ~mask;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    bool pending = !open_[lane].empty();
    for (const auto& group : groups_[lane]) pending |= !group.empty();
    if (pending) throw Fault("a thread ends with a cp.async that nobody has waited for");
  }
}

uint32_t Warp::lanes_that_take_part(const Instruction& instruction, uint32_t mask) {
  if (instruction.predicate < 0) return mask;
  const Slot& values = slot(instruction.predicate);
  uint32_t chosen = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    chosen |= static_cast<uint32_t>((values[lane] & 1) != instruction.negated) << lane;
  return chosen & mask;
}

void Warp::run() {
  const std::vector<Instruction>& code = block.kernel.instructions;
  while (const uint32_t runnable = live_ & ~waiting_) {
    // The lanes at the lowest instruction go on until they reach others or part.
    int here = INT_MAX, others = INT_MAX;
    for (int lane = 0; lane < kLanes; ++lane)
      if (runnable >> lane & 1) here = std::min(here, next_[lane]);
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(runnable >> lane & 1)) continue;
      if (next_[lane] == here) {
        mask |= 1u << lane;
      } else {
        others = std::min(others, next_[lane]);
      }
    }
    bool together = true;
    while (together && here < others) {
      if (here >= static_cast<int>(code.size())) throw Fault("a thread runs past its last line");
      const Instruction& instruction = code[static_cast<size_t>(here)];
      ++here;
      ++instruction.executed;
      const uint32_t active = lanes_that_take_part(instruction, mask);
      try {
        if (++steps_ > kMostSteps) throw Fault("a loop without an end");
        if (active && instruction.whole_warp && active != kWholeWarp)
          throw Fault("a part of a warp at an operation of the whole warp");
        switch (instruction.control) {
          case Control::none:
            if (active) instruction.execute(*this, instruction, active);
            break;
          case Control::branch:
            if (active == mask) {
              here = instruction.target;
            } else if (active) {
              for (int lane = 0; lane < kLanes; ++lane)
                if (mask >> lane & 1) next_[lane] = active >> lane & 1 ? instruction.target : here;
              together = false;
            }
            break;
          case Control::exit:
            if (!active) break;
            end_lanes(active);
            mask &= ~active;
            break;
          case Control::barrier:
            for (int lane = 0; lane < kLanes; ++lane)
              if (active >> lane & 1) next_[lane] = here;
            waiting_ |= active;
            mask &= ~active;
        }
      } catch (const Fault& fault) {
        throw Fault(std::string(fault.what()) + " at '" + instruction.text + "'");
      }
      if (!mask) together = false;
    }
    if (!together) continue;
    for (int lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) next_[lane] = here;
  }
}

std::vector<int> Machine::ordered(int count) {
  std::vector<int> turns(static_cast<size_t>(count));
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::backward) std::reverse(turns.begin(), turns.end());
  if (order == Order::shuffled)
    std::shuffle(turns.begin(), turns.end(), std::minstd_rand(random_++));
  return turns;
}

void Machine::run_block(Block& block, std::vector<Warp>& warps) {
  for (Warp& warp : warps) warp.begin_block();
  for (;;) {
    for (int turn : ordered(static_cast<int>(warps.size()))) warps[static_cast<size_t>(turn)].run();
    if (std::all_of(warps.begin(), warps.end(), [](const Warp& warp) { return warp.finished(); }))
      return;
    for (const Warp& warp : warps)
      if (warp.barrier() != warps[0].barrier()) throw Fault("warps wait at different barriers");
    ++block.epoch;
    for (Warp& warp : warps) warp.pass_barrier();
  }
}

void Machine::run(Kernel& kernel, Grid grid, int threads, size_t shared_bytes,
                  std::vector<unsigned char> parameters) {
  ++kernel.launches;
  kernel.blocks += static_cast<int64_t>(grid.x) * grid.y;
  const auto slots = static_cast<size_t>(kernel.slots);
  const auto warp_count = static_cast<size_t>(threads / kLanes);
  // Registers begin as rubbish.
  if (slots_.size() < slots * warp_count) {
    Slot rubbish;
    rubbish.fill(0xdeadbeefdeadbeef);
    slots_.assign(slots * warp_count, rubbish);
  }
  Block block{kernel, grid, threads, std::move(parameters), global, shared_};
  std::vector<Warp> warps;
  for (size_t warp = 0; warp < warp_count; ++warp)
    warps.emplace_back(block, static_cast<int>(warp), slots_.data() + warp * slots);
  global.begin_launch();
  for (int number : ordered(static_cast<int>(grid.x * grid.y))) {
    block.x = static_cast<uint32_t>(number) % grid.x;
    block.y = static_cast<uint32_t>(number) / grid.x;
    shared_.begin_block(shared_bytes, global.find_races);
    run_block(block, warps);
  }
}

}  // namespace ptx
