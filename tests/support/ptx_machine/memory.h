// Global and shared memory: which addresses a kernel may use, and which accesses are races.
//
// A race is two accesses to the same bytes by different threads, one of them a write, that nothing
// orders. Within a block __syncthreads orders them, within a warp __syncwarp does as well, and
// blocks are not ordered at all. Atomics race with plain accesses but not with one another. Each
// cell of some bytes remembers its last write and its last readers, so a race is found whatever the
// order in which this machine happens to run the threads. (Results above 48 MiB are not watched.)
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

// Who makes an access, and when. Epochs count the barriers that the block and the warp have passed.
struct Access {
  uint32_t block = 0;
  uint32_t thread = 0;
  uint32_t epoch = 0;       // barriers of the block
  uint32_t warp_epoch = 0;  // barriers of the block and of the warp
};

enum class Kind { read, write, atomic };

// The accesses to some memory since it was reset.
class Shadow {
 public:
  explicit Shadow(size_t bytes);
  // Forgets all accesses.
  void reset() { ++era_; }
  // Notes an access to `bytes` bytes, of which `offset` is a multiple. Returns which race it is, or
  // null.
  const char* note(size_t offset, size_t bytes, const Access& access, Kind kind);

 private:
  enum Readers : uint8_t { none, one_thread, one_warp, one_block, several_blocks };
  struct Cell {
    uint32_t era;
    Readers readers;
    bool written, atomically;
    Access writer, reader;
  };
  struct FreeCells {
    void operator()(Cell* cells) const;
  };
  void refine(size_t cell_bytes);
  const char* note_read(Cell& cell, const Access& access);
  const char* note_write(Cell& cell, const Access& access, bool atomic);

  std::unique_ptr<Cell[], FreeCells> cells_;
  size_t bytes_, cell_bytes_ = 8;  // a cell is as large as the smallest access, if that is less
  uint32_t era_ = 1;
};

// A piece of global memory that kernels may use.
struct Allocation {
  uint64_t begin;
  size_t bytes;
  size_t row_bytes, row_stride;  // of a strided tensor: the bytes between its rows are not its own
  bool writable;
  std::string name;
  std::unique_ptr<Shadow> shadow;  // null where nothing is written
};

class GlobalMemory {
 public:
  // Allows the use of a tensor or of scratch memory until `forget`.
  void allow(uint64_t begin, size_t bytes, size_t row_bytes, size_t row_stride, bool writable,
             const std::string& name);
  void forget() { allocations_.clear(); }
  // Called before each launch: launches of a stream are ordered.
  void begin_launch();
  // Checks an access and returns the memory itself. `recent` is a hint that the caller keeps.
  void* at(uint64_t address, size_t bytes, const Access& access, Kind kind, unsigned& recent);

  bool find_races = true;

 private:
  bool holds(const Allocation& allocation, uint64_t address, size_t bytes, Kind kind) const;
  std::string describe(uint64_t address, size_t bytes, Kind kind) const;
  std::vector<Allocation> allocations_;
};

// The shared memory of the block that runs. It is NaN when a block starts.
class SharedMemory {
 public:
  void begin_block(size_t bytes, bool find_races);
  // Checks an access and returns the memory itself.
  void* at(uint64_t address, size_t bytes, const Access& access, Kind kind);
  // A cp.async to these 16 bytes is under way; until it ends nobody may touch them.
  void begin_copy(uint64_t address, const Access& access);
  void end_copy(uint64_t address, const void* source, size_t bytes, const Access& access);

 private:
  std::vector<unsigned char> bytes_;
  std::vector<char> copying_;  // for every 16 bytes
  std::unique_ptr<Shadow> shadow_;
  size_t shadow_bytes_ = 0, used_ = 0;
  bool find_races_ = false;
};

}  // namespace ptx
