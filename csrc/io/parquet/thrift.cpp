#include "io/parquet/thrift.h"

namespace realign_fast::io {
namespace {

void skip_list(Cursor& cursor, int depth) {
  const int head = cursor.next(), type = head & 15;
  const uint64_t size = head >> 4 == 15 ? cursor.varint() : head >> 4;
  for (uint64_t i = 0; i < size; i++) {  // every value has at least one byte, so the loop ends
    type == kTrue || type == kFalse ? cursor.skip(1) : skip_value(cursor, type, depth);
  }
}

}  // namespace

void skip_value(Cursor& cursor, int type, int depth) {
  switch (type) {
    case kTrue:
    case kFalse: return;  // the type is the value
    case kByte: return cursor.skip(1);
    case kI16:
    case kI32:
    case kI64: return static_cast<void>(cursor.varint());
    case kDouble: return cursor.skip(8);
    case kUuid: return cursor.skip(16);
    case kBinary: return cursor.skip(cursor.varint());
    case kList:
    case kSet:
      if (depth > kMaxDepth) throw NotPlain("its metadata are nested too deeply");
      return skip_list(cursor, depth + 1);
    case kStruct: return read_struct(cursor, depth + 1, [](int64_t, int) { return false; });
    default: throw NotPlain("its metadata have a field of an unknown type");
  }
}

uint64_t Cursor::varint() {
  uint64_t number = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const uint64_t byte = next();
    number |= (byte & 127) << shift;
    if (byte < 128) return number;
  }
  throw NotPlain("a number in its metadata or a page has too many bytes");
}

int64_t Cursor::zigzag() {
  const auto number = varint();
  return static_cast<int64_t>(number >> 1) ^ -static_cast<int64_t>(number & 1);
}

void Cursor::skip(uint64_t bytes) {
  if (bytes > static_cast<uint64_t>(end - at)) {
    throw NotPlain("its metadata or a page ends too early");
  }
  at += static_cast<int64_t>(bytes);
}

}  // namespace realign_fast::io
