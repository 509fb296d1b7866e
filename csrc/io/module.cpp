// realign_fast._io: the Python module of the native readers and writers. It releases the GIL
// whenever it waits.
#include "io/python_types.h"  // first, as Python.h must be

#include "io/mapped_range.h"
#include "io/parquet/footer.h"
#include "io/parquet/parquet_pages.h"
#include "io/pickle/pickle_rows.h"
#include "io/shard_reader.h"

using namespace realign_fast::io;
using namespace realign_fast::io::python;

namespace {

// Blocks of bytes.

int fill_buffer(PyObject* self, Py_buffer* view, int flags) {
  const auto& block = value_of<Block>(self);
  return PyBuffer_FillInfo(view, self, block.data, block.bytes, 0, flags);
}

Py_ssize_t length_of_block(PyObject* self) { return value_of<Block>(self).bytes; }

uintptr_t address(const Block& block) { return reinterpret_cast<uintptr_t>(block.memory.get()); }
bool block_lost(const Block& block) { return block.range != nullptr && block.range->lost(); }

// The mapping of a file that another library made, as a buffer.
class MappedBuffer {
 public:
  explicit MappedBuffer(PyObject* object)
      : view_(object, PyBUF_CONTIG_RO), range_(view_.data(), view_.bytes()) {}
  bool lost() const { return range_.lost(); }

 private:
  BufferView view_;
  MappedRange range_;
};
using Mapped = std::unique_ptr<MappedBuffer>;

PyObject* new_mapped_buffer(PyObject* args, PyObject* keywords) {
  PyObject* buffer = nullptr;
  parse(args, keywords, "O:MappedBuffer", {"buffer"}, &buffer);
  return new_object<Mapped>([&] { return std::make_unique<MappedBuffer>(buffer); });
}

bool buffer_lost(const Mapped& mapped) { return mapped->lost(); }

PyObject* survive(PyObject* args, PyObject* keywords) {
  parse(args, keywords, ":survive_lost_pages", {});
  survive_lost_pages();
  return none();
}

struct EndReader {
  void operator()(ShardReader* reader) const {
    if (reader->was_forked()) return;     // its threads are in the other process; it leaks
    without_gil([&] { delete reader; });  // its threads may be in the middle of a large read
  }
};
using Reader = std::unique_ptr<ShardReader, EndReader>;

PyObject* new_reader(PyObject* args, PyObject* keywords) {
  int descriptor = 0, threads = 2;
  long long begin = 0, end = 0, block_bytes = 0, ahead = 2;
  parse(args, keywords, "iLLL|$Li:ShardReader",
        {"descriptor", "begin", "end", "block_bytes", "ahead", "threads"}, &descriptor, &begin,
        &end, &block_bytes, &ahead, &threads);
  return new_object<Reader>(
      [&] { return Reader(new ShardReader(descriptor, begin, end, block_bytes, ahead, threads)); });
}

PyObject* next_block(Reader& reader) {
  Block block = without_gil([&] { return reader->next(); });
  return block.memory ? wrap(std::move(block)) : nullptr;  // no error: StopIteration
}

// Rows of Parquet files and of pickled lists.

int64_t rows_in(const BufferView& target, int64_t row_bytes) {
  if (row_bytes == 0 || target.bytes() % row_bytes) {
    throw std::invalid_argument(
        "expected a buffer of a whole number of rows of " + std::to_string(row_bytes) +
        " bytes, got " + std::to_string(target.bytes()) + " bytes: not a whole number of rows");
  }
  return target.bytes() / row_bytes;
}

using Pages = std::unique_ptr<ParquetPages>;

PyObject* new_pages(PyObject* args, PyObject* keywords) {
  int descriptor = 0, max_definition = 0, max_repetition = 0;
  long long begin = 0, end = 0, rows = 0, row_values = 0, value_bytes = 0;
  parse(args, keywords, "iLL$LLLii:ParquetPages",
        {"descriptor", "begin", "end", "rows", "row_values", "value_bytes", "max_definition",
         "max_repetition"},
        &descriptor, &begin, &end, &rows, &row_values, &value_bytes, &max_definition,
        &max_repetition);
  const ColumnChunk chunk = {begin,          end,           rows, row_values, value_bytes,
                             max_definition, max_repetition};
  return new_object<Pages>([&] { return std::make_unique<ParquetPages>(descriptor, chunk); });
}

PyObject* read_pages(const Pages& pages, PyObject* args, PyObject* keywords) {
  long long row = 0;
  PyObject* out = nullptr;
  parse(args, keywords, "LO:read", {"row", "out"}, &row, &out);
  const BufferView target(out);
  const auto rows = rows_in(target, pages->row_bytes());
  without_gil([&] { pages->read(row, rows, target.data()); });
  return none();
}

PyObject* check_pages(const Pages& pages, PyObject* args, PyObject* keywords) {
  parse(args, keywords, ":check", {});
  without_gil([&] { pages->check(); });
  return none();
}

PyObject* read_footer(PyObject* args, PyObject* keywords) {
  int descriptor = 0;
  long long leaf = 0;
  parse(args, keywords, "iL:read_chunks", {"descriptor", "leaf"}, &descriptor, &leaf);
  auto chunks = without_gil([&] { return read_chunks(descriptor, leaf); });
  return list_of(std::move(chunks), wrap<ChunkFacts>);
}

PyObject* check_pickle(PyObject* args, PyObject* keywords) {
  PyObject* pickle = nullptr;
  long long most_steps = 0;
  parse(args, keywords, "OL:check_pickle", {"pickle", "most_steps"}, &pickle, &most_steps);
  const BufferView view(pickle, PyBUF_CONTIG_RO);
  const auto* data = reinterpret_cast<const uint8_t*>(view.data());
  without_gil([&] {
    Window window(std::span(data, static_cast<size_t>(view.bytes())));
    find_rows(window, {}, most_steps);
  });
  return none();
}

// Returns the strings of a sequence of str or bytes.
std::vector<std::string> strings_of(PyObject* sequence) {
  std::vector<std::string> strings;
  const Owned iterator(checked(PyObject_GetIter(sequence)));
  while (const Owned item{PyIter_Next(iterator.get())}) {
    const char* text = nullptr;
    Py_ssize_t bytes = 0;
    if (PyBytes_Check(item.get())) {
      PyBytes_AsStringAndSize(item.get(), const_cast<char**>(&text), &bytes);
    } else {
      text = PyUnicode_AsUTF8AndSize(item.get(), &bytes);
    }
    if (text == nullptr) throw ErrorIsSet();
    strings.emplace_back(text, bytes);
  }
  if (PyErr_Occurred()) throw ErrorIsSet();
  return strings;
}

PyObject* new_pickled_rows(PyObject* args, PyObject* keywords) {
  int descriptor = 0;
  long long bytes = 0, most_steps = 0;
  PyObject* sequence = nullptr;
  parse(args, keywords, "iLOL:PickledRows", {"descriptor", "bytes", "names", "most_steps"},
        &descriptor, &bytes, &sequence, &most_steps);
  const auto names = strings_of(sequence);
  return new_object<PickledRows>([&] {
    return without_gil([&] { return PickledRows(descriptor, bytes, names, most_steps); });
  });
}

Py_ssize_t length_of_list(PyObject* self) { return value_of<PickledRows>(self).rows(); }

int64_t list_name(const PickledRows& rows) { return rows.list().name; }
int64_t list_columns(const PickledRows& rows) { return rows.list().columns; }
int64_t list_value_bytes(const PickledRows& rows) { return rows.list().value_bytes; }
bool list_has_others(const PickledRows& rows) { return rows.list().has_others; }
bool list_replaceable(const PickledRows& rows) { return rows.list().replaceable; }

PyObject* read_pickled(const PickledRows& pickled, PyObject* args, PyObject* keywords) {
  int descriptor = 0;
  long long row = 0;
  PyObject* out = nullptr;
  parse(args, keywords, "iLO:read", {"descriptor", "row", "out"}, &descriptor, &row, &out);
  const BufferView target(out);
  const auto rows = rows_in(target, pickled.row_bytes());
  without_gil([&] { pickled.read(descriptor, row, rows, target.data()); });
  return none();
}

PyObject* write_pickled(const PickledRows& pickled, PyObject* args, PyObject* keywords) {
  int descriptor = 0, out = 0;
  long long row = 0;
  PyObject* numbers = nullptr;
  parse(args, keywords, "iLOi:write", {"descriptor", "row", "numbers", "out"}, &descriptor, &row,
        &numbers, &out);
  const BufferView source(numbers, PyBUF_CONTIG_RO);
  const auto rows = rows_in(source, pickled.row_bytes());
  without_gil([&] { pickled.write(descriptor, row, rows, source.data(), out); });
  return none();
}

PyObject* write_early(PyObject* args, PyObject* keywords) {
  int descriptor = 0;
  long long begin = 0, bytes = 0;
  parse(args, keywords, "iLL:start_writing", {"descriptor", "begin", "bytes"}, &descriptor, &begin,
        &bytes);
  without_gil([&] { start_writing(descriptor, begin, bytes); });
  return none();
}

void fill_module(PyObject* module) {
  not_plain = checked(PyErr_NewException("realign_fast._io.NotPlain", PyExc_ValueError, nullptr));
  Py_INCREF(not_plain);
  if (PyModule_AddObject(module, "NotPlain", not_plain) != 0) throw ErrorIsSet();

  add_type<Block>(
      module, "Block", "Bytes of a file as a buffer; writes to it never reach the file.",
      {{Py_bf_getbuffer, reinterpret_cast<void*>(&fill_buffer)},
       {Py_sq_length, reinterpret_cast<void*>(&length_of_block)}},
      {property<Block, address>("address"),
       property<Block, block_lost>(
           "lost",
           "Whether pages of the file were gone when they were read; zeros are in their place.")});
  add_type<Mapped>(
      module, "MappedBuffer",
      "MappedBuffer(buffer)\n\n"
      "A mapped file, given as a buffer, that the handler of `survive_lost_pages` knows.",
      {constructor<new_mapped_buffer>()},
      {property<Mapped, buffer_lost>("lost", "Like `Block.lost`.")});
  add_type<Reader>(
      module, "ShardReader",
      "ShardReader(descriptor, begin, end, block_bytes, *, ahead=2, threads=2)\n\n"
      "Iterator over the bytes `begin`..`end` of an open file in blocks, which are\n"
      "mapped; threads bring the pages of several in ahead.\n"
      "Raises OSError if reading fails and EOFError if the file is shorter than `end`.",
      {constructor<new_reader>(),
       {Py_tp_iter, reinterpret_cast<void*>(&PyObject_SelfIter)},
       slot<Reader, next_block>(Py_tp_iternext)});
  add_type<Pages>(
      module, "ParquetPages",
      "ParquetPages(descriptor, begin, end, *, rows, row_values, value_bytes, max_definition,\n"
      "             max_repetition)\n\n"
      "Rows of a Parquet column chunk, which is the bytes `begin`..`end` of an open file.\n\n"
      "Its pages must be uncompressed and PLAIN, without nulls, and every row must have\n"
      "`row_values` values. Raises NotPlain (a ValueError) otherwise, and OSError if reading "
      "fails.",
      {constructor<new_pages>()}, {},
      {method<Pages, read_pages>("read",
                                 "Fill `out`, a writable buffer, with the rows from `row` on."),
       method<Pages, check_pages>(
           "check", "Check the headers and levels of all pages without reading their values.")});
  add_type<ChunkFacts>(module, "ChunkFacts",
                       "A column chunk as the footer describes it; -1 stands for what is absent.",
                       {},
                       {property<ChunkFacts, &ChunkFacts::group_rows>("group_rows"),
                        property<ChunkFacts, &ChunkFacts::codec>("codec"),
                        property<ChunkFacts, &ChunkFacts::values>("values"),
                        property<ChunkFacts, &ChunkFacts::bytes>("bytes"),
                        property<ChunkFacts, &ChunkFacts::data_offset>("data_offset"),
                        property<ChunkFacts, &ChunkFacts::encodings>("encodings"),
                        property<ChunkFacts, &ChunkFacts::has_dictionary>("has_dictionary"),
                        property<ChunkFacts, &ChunkFacts::is_elsewhere>("is_elsewhere")});
  add_type<PickledRows>(
      module, "PickledRows",
      "PickledRows(descriptor, bytes, names, most_steps)\n\n"
      "The places of the rows of a pickled list of dicts in an open file of `bytes` bytes.\n\n"
      "The rows are under the first of `names` (one or two) that the first dict has; there are\n"
      "none if they are not of one type and length. Raises NotPlain (a ValueError) if the file is\n"
      "not plain data, and OSError if reading or writing fails.",
      {constructor<new_pickled_rows>(), {Py_sq_length, reinterpret_cast<void*>(&length_of_list)}},
      {property<PickledRows, list_name>("name"), property<PickledRows, list_columns>("columns"),
       property<PickledRows, list_value_bytes>("value_bytes"),
       property<PickledRows, list_has_others>("has_others"),
       property<PickledRows, list_replaceable>(
           "replaceable",
           "Whether `write` can be used: no other value shares the bytes of the rows.")},
      {method<PickledRows, read_pickled>(
           "read", "Fill `out`, a writable buffer, with the rows from `row` on."),
       method<PickledRows, write_pickled>(
           "write",
           "Append to the open file `out` the bytes from the end of the row before `row` on, with\n"
           "`numbers` in place of the rows; without numbers, append the rest of the file.")});
}

PyMethodDef functions[] = {
    method<void, survive>(
        "survive_lost_pages",
        "Install a handler of SIGBUS in this process: pages of mapped files that another\n"
        "process cuts off become zeros, and `lost` tells."),
    method<void, read_footer>(
        "read_chunks",
        "Return the chunk of column `leaf` in each row group of a Parquet file, from its\n"
        "footer. Raises NotPlain if the footer is damaged, and OSError if reading fails."),
    method<void, check_pickle>(
        "check_pickle",
        "Check that a pickle, given as a buffer, is plain data that Python's unpickler may build;\n"
        "raises NotPlain otherwise."),
    method<void, write_early>(
        "start_writing",
        "Ask the kernel to write these bytes of a file to disk now, not when the file is synced."),
    {}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_io",
    "Native readers and writers of files: blocks read ahead, Parquet pages, pickled rows.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__io() {
  return guarded([] {
    Owned module(checked(PyModule_Create(&definition)));
    fill_module(module.get());
    return module.release();
  });
}
