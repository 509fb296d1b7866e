#include "io/parquet/footer.h"

#include <sys/stat.h>

#include <iterator>

#include "io/parquet/thrift.h"

namespace realign_fast::io {
namespace {

constexpr int64_t kTailBytes = 8;  // the length of the footer, and "PAR1"

constexpr const char* kCodecs[] = {"UNCOMPRESSED", "SNAPPY", "GZIP", "LZO",
                                   "BROTLI",       "LZ4",    "ZSTD", "LZ4_RAW"};
constexpr const char* kEncodings[] = {
    "PLAIN",          "GROUP_VAR_INT",       "PLAIN_DICTIONARY",        "RLE",
    "BIT_PACKED",     "DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY",
    "RLE_DICTIONARY", "BYTE_STREAM_SPLIT"};

template <size_t n>
std::string name_of(const char* const (&names)[n], int64_t number) {
  return number >= 0 && number < std::ssize(names) ? names[number] : std::to_string(number);
}

int64_t read_number(Cursor& cursor, int type) {
  if (type != kI32 && type != kI64) throw NotPlain("a number in its footer is of another type");
  return cursor.zigzag();
}

// ColumnMetaData.
void read_metadata(Cursor& cursor, ChunkFacts& chunk) {
  read_struct(cursor, 3, [&](int64_t id, int type) {
    switch (id) {
      case 2:
        if (type != kList) return false;
        read_list(cursor, kI32, [&](uint64_t) {
          chunk.encodings.push_back(name_of(kEncodings, cursor.zigzag()));
        });
        return true;
      case 4: chunk.codec = name_of(kCodecs, read_number(cursor, type)); return true;
      case 5: chunk.values = read_number(cursor, type); return true;
      case 7: chunk.bytes = read_number(cursor, type); return true;
      case 9: chunk.data_offset = read_number(cursor, type); return true;
      case 11: chunk.has_dictionary = true; return false;
      default: return false;
    }
  });
}

// ColumnChunk.
ChunkFacts read_chunk(Cursor& cursor) {
  ChunkFacts chunk;
  read_struct(cursor, 2, [&](int64_t id, int type) {
    if (id == 3 && type == kStruct) {
      read_metadata(cursor, chunk);
      return true;
    }
    chunk.is_elsewhere |= id == 1 || id == 8 || id == 9;
    return false;
  });
  return chunk;
}

}  // namespace

std::vector<ChunkFacts> read_chunks(int descriptor, int64_t leaf) {
  struct stat status;
  if (fstat(descriptor, &status) != 0) throw_errno();
  const int64_t size = status.st_size;
  if (size < kTailBytes) throw NotPlain("it has no footer");
  Window tail(descriptor, size - kTailBytes, size, kTailBytes);
  int64_t length = 0;
  for (int i = 0; i < 4; i++) length |= int64_t{tail.byte(size - kTailBytes + i)} << 8 * i;
  for (int i = 0; i < 4; i++) {
    if (tail.byte(size - 4 + i) != "PAR1"[i]) throw NotPlain("its footer is encrypted or missing");
  }
  const int64_t end = size - kTailBytes;
  if (length > end) throw NotPlain("its footer is longer than the file");
  Window window(descriptor, end - length, end, 256 << 10);
  Cursor cursor{window, end - length, end};

  std::vector<ChunkFacts> chunks;
  read_struct(cursor, 0, [&](int64_t id, int type) {
    if (id != 4 || type != kList) return false;
    read_list(cursor, kStruct, [&](uint64_t) {
      ChunkFacts chunk;
      int64_t group_rows = -1;
      bool found = false;
      read_struct(cursor, 1, [&](int64_t field, int field_type) {
        if (field == 3) group_rows = read_number(cursor, field_type);
        if (field != 1 || field_type != kList) return field == 3;
        read_list(cursor, kStruct, [&](int64_t column) {
          auto facts = read_chunk(cursor);
          if (column == leaf) chunk = std::move(facts), found = true;
        });
        return true;
      });
      if (!found) throw NotPlain("a row group lacks its column");
      chunk.group_rows = group_rows;
      chunks.push_back(std::move(chunk));
    });
    return true;
  });
  return chunks;
}

}  // namespace realign_fast::io
