#include "io/parquet/page_header.h"

#include <algorithm>

namespace realign_fast::io {
namespace {

constexpr int64_t kMaxHeaderBytes = 16 << 20;  // no page header is longer

// Reads field `id` into one of `targets`, which start with that of field 1; returns false for
// others.
bool read_number(Cursor& cursor, int64_t id, int type, std::initializer_list<int64_t*> targets) {
  if (id < 1 || id > static_cast<int64_t>(targets.size()) || type != kI32) return false;
  const auto number = cursor.zigzag();
  if (number < 0 || number > INT32_MAX)
    throw NotPlain("a number in a page header is negative or too large");
  *targets.begin()[id - 1] = number;
  return true;
}

}  // namespace

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
