#include "io/parquet/page_header.h"

#include <algorithm>

namespace realign_fast::io {
namespace {

constexpr int64_t kMaxHeaderBytes = 16 << 20;  // no page header is longer
constexpr int kMaxDepth = 16;                  // of structs in structs

// The types of Thrift's compact protocol.
enum Type { kTrue = 1, kFalse, kByte, kI16, kI32, kI64, kDouble, kBinary, kList, kSet, kMap };
enum MoreTypes { kStruct = 12, kUuid = 13 };

int64_t decode_zigzag(uint64_t zigzag) {
  return static_cast<int64_t>(zigzag >> 1) ^ -static_cast<int64_t>(zigzag & 1);
}

void skip_value(Cursor& cursor, int type, int depth);

// Calls read_field(id, type) for each field of a struct; it returns whether it has read the value.
template <class ReadField>
void read_struct(Cursor& cursor, int depth, ReadField read_field) {
  if (depth > kMaxDepth) throw NotPlain("a page header is nested too deeply");
  for (int64_t id = 0;;) {
    const int head = cursor.next(), type = head & 15;
    if (type == 0) return;
    // Field ids are 16-bit numbers and wrap.
    const auto wide_id = head >> 4 ? id + (head >> 4) : decode_zigzag(cursor.varint());
    id = static_cast<int16_t>(wide_id);
    if (!read_field(id, type)) skip_value(cursor, type, depth);
  }
}

void skip_list(Cursor& cursor, int depth) {
  const int head = cursor.next(), type = head & 15;
  const uint64_t size = head >> 4 == 15 ? cursor.varint() : head >> 4;
  for (uint64_t i = 0; i < size; i++) {  // every value has at least one byte, so the loop ends
    type == kTrue || type == kFalse ? cursor.skip(1) : skip_value(cursor, type, depth);
  }
}

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
      if (depth > kMaxDepth) throw NotPlain("a page header is nested too deeply");
      return skip_list(cursor, depth + 1);
    case kStruct: return read_struct(cursor, depth + 1, [](int64_t, int) { return false; });
    default:
      throw NotPlain("a page header has a field of an unknown type");  // Parquet uses no maps
  }
}

// Reads field `id` into one of `targets`, which start with that of field 1; returns false for
// others.
bool read_number(Cursor& cursor, int64_t id, int type, std::initializer_list<int64_t*> targets) {
  if (id < 1 || id > static_cast<int64_t>(targets.size()) || type != kI32) return false;
  const auto number = decode_zigzag(cursor.varint());
  if (number < 0 || number > INT32_MAX)
    throw NotPlain("a number in a page header is negative or too large");
  *targets.begin()[id - 1] = number;
  return true;
}

}  // namespace

uint64_t Cursor::varint() {
  uint64_t number = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const uint64_t byte = next();
    number |= (byte & 127) << shift;
    if (byte < 128) return number;
  }
  throw NotPlain("a number in a page has too many bytes");
}

void Cursor::skip(uint64_t bytes) {
  if (bytes > static_cast<uint64_t>(end - at)) throw NotPlain("a page ends too early");
  at += static_cast<int64_t>(bytes);
}

PageHeader read_page_header(Cursor& cursor) {
  PageHeader page;
  Cursor head{cursor.window, cursor.at, std::min(cursor.end, cursor.at + kMaxHeaderBytes)};
  const auto data = [&](int64_t id, int type) {
    return read_number(
        head, id, type,
        {&page.values, &page.encoding, &page.definition_encoding, &page.repetition_encoding});
  };
  const auto data_v2 = [&](int64_t id, int type) {
    return read_number(head, id, type,
                       {&page.values, &page.nulls, &page.rows, &page.encoding,
                        &page.definition_bytes, &page.repetition_bytes});
  };
  read_struct(head, 0, [&](int64_t id, int type) {
    if (id == 5 && type == kStruct) {
      page.has_data = true;
      read_struct(head, 1, data);
    } else if (id == 8 && type == kStruct) {
      page.has_data_v2 = true;
      read_struct(head, 1, data_v2);
    } else {
      page.has_checksum |= id == 4;
      return read_number(head, id, type, {&page.type, &page.uncompressed_bytes, &page.bytes});
    }
    return true;
  });
  cursor.at = head.at;
  return page;
}

}  // namespace realign_fast::io
