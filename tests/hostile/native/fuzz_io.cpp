// A libFuzzer target for the native readers: hostile bytes may end in NotPlain, never in a crash,
// an overrun or a number of rows that was not read. tests/hostile/fuzz_native.py builds and runs
// it.
//
// An input is its first kHead bytes, which choose the reader and its parameters, and a file.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "io/errors.h"
#include "io/parquet/footer.h"
#include "io/parquet/parquet_pages.h"
#include "io/pickle/pickle_rows.h"

using namespace realign_fast::io;

namespace {

constexpr size_t kHead = 4;
constexpr int64_t kMaxSteps = 1 << 16;  // opcodes of a pickle
constexpr int64_t kMaxBytes = 1 << 20;  // of rows that are copied out at a time
constexpr int64_t kValueBytes[] = {2, 4, 8, 16, 32};

// One file in memory, whose contents every input replaces.
int file_of(const uint8_t* data, size_t bytes) {
  static const int descriptor = memfd_create("input", 0);
  if (ftruncate(descriptor, 0) != 0) abort();
  if (pwrite(descriptor, data, bytes, 0) != static_cast<ssize_t>(bytes)) abort();
  return descriptor;
}

void read_pickle(int descriptor, int64_t bytes, uint8_t choice) {
  std::vector<std::string> names = {"embed", "embedding"};
  if (choice & 1) names.pop_back();
  const PickledRows rows(descriptor, bytes, names, kMaxSteps);
  if (rows.rows() == 0) return;  // plain data without such rows
  const int64_t row_bytes = rows.row_bytes();
  if (row_bytes <= 0 || row_bytes > bytes * 8) abort();  // a row lies in the file
  const int64_t count = std::min(rows.rows(), std::max<int64_t>(1, kMaxBytes / row_bytes));
  std::vector<std::byte> out(count * row_bytes);
  rows.read(descriptor, 0, count, out.data());
  if (!rows.list().replaceable) return;
  static const int copy = memfd_create("copy", 0);
  if (ftruncate(copy, 0) != 0 || lseek(copy, 0, SEEK_SET) != 0) abort();
  // The rows written over themselves give the file again.
  if (count < rows.rows()) return;
  rows.write(descriptor, 0, count, out.data(), copy);
  rows.write(descriptor, count, 0, nullptr, copy);
  std::vector<uint8_t> before(bytes), after(bytes);
  if (pread(descriptor, before.data(), bytes, 0) != bytes) abort();
  if (pread(copy, after.data(), bytes, 0) != bytes || lseek(copy, 0, SEEK_END) != bytes) abort();
  if (before != after) abort();
}

void read_pages(int descriptor, int64_t bytes, const uint8_t* head) {
  const int64_t row_values = head[1] % 17 + 1, value_bytes = kValueBytes[head[2] % 5];
  const int max_definition = head[3] % 4, max_repetition = head[3] / 4 % 2;
  for (const ChunkFacts& chunk : read_chunks(descriptor, head[2] / 5 % 3)) {
    // What the Python caller checks first (realign_fast/corpus/formats/parquet.py).
    const int64_t begin = chunk.data_offset, rows = chunk.group_rows;
    if (begin < 0 || chunk.bytes < 0 || begin > bytes || chunk.bytes > bytes - begin) continue;
    if (rows < 0 || rows > bytes * 8 || chunk.values != rows * row_values) continue;
    ParquetPages pages(descriptor, {begin, begin + chunk.bytes, rows, row_values, value_bytes,
                                    max_definition, max_repetition});
    const int64_t count = std::min(rows, kMaxBytes / pages.row_bytes());
    std::vector<std::byte> out(count * pages.row_bytes());
    pages.read(0, count, out.data());
    pages.read(count / 2, count - count / 2, out.data());
    pages.check();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < kHead) return 0;
  const auto bytes = static_cast<int64_t>(size - kHead);
  const int descriptor = file_of(data + kHead, bytes);
  try {
    if (data[0] & 1) {
      read_pages(descriptor, bytes, data);
    } else {
      read_pickle(descriptor, bytes, data[1]);
    }
  } catch (const NotPlain&) {  // the Python reader takes over
  }
  return 0;
}
