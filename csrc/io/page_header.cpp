#include "page_header.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace realign_fast::io {
namespace {

constexpr int64_t kBuffer = 16 << 10;      // holds the head and the levels of most pages
constexpr int64_t kAhead = 16 << 20;       // what the kernel is asked to read ahead
constexpr int64_t kLongHeader = 16 << 20;  // no header of a page is longer
constexpr int kDepth = 16;                 // of structs in structs

[[noreturn]] void fail() { throw std::system_error(errno, std::generic_category()); }

// The types of Thrift's compact protocol.
enum Type { kTrue = 1, kFalse, kByte, kI16, kI32, kI64, kDouble, kBinary, kList, kSet, kMap };
enum MoreTypes { kStruct = 12, kUuid = 13 };

int64_t signed_of(uint64_t zigzag) {
  return static_cast<int64_t>(zigzag >> 1) ^ -static_cast<int64_t>(zigzag & 1);
}

void skip_value(Cursor& cursor, int type, int depth);

// Calls field(id, type) for each field of a struct; it says whether it has read the value.
template <class Field>
void read_struct(Cursor& cursor, int depth, Field field) {
  if (depth > kDepth) throw NotPlain("a page header is nested too deeply");
  for (int64_t id = 0;;) {
    const int head = cursor.next(), type = head & 15;
    if (type == 0) return;
    // Ids wrap as the 16-bit numbers they are.
    const auto told = head >> 4 ? id + (head >> 4) : signed_of(cursor.varint());
    id = static_cast<int16_t>(told);
    if (!field(id, type)) skip_value(cursor, type, depth);
  }
}

void skip_list(Cursor& cursor, int depth) {
  const int head = cursor.next(), type = head & 15;
  const uint64_t size = head >> 4 == 15 ? cursor.varint() : head >> 4;
  for (uint64_t i = 0; i < size; i++) {  // (each takes a byte or more, so it ends)
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
      if (depth > kDepth) throw NotPlain("a page header is nested too deeply");
      return skip_list(cursor, depth + 1);
    case kStruct: return read_struct(cursor, depth + 1, [](int64_t, int) { return false; });
    default: throw NotPlain("a page header has a field of no type we know");  // (and no maps)
  }
}

// Takes field `id` as a number if it is one of `places`, which begin with that of field 1.
bool read_number(Cursor& cursor, int64_t id, int type, std::initializer_list<int64_t*> places) {
  if (id < 1 || id > static_cast<int64_t>(places.size()) || type != kI32) return false;
  const auto number = signed_of(cursor.varint());
  if (number < 0 || number > INT32_MAX)
    throw NotPlain("a number of a page header is negative or too large");
  *places.begin()[id - 1] = number;
  return true;
}

}  // namespace

Window::Window(int descriptor, int64_t begin, int64_t end)
    : begin_(begin), end_(end), buffer_(kBuffer) {
  if (begin < 0 || end < begin) throw NotPlain("its column chunk lies nowhere");
  descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor_ < 0) fail();
}

Window::~Window() { close(descriptor_); }

void Window::copy(int64_t offset, int64_t bytes, std::byte* out) {
  while (bytes > 0) {
    int64_t got = 0;
    if (offset >= low_ && offset < high_) {
      got = std::min(bytes, high_ - offset);
      std::memcpy(out, buffer_.data() + (offset - low_), got);
    } else if (bytes >= kBuffer) {
      got = read(offset, bytes, out);
    } else {
      fill(offset);
    }
    offset += got, out += got, bytes -= got;
  }
}

void Window::fill(int64_t offset) {
  low_ = high_ = offset;  // (empty, should reading fail)
  high_ += read(offset, std::min<int64_t>(kBuffer, end_ - offset), buffer_.data());
}

int64_t Window::read(int64_t offset, int64_t bytes, void* out) {
  if (offset < begin_ || bytes <= 0 || bytes > end_ - offset) {
    throw NotPlain("a page ends beyond its column chunk");
  }
  if (offset >= next_ && offset - next_ < kBuffer) announce(offset, bytes);
  for (;;) {
    const auto got = pread(descriptor_, out, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail();
    if (got == 0) throw NotPlain("the file ends inside a page");
    next_ = offset + got;
    return got;
  }
}

// Who reads on and on is read ahead for, unless the file is cached: asking has its price.
void Window::announce(int64_t offset, int64_t bytes) {
  const auto wanted = offset + bytes + kAhead / 2;
  if (wanted <= announced_ || announced_ >= end_) return;
  const auto begin = std::max(announced_, offset);
  announced_ = std::min(wanted + kAhead / 2, end_);
  uint8_t last = 0;
  const iovec place = {&last, 1};
  if (preadv2(descriptor_, &place, 1, announced_ - 1, RWF_NOWAIT) == 1) return;
  posix_fadvise(descriptor_, begin, announced_ - begin, POSIX_FADV_WILLNEED);
}

uint64_t Cursor::varint() {
  uint64_t number = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    const uint64_t byte = next();
    number |= (byte & 127) << shift;
    if (byte < 128) return number;
  }
  throw NotPlain("a number of a page is too long");
}

void Cursor::skip(uint64_t bytes) {
  if (bytes > static_cast<uint64_t>(end - at)) throw NotPlain("a page ends too early");
  at += static_cast<int64_t>(bytes);
}

PageHeader read_page_header(Cursor& cursor) {
  PageHeader page;
  Cursor head{cursor.window, cursor.at, std::min(cursor.end, cursor.at + kLongHeader)};
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
