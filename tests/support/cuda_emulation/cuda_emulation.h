// Enough of CUDA's execution model to compile csrc/cuda with g++ and run it on a CPU, for tests on
// machines without a GPU. Included by csrc/cuda/device.cuh under -DREALIGN_EMULATION.
//
// Every thread of a block is a fiber. A fiber runs until it waits for others: at __syncthreads, or
// at an operation of its warp (a shuffle, a matrix product). Blocks run one after another. It is
// stricter than a GPU where it can be:
//   - all threads of a block must meet at the same __syncthreads, all lanes of a warp at the same
//     warp operation: anything else is an error that names the line, never a hang;
//   - shared memory is NaN at the start of a block; a cp.async copy arrives only at the wait that
//     asks for it;
//   - the order in which threads run can be forward, backward or shuffled, so that a missing
//     barrier changes the result.
// It says nothing about speed, registers, caches, memory faults, or how a tensor core rounds: here
// a product step is summed exactly and cut off (not rounded) to float32, which is what published
// tests of the hardware resemble.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace emulation {

enum class Order { forward, backward, shuffled };
inline Order order = Order::forward;
inline int multiprocessors = 3;
inline int64_t launches = 0;

using Site = std::source_location;

// A meeting point of some threads: a barrier, or an operation of a warp.
struct Meeting {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
  unsigned line = 0;
  unsigned char values[2][32][64];  // what each lane brings, for this generation and the last
};

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const Meeting* waits_for = nullptr;  // until its generation has passed `generation`
  int64_t generation = 0;
  unsigned index = 0;
  std::vector<std::vector<Copy>> groups;  // cp.async groups under way, oldest first
  std::vector<Copy> open;
};

constexpr size_t kStackBytes = 256 << 10;

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<void*> stacks;
  std::vector<unsigned char> shared;
  Meeting block;
  std::vector<Meeting> warps;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  std::string error;
  dim3 grid, threads, block_index;
  std::mt19937 random{1};
};
inline Machine machine;

[[noreturn]] inline void to_scheduler() { _longjmp(machine.scheduler, 1); }

inline void fiber_main() {
  machine.body();
  Fiber& self = *machine.current;
  if (!self.open.empty() || !self.groups.empty())
    machine.error = "a thread ended with a cp.async copy that nobody waited for";
  self.done = true;
  to_scheduler();
}

[[noreturn]] inline void fail(const std::string& words) {
  machine.error = words;
  to_scheduler();
}

// Wait until all expected threads have come to `meeting`; the generation that was completed.
inline int64_t meet(Meeting& meeting, const Site& site, const char* what) {
  if (meeting.arrived == 0) {
    meeting.line = site.line();
  } else if (meeting.line != site.line()) {
    fail(std::string(what) + ": threads meet at different lines, " + std::to_string(meeting.line) +
         " and " + std::to_string(site.line()) + " of " + site.file_name());
  }
  Fiber& self = *machine.current;
  const int64_t generation = meeting.generation;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return generation;
  }
  self.waits_for = &meeting;
  self.generation = generation;
  if (_setjmp(self.resume) == 0) to_scheduler();
  return generation;
}

inline void run_fiber(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void prepare_fibers(unsigned count) {
  while (machine.stacks.size() < count) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("emulation: no memory for a stack");
    machine.stacks.push_back(stack);
    machine.fibers.push_back(std::make_unique<Fiber>());
  }
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = *machine.fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = machine.stacks[i];
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    fiber.started = fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.index = i;
    fiber.groups.clear();
    fiber.open.clear();
  }
}

inline void run_block(unsigned threads) {
  prepare_fibers(threads);
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  machine.block = Meeting();
  machine.block.expected = static_cast<int>(threads);
  machine.warps.assign(threads / 32, Meeting());
  for (Meeting& warp : machine.warps) warp.expected = 32;
  std::vector<unsigned> turns(threads);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == Order::backward) std::reverse(turns.begin(), turns.end());
  for (unsigned left = threads; left;) {
    if (order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), machine.random);
    bool progress = false;
    for (unsigned turn : turns) {
      Fiber& fiber = *machine.fibers[turn];
      if (fiber.done) continue;
      if (fiber.waits_for && fiber.waits_for->generation == fiber.generation) continue;
      fiber.waits_for = nullptr;
      progress = true;
      run_fiber(fiber);
      if (!machine.error.empty()) throw std::runtime_error("emulation: " + machine.error);
      left -= fiber.done;
    }
    if (!progress)
      throw std::runtime_error("emulation: threads wait for others that have ended or wait "
                               "elsewhere (line " + std::to_string(machine.block.line) + ")");
  }
}

inline void run_grid(dim3 grid, int threads, size_t shared, std::function<void()> body) {
  if (threads < 32 || threads > 1024 || threads % 32)
    throw std::runtime_error("emulation: a block must be 1 to 32 whole warps");
  if (shared > 227 << 10) throw std::runtime_error("emulation: more shared memory than an H100 has");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulation: grid too large");
  ++launches;
  machine.body = std::move(body);
  machine.error.clear();
  machine.shared.resize(shared + 16);
  machine.grid = grid;
  machine.threads = dim3(static_cast<unsigned>(threads));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block_index = dim3(x, y, z);
        run_block(static_cast<unsigned>(threads));
      }
}

// What every lane of the warp brings, in the order of lanes. V is at most 64 bytes.
template <class V>
const unsigned char (*exchange(const V& value, const Site& site))[64] {
  static_assert(sizeof(V) <= 64);
  const unsigned index = machine.current->index;
  Meeting& warp = machine.warps[index / 32];
  std::memcpy(warp.values[warp.generation & 1][index % 32], &value, sizeof(V));
  const int64_t generation = meet(warp, site, "an operation of a warp");
  return warp.values[generation & 1];
}

template <class V>
V lane_value(const unsigned char (*values)[64], unsigned lane) {
  V value;
  std::memcpy(&value, values[lane], sizeof(V));
  return value;
}

inline dim3 thread_index() { return dim3(machine.current->index, 0, 0); }

}  // namespace emulation

// For tests: the order in which threads run, and the number of multiprocessors.
extern "C" __attribute__((visibility("default"), weak)) void realign_emulation_configure(
    int order, int multiprocessors) {
  emulation::order = static_cast<emulation::Order>(order);
  emulation::multiprocessors = multiprocessors;
}

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.threads)
#define gridDim (emulation::machine.grid)

inline void __syncthreads(emulation::Site site = emulation::Site::current()) {
  emulation::meet(emulation::machine.block, site, "__syncthreads");
}
inline void __syncwarp(unsigned = 0xffffffffu, emulation::Site site = emulation::Site::current()) {
  emulation::exchange(0, site);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int offset,
                  emulation::Site site = emulation::Site::current()) {
  if (mask != 0xffffffffu) emulation::fail("a shuffle of a part of a warp");
  const auto* values = emulation::exchange(value, site);
  return emulation::lane_value<V>(values, (emulation::machine.current->index % 32) ^ offset);
}
template <class V>
V __ldcs(const V* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emulation::fail("a load that is not aligned");
  return *p;
}
template <class V>
void __stcs(V* p, V value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emulation::fail("a store that is not aligned");
  *p = value;
}
template <class V>
V __ldg(const V* p) {
  return __ldcs(p);
}
template <class V>
V atomicAdd(V* p, V value) {
  static_assert(std::is_integral_v<V>, "no atomic sums of floating point: they are not repeatable");
  return std::exchange(*p, *p + value);
}
template <class V>
V atomicMax(V* p, V value) {
  static_assert(std::is_integral_v<V>);
  return std::exchange(*p, std::max(*p, value));
}
using std::isfinite;
using std::ilogb;
using std::ldexp;
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
