// Mapped ranges of files, and a handler that keeps a process alive when their pages go.
//
// A page of a mapped file that another process has cut off raises SIGBUS, which ends a process
// without a word. The handler puts zeros in place of the pages and remembers that they were lost,
// so that the reader of the file can report it.
#pragma once

#include <cstdint>

namespace realign_fast::io {

// Bytes of this process that map a file, known to the handler while this object lives.
class MappedRange {
 public:
  MappedRange(const void* begin, int64_t bytes);
  ~MappedRange();
  MappedRange(const MappedRange&) = delete;
  // Whether pages were gone when they were read; zeros are in their place.
  bool lost() const;

  struct Entry;

 private:
  Entry* entry_;
};

// Installs the handler in this process, once. Signals that are not about a range go to the handler
// before it.
void survive_lost_pages();

}  // namespace realign_fast::io
