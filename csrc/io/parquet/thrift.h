// Thrift's compact protocol, in which Parquet writes its footer and the headers of its pages, read
// through a small window of the file. Every length is checked before it is used.
#pragma once

#include <cstdint>

#include "io/window.h"

namespace realign_fast::io {

// A position in a window that moves forward and never beyond `end`.
struct Cursor {
  Window& window;
  int64_t at, end;

  uint8_t next() {
    if (at >= end) throw NotPlain("its metadata or a page ends too early");
    return window.byte(at++);
  }
  uint64_t varint();
  int64_t zigzag();
  void skip(uint64_t bytes);
};

// The types of a field; Parquet uses no maps.
enum Type { kTrue = 1, kFalse, kByte, kI16, kI32, kI64, kDouble, kBinary, kList, kSet, kMap };
enum MoreTypes { kStruct = 12, kUuid = 13 };

constexpr int kMaxDepth = 16;  // of structs in structs

void skip_value(Cursor& cursor, int type, int depth);

// Calls read_field(id, type) for each field of a struct; it returns whether it has read the value.
template <class ReadField>
void read_struct(Cursor& cursor, int depth, ReadField read_field) {
  if (depth > kMaxDepth) throw NotPlain("its metadata are nested too deeply");
  for (int64_t id = 0;;) {
    const int head = cursor.next(), type = head & 15;
    if (type == 0) return;
    // Field ids are 16-bit numbers and wrap.
    const auto wide_id = head >> 4 ? id + (head >> 4) : cursor.zigzag();
    id = static_cast<int16_t>(wide_id);
    if (!read_field(id, type)) skip_value(cursor, type, depth);
  }
}

// Calls read_value(index) for each value of a list of `type`. Every value must take a byte or more,
// so that a list that claims more than there is ends with the file.
template <class ReadValue>
void read_list(Cursor& cursor, int expected_type, ReadValue read_value) {
  const int head = cursor.next();
  const uint64_t size = head >> 4 == 15 ? cursor.varint() : head >> 4;
  if ((head & 15) != expected_type && size) throw NotPlain("a list in its metadata is damaged");
  for (uint64_t index = 0; index < size; index++) read_value(index);
}

}  // namespace realign_fast::io
