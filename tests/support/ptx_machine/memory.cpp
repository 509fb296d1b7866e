#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <utility>

#include "kernel.h"

namespace ptx {
namespace {

constexpr size_t kAlignment = 16;             // of the widest access
constexpr size_t kMostWatched = 48ull << 20;  // bytes; the shadow of more would take gigabytes

// Whether nothing orders two accesses of which one is a write.
bool unordered(const Access& earlier, const Access& later) {
  if (earlier.block != later.block) return true;
  if (earlier.thread == later.thread || earlier.epoch != later.epoch) return false;
  return earlier.thread / kLanes != later.thread / kLanes || earlier.warp_epoch == later.warp_epoch;
}

}  // namespace

void Shadow::FreeCells::operator()(Cell* cells) const { std::free(cells); }

// The system hands out zeros page by page when they are touched, so large shadows cost little.
Shadow::Shadow(size_t bytes)
    : cells_(static_cast<Cell*>(std::calloc(bytes / 8 + 2, sizeof(Cell)))), bytes_(bytes) {
  if (!cells_) throw std::bad_alloc();
}

void Shadow::refine(size_t cell_bytes) {
  const size_t pieces = cell_bytes_ / cell_bytes, count = bytes_ / cell_bytes_ + 2;
  std::unique_ptr<Cell[], FreeCells> finer(
      static_cast<Cell*>(std::calloc(count * pieces, sizeof(Cell))));
  if (!finer) throw std::bad_alloc();
  for (size_t i = 0; i < count; ++i)
    for (size_t piece = 0; piece < pieces && cells_[i].era == era_; ++piece)
      finer[i * pieces + piece] = cells_[i];
  cells_ = std::move(finer);
  cell_bytes_ = cell_bytes;
}

const char* Shadow::note(size_t offset, size_t bytes, const Access& access, Kind kind) {
  if (bytes < cell_bytes_) refine(bytes);
  for (size_t i = offset / cell_bytes_; i < (offset + bytes) / cell_bytes_; ++i) {
    Cell& cell = cells_[i];
    if (cell.era != era_) cell = Cell{era_, none, false, false, {}, {}};
    const char* race = kind == Kind::read ? note_read(cell, access)
                                          : note_write(cell, access, kind == Kind::atomic);
    if (race) return race;
  }
  return nullptr;
}

const char* Shadow::note_read(Cell& cell, const Access& access) {
  if (cell.written && unordered(cell.writer, access)) return "read after write";
  const Access& reader = cell.reader;
  if (cell.readers == none || cell.readers == several_blocks) {
    if (cell.readers == none) cell.readers = one_thread;
  } else if (reader.block != access.block) {
    cell.readers = several_blocks;
  } else if (reader.epoch != access.epoch) {
    cell.readers = one_thread;
  } else if (reader.thread / kLanes != access.thread / kLanes) {
    cell.readers = one_block;
  } else if (cell.readers != one_block) {
    if (reader.warp_epoch != access.warp_epoch) {
      cell.readers = one_thread;
    } else if (reader.thread != access.thread) {
      cell.readers = one_warp;
    }
  }
  cell.reader = access;
  return nullptr;
}

const char* Shadow::note_write(Cell& cell, const Access& access, bool atomic) {
  if (cell.written && !(atomic && cell.atomically) && unordered(cell.writer, access))
    return "write after write";
  const Access& reader = cell.reader;
  bool race = false;
  switch (cell.readers) {
    case none: break;
    case one_thread: race = unordered(reader, access); break;
    case one_warp:
      race = reader.block != access.block ||
             (reader.epoch == access.epoch && (reader.thread / kLanes != access.thread / kLanes ||
                                               reader.warp_epoch == access.warp_epoch));
      break;
    case one_block: race = reader.block != access.block || reader.epoch == access.epoch; break;
    case several_blocks: race = true;
  }
  if (race) return "write after read";
  cell.written = true;
  cell.atomically = atomic;
  cell.writer = access;
  return nullptr;
}

void GlobalMemory::allow(uint64_t begin, size_t bytes, size_t row_bytes, size_t row_stride,
                         bool writable, const std::string& name) {
  for (const Allocation& other : allocations_)
    if (other.begin == begin && other.bytes == bytes && other.writable == writable &&
        other.row_bytes == row_bytes)
      return;  // (a tensor that is given twice)
  const bool watched = writable && find_races && bytes <= kMostWatched;
  auto shadow = watched ? std::make_unique<Shadow>(bytes + kAlignment) : nullptr;
  allocations_.push_back({begin, bytes, row_bytes, row_stride, writable, name, std::move(shadow)});
}

void GlobalMemory::begin_launch() {
  for (Allocation& allocation : allocations_)
    if (allocation.shadow) allocation.shadow->reset();
}

bool GlobalMemory::holds(const Allocation& allocation, uint64_t address, size_t bytes,
                         Kind kind) const {
  const uint64_t offset = address - allocation.begin;  // (wraps to a large number below)
  if (offset >= allocation.bytes || offset + bytes > allocation.bytes) return false;
  if (kind != Kind::read && !allocation.writable) return false;
  return !allocation.row_stride || offset % allocation.row_stride + bytes <= allocation.row_bytes;
}

void* GlobalMemory::at(uint64_t address, size_t bytes, const Access& access, Kind kind,
                       unsigned& recent) {
  if (recent >= allocations_.size() || !holds(allocations_[recent], address, bytes, kind)) {
    for (recent = 0; recent < allocations_.size(); ++recent)
      if (holds(allocations_[recent], address, bytes, kind)) break;
    if (recent == allocations_.size()) throw Fault(describe(address, bytes, kind));
  }
  if (address % bytes) throw Fault("global access not aligned to " + std::to_string(bytes));
  Allocation& allocation = allocations_[recent];
  if (allocation.shadow)
    if (const char* race = allocation.shadow->note(
            address - allocation.begin / kAlignment * kAlignment, bytes, access, kind))
      throw Fault(std::string("race in global memory (") + race + ") on " + allocation.name);
  return reinterpret_cast<void*>(address);
}

std::string GlobalMemory::describe(uint64_t address, size_t bytes, Kind kind) const {
  std::ostringstream words;
  words << (kind == Kind::read ? "read" : "write") << " of " << bytes
        << " bytes outside of all memory that the call owns";
  for (const Allocation& allocation : allocations_) {
    const auto before = static_cast<int64_t>(allocation.begin - address);
    const auto after = static_cast<int64_t>(address - allocation.begin - allocation.bytes);
    if (before > 0 && before <= 4096)
      words << ", " << before << " bytes before " << allocation.name;
    if (after >= 0 && after < 4096) words << ", " << after << " bytes after " << allocation.name;
    if (before <= 0 && after < 0)
      words << (kind != Kind::read && !allocation.writable ? ", in the input "
                                                           : ", across rows of ")
            << allocation.name;
  }
  return words.str();
}

void SharedMemory::begin_block(size_t bytes, bool find_races) {
  bytes_.assign(bytes, 0xff);
  copying_.assign(bytes / 16 + 1, 0);
  find_races_ = find_races;
  if (!find_races) return;
  if (!shadow_ || shadow_bytes_ < bytes) {
    shadow_ = std::make_unique<Shadow>(bytes);
    shadow_bytes_ = bytes;
  }
  shadow_->reset();
}

void* SharedMemory::at(uint64_t address, size_t bytes, const Access& access, Kind kind) {
  if (address + bytes > bytes_.size() || address > bytes_.size())
    throw Fault("shared memory out of bounds: byte " + std::to_string(address) + " of " +
                std::to_string(bytes_.size()));
  if (address % bytes) throw Fault("shared access not aligned to " + std::to_string(bytes));
  for (size_t piece = address / 16; piece <= (address + bytes - 1) / 16; ++piece)
    if (copying_[piece]) throw Fault("shared memory touched while a cp.async to it is under way");
  if (find_races_)
    if (const char* race = shadow_->note(address, bytes, access, kind))
      throw Fault(std::string("race in shared memory (") + race + ")");
  return bytes_.data() + address;
}

void SharedMemory::begin_copy(uint64_t address, const Access& access) {
  at(address, 16, access, Kind::write);
  copying_[address / 16] = 1;
}

void SharedMemory::end_copy(uint64_t address, const void* source, size_t bytes,
                            const Access& access) {
  copying_[address / 16] = 0;
  void* target = at(address, 16, access, Kind::write);
  std::memset(target, 0, 16);
  if (bytes) std::memcpy(target, source, bytes);
}

}  // namespace ptx
