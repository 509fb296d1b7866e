// Bytes of a file in blocks, in order, read ahead by threads of their own. No Python, no torch.
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

namespace realign_fast::io {

// Page-aligned buffers that blocks are read into. Their owner may pin them for a device, as
// addresses and sizes stay. When all are in use another one is made, and freed after its use:
// a consumer that keeps blocks costs memory, never a deadlock.
class Ring {
 public:
  Ring(int64_t buffers, int64_t bytes);  // bytes: of the largest block
  std::shared_ptr<std::byte> take();
  int64_t bytes() const { return bytes_; }  // of a buffer, a multiple of pages
  std::vector<uintptr_t> addresses() const;
  int64_t free() const;  // buffers that no block holds

 private:
  struct Free;  // the buffers not in use; outlives the ring while blocks are alive
  int64_t bytes_;
  std::shared_ptr<Free> free_;
};

// What was read of the file. Its memory is its own: a private mapping, or a buffer of a ring.
struct Block {
  std::shared_ptr<std::byte> memory;
  std::byte* data = nullptr;  // the first byte asked for, inside memory
  int64_t bytes = 0;
};

// The bytes begin..end of a file, block_bytes at a time (the last block has the rest).
//
// Without a ring a block is a window of the file's cached pages, mapped and brought in ahead of its
// use: nothing is copied. With a ring it is read into a buffer: if `direct` past the page cache
// (O_DIRECT) where the file system can, which leaves the cache to others and the processor idle.
class ShardReader {
 public:
  ShardReader(int descriptor, int64_t begin, int64_t end, int64_t block_bytes, int64_t ahead,
              int threads, std::shared_ptr<Ring> ring, bool direct = true);
  ~ShardReader();
  ShardReader(const ShardReader&) = delete;

  // The next block; one without memory after the last. Throws std::system_error, and
  // std::length_error where the file ends before it should.
  Block next();
  bool direct() const { return direct_; }

 private:
  struct Result {
    Block block;
    std::exception_ptr error;
  };
  void work();
  Block fill(int64_t index) const;
  Block map(int64_t begin, int64_t bytes) const;
  Block read(int64_t begin, int64_t bytes) const;
  void check_length() const;

  int descriptor_;
  bool direct_ = false;
  int64_t begin_, end_, block_bytes_, count_, ahead_;
  std::shared_ptr<Ring> ring_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Result> ready_;
  int64_t next_read_ = 0, next_given_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// Have the kernel write out these bytes of a file now rather than when the file is synced.
void start_writing(int descriptor, int64_t begin, int64_t bytes);

}  // namespace realign_fast::io
