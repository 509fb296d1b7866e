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

// A block of the file in memory that only this block uses: a part of a private mapping.
struct Block {
  std::shared_ptr<std::byte> memory;
  std::byte* data = nullptr;  // the first requested byte, inside `memory`
  int64_t bytes = 0;
  const MappedRange* range = nullptr;  // it lives as long as `memory`
};

// Reads the bytes begin..end of a file, block_bytes at a time; the last block holds the rest.
//
// A block is mapped: the file's cached pages, which are loaded before it is used, and nothing is
// copied.
class ShardReader {
 public:
  ShardReader(int descriptor, int64_t begin, int64_t end, int64_t block_bytes, int64_t ahead,
              int threads);
  ~ShardReader();
  ShardReader(const ShardReader&) = delete;

  // Returns the next block, or one without memory after the last. Several threads may call it; each
  // block is given to one of them. Throws std::system_error if reading fails, std::length_error if
  // the file ends before `end`, and std::runtime_error in a forked process.
  Block next();
  // Whether this is a copy in a forked process, where its threads do not exist. It must not be
  // destroyed there: it would wait for them.
  bool was_forked() const;

 private:
  struct Result {
    Block block;
    std::exception_ptr error;
  };
  struct Mapping;
  void work();
  Block fill(int64_t index);
  std::shared_ptr<Mapping> mapping_of(int64_t index);
  void check_length() const;

  int descriptor_, process_;
  int64_t begin_, end_, block_bytes_, count_, ahead_;
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
