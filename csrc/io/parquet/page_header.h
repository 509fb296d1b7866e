// The headers of the pages of a Parquet column chunk.
#pragma once

#include "io/parquet/thrift.h"

namespace realign_fast::io {

enum class PageType { data = 0, index = 1, dictionary = 2, data_v2 = 3 };
enum class Encoding { plain = 0, rle = 3 };

// PageHeader of parquet.thrift with the fields of its DataPageHeader or DataPageHeaderV2. A field
// is -1 if the file does not give it.
struct PageHeader {
  int64_t type = -1, uncompressed_bytes = -1, bytes = -1;
  bool has_checksum = false, has_data = false, has_data_v2 = false;
  int64_t values = -1, encoding = -1;
  int64_t definition_encoding = -1, repetition_encoding = -1;                   // version 1
  int64_t nulls = -1, rows = -1, definition_bytes = -1, repetition_bytes = -1;  // version 2
};

// Reads a header and moves the cursor to the first byte after it.
PageHeader read_page_header(Cursor& cursor);

}  // namespace realign_fast::io
