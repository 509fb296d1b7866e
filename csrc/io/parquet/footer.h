// The places of the chunks of one column, from the footer of a Parquet file. pyarrow reads footers
// too, but the process ends where it meets an unknown codec there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace realign_fast::io {

// RowGroup and ColumnMetaData of parquet.thrift; -1 if the file does not give a number.
struct ChunkFacts {
  int64_t group_rows = -1, values = -1, bytes = -1, data_offset = -1;
  std::string codec;  // its name in parquet.thrift, or its number
  std::vector<std::string> encodings;
  bool has_dictionary = false;
  bool is_elsewhere = false;  // in another file, or encrypted
};

// Returns the chunks of column `leaf` (a number among the leaves of the schema), one for each row
// group. Throws NotPlain if the footer is damaged and std::system_error if reading fails.
std::vector<ChunkFacts> read_chunks(int descriptor, int64_t leaf);

}  // namespace realign_fast::io
