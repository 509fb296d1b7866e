// The bytes of a file in blocks, in order, read ahead by threads. No Python, no torch.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "io/mapped_range.h"

namespace realign_fast::io {

// Page-aligned buffers that blocks are read into. Their addresses and sizes do not change, so the
// owner may pin them for a device. If all are in use, a further one is allocated and freed after
// its use: a consumer that keeps blocks costs memory but never causes a deadlock.
class Ring {
 public:
  Ring(int64_t buffers, int64_t bytes);  // `bytes` is the size of the largest block
  std::shared_ptr<std::byte> take();
  int64_t bytes() const { return bytes_; }  // size of a buffer, a multiple of a page
  std::vector<uintptr_t> addresses() const;
  int64_t free() const;  // the number of buffers that no block holds

 private:
  struct Free;  // the buffers that are not in use; it lives as long as any block
  int64_t bytes_;
  std::shared_ptr<Free> free_;
};

// A block of the file in memory that only this block uses: a part of a private mapping, or a buffer
// of a ring.
struct Block {
  std::shared_ptr<std::byte> memory;
  std::byte* data = nullptr;  // the first requested byte, inside `memory`
  int64_t bytes = 0;
  const MappedRange* range = nullptr;  // of a mapping; it lives as long as `memory`
};

// Reads the bytes begin..end of a file, block_bytes at a time; the last block holds the rest.
//
// Without a ring, a block is mapped: the file's cached pages, which are loaded before it is used,
// and nothing is copied. Without threads a block is loaded when it is asked for, which is fastest
// where the file is cached. With a ring, a block is read into a buffer. `direct` then bypasses the
// page cache (O_DIRECT) if the file system supports it, which leaves the cache to other files and
// costs little processor time.
class ShardReader {
 public:
  ShardReader(int descriptor, int64_t begin, int64_t end, int64_t block_bytes, int64_t ahead,
              int threads, std::shared_ptr<Ring> ring, bool direct = true);
  ~ShardReader();
  ShardReader(const ShardReader&) = delete;

  // Returns the next block, or one without memory after the last. Several threads may call it; each
  // block is given to one of them. Throws std::system_error if reading fails, std::length_error if
  // the file ends before `end`, and std::runtime_error in a forked process.
  Block next();
  // Whether this is a copy in a forked process, where its threads do not exist. It must not be
  // destroyed there: it would wait for them.
  bool was_forked() const;
  bool direct() const { return direct_; }

 private:
  struct Result {
    Block block;
    std::exception_ptr error;
  };
  struct Mapping;
  void work();
  Block fill(int64_t index);
  Block map(int64_t index, int64_t begin, int64_t bytes);
  std::shared_ptr<Mapping> mapping_of(int64_t index);
  Block read(int64_t begin, int64_t bytes) const;
  void check_length() const;

  int descriptor_, process_;
  bool direct_ = false, without_threads_ = false;
  int64_t begin_, end_, block_bytes_, count_, ahead_;
  std::shared_ptr<Ring> ring_;
  std::mutex mapping_mutex_;
  std::shared_ptr<Mapping> mapping_;  // of the last block
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Result> ready_;
  int64_t next_read_ = 0, next_given_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// Asks the kernel to write these bytes of a file to disk now rather than when the file is synced.
void start_writing(int descriptor, int64_t begin, int64_t bytes);

}  // namespace realign_fast::io
