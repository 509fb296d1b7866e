// realign_fast._io: the Python module of the native readers and writers. It releases the GIL
// whenever it waits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>

#include "io/mapped_range.h"
#include "io/parquet/footer.h"
#include "io/parquet/parquet_pages.h"
#include "io/pickle/pickle_rows.h"
#include "io/shard_reader.h"

namespace py = pybind11;
using namespace realign_fast::io;
using without_gil = py::call_guard<py::gil_scoped_release>;

namespace {

using Reader = std::shared_ptr<ShardReader>;

Reader make_reader(int descriptor, int64_t begin, int64_t end, int64_t block_bytes, int64_t ahead,
                   int threads, std::shared_ptr<Ring> ring, bool direct) {
  auto* reader =
      new ShardReader(descriptor, begin, end, block_bytes, ahead, threads, std::move(ring), direct);
  return Reader(reader, [](ShardReader* ended) {
    if (ended->was_forked()) return;  // its threads are in the other process; this one leaks it
    py::gil_scoped_release release;   // its threads may be in the middle of a large read
    delete ended;
  });
}

py::buffer_info as_buffer(Block& block) {
  return {block.data, 1, py::format_descriptor<uint8_t>::format(), block.bytes};
}

// The contiguous buffer of a Python object, writable unless `flags` say otherwise. While this
// object lives, no other thread may resize it.
class BufferView {
 public:
  explicit BufferView(const py::object& object, int flags = PyBUF_CONTIG) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(view_.buf); }
  int64_t bytes() const { return view_.len; }

 private:
  Py_buffer view_;
};

// The mapping of a file that another library made, as a buffer.
class MappedBuffer {
 public:
  explicit MappedBuffer(const py::object& object)
      : view_(object, PyBUF_CONTIG_RO), range_(view_.data(), view_.bytes()) {}
  bool lost() const { return range_.lost(); }

 private:
  BufferView view_;
  MappedRange range_;
};

int64_t rows_in(const BufferView& target, int64_t row_bytes) {
  if (target.bytes() % row_bytes) {
    throw py::value_error("expected a buffer of a whole number of rows of " +
                          std::to_string(row_bytes) + " bytes, got " +
                          std::to_string(target.bytes()) + " bytes: not a whole number of rows");
  }
  return target.bytes() / row_bytes;
}

void read_pages(ParquetPages& pages, int64_t row, const py::object& out) {
  const BufferView target(out);
  const auto rows = rows_in(target, pages.row_bytes());
  py::gil_scoped_release release;
  pages.read(row, rows, target.data());
}

void read_pickled(const PickledRows& pickled, int descriptor, int64_t row, const py::object& out) {
  const BufferView target(out);
  const auto rows = rows_in(target, pickled.row_bytes());
  py::gil_scoped_release release;
  pickled.read(descriptor, row, rows, target.data());
}

void write_pickled(const PickledRows& pickled, int descriptor, int64_t row,
                   const py::object& numbers, int out) {
  const BufferView source(numbers, PyBUF_CONTIG_RO);
  const auto rows = rows_in(source, pickled.row_bytes());
  py::gil_scoped_release release;
  pickled.write(descriptor, row, rows, source.data(), out);
}

void check_pickle(const py::object& pickle, int64_t most_steps) {
  const BufferView view(pickle, PyBUF_CONTIG_RO);
  py::gil_scoped_release release;
  const auto* data = reinterpret_cast<const uint8_t*>(view.data());
  Window window(std::span(data, static_cast<size_t>(view.bytes())));
  find_rows(window, {}, most_steps);
}

void as_python_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& failed) {
    errno = failed.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
  } catch (const std::length_error& failed) {
    PyErr_SetString(PyExc_EOFError, failed.what());
  }
}

}  // namespace

PYBIND11_MODULE(_io, module) {
  module.doc() =
      "Native readers and writers of files: blocks read ahead, Parquet pages, pickled rows.";
  py::register_local_exception_translator(as_python_error);

  py::class_<Block>(module, "Block", py::buffer_protocol(),
                    "Bytes of a file as a buffer; writes to it never reach the file.")
      .def_buffer(&as_buffer)
      .def_property_readonly(
          "address",
          [](const Block& block) { return reinterpret_cast<uintptr_t>(block.memory.get()); })
      .def_property_readonly(
          "lost", [](const Block& block) { return block.range != nullptr && block.range->lost(); },
          "Whether pages of the file were gone when they were read; zeros are in their place.")
      .def("__len__", [](const Block& block) { return block.bytes; });

  py::class_<MappedBuffer>(
      module, "MappedBuffer",
      "A mapped file, given as a buffer, that the handler of `survive_lost_pages` knows.")
      .def(py::init<const py::object&>(), py::arg("buffer"))
      .def_property_readonly("lost", &MappedBuffer::lost, "Like `Block.lost`.");
  module.def("survive_lost_pages", &survive_lost_pages,
             "Install a handler of SIGBUS in this process: pages of mapped files that another\n"
             "process cuts off become zeros, and `lost` tells.");

  py::class_<Ring, std::shared_ptr<Ring>>(module, "Ring",
                                          "Page-aligned buffers for blocks of up to `bytes` bytes.")
      .def(py::init<int64_t, int64_t>(), py::arg("buffers"), py::arg("bytes"))
      .def_property_readonly("bytes", &Ring::bytes)
      .def_property_readonly("free", &Ring::free)
      .def_property_readonly("addresses", &Ring::addresses)
      .def(
          "take",
          [](Ring& ring) {
            auto memory = ring.take();
            return Block{memory, memory.get(), ring.bytes()};
          },
          "Return a buffer of `bytes` bytes; it returns to the ring when nothing refers to it.");

  py::class_<ShardReader, Reader>(
      module, "ShardReader",
      "Iterator over the bytes `begin`..`end` of an open file in blocks; several are read at "
      "once.\n\n"
      "Without a ring, a block is a mapped window of the file. With one, it is a buffer of the "
      "ring,\n"
      "read past the page cache if `direct`.\n"
      "Raises OSError if reading fails and EOFError if the file is shorter than `end`.")
      .def(py::init(&make_reader), py::arg("descriptor"), py::arg("begin"), py::arg("end"),
           py::arg("block_bytes"), py::kw_only(), py::arg("ahead") = 2, py::arg("threads") = 2,
           py::arg("ring") = std::shared_ptr<Ring>(), py::arg("direct") = true)
      .def_property_readonly("direct", &ShardReader::direct)
      .def("__iter__", [](ShardReader& reader) -> ShardReader& { return reader; })
      .def("__next__", [](ShardReader& reader) {
        Block block;
        {
          py::gil_scoped_release release;
          block = reader.next();
        }
        if (!block.memory) throw py::stop_iteration();
        return block;
      });

  py::register_exception<NotPlain>(module, "NotPlain", PyExc_ValueError);
  py::class_<ParquetPages>(
      module, "ParquetPages",
      "Rows of a Parquet column chunk, which is the bytes `begin`..`end` of an open file.\n\n"
      "Its pages must be uncompressed and PLAIN, without nulls, and every row must have\n"
      "`row_values` values. Raises NotPlain (a ValueError) otherwise, and OSError if reading "
      "fails.")
      .def(py::init([](int descriptor, int64_t begin, int64_t end, int64_t rows, int64_t row_values,
                       int64_t value_bytes, int max_definition, int max_repetition) {
             const ColumnChunk chunk = {
                 begin, end, rows, row_values, value_bytes, max_definition, max_repetition};
             return std::make_unique<ParquetPages>(descriptor, chunk);
           }),
           py::arg("descriptor"), py::arg("begin"), py::arg("end"), py::kw_only(), py::arg("rows"),
           py::arg("row_values"), py::arg("value_bytes"), py::arg("max_definition"),
           py::arg("max_repetition"))
      .def("read", &read_pages, py::arg("row"), py::arg("out"),
           "Fill `out`, a writable buffer, with the rows from `row` on.")
      .def("check", &ParquetPages::check, without_gil(),
           "Check the headers and levels of all pages without reading their values.");

  py::class_<ChunkFacts>(module, "ChunkFacts",
                         "A column chunk as the footer describes it; -1 stands for what is absent.")
      .def_readonly("group_rows", &ChunkFacts::group_rows)
      .def_readonly("codec", &ChunkFacts::codec)
      .def_readonly("values", &ChunkFacts::values)
      .def_readonly("bytes", &ChunkFacts::bytes)
      .def_readonly("data_offset", &ChunkFacts::data_offset)
      .def_readonly("encodings", &ChunkFacts::encodings)
      .def_readonly("has_dictionary", &ChunkFacts::has_dictionary)
      .def_readonly("is_elsewhere", &ChunkFacts::is_elsewhere);
  module.def("read_chunks", &read_chunks, without_gil(), py::arg("descriptor"), py::arg("leaf"),
             "Return the chunk of column `leaf` in each row group of a Parquet file, from its\n"
             "footer. Raises NotPlain if the footer is damaged, and OSError if reading fails.");

  module.def("check_pickle", &check_pickle, py::arg("pickle"), py::arg("most_steps"),
             "Check that a pickle, given as a buffer, is plain data that Python's unpickler may\n"
             "build; raises NotPlain otherwise.");
  py::class_<PickledRows>(
      module, "PickledRows",
      "The places of the rows of a pickled list of dicts in an open file of `bytes` bytes.\n\n"
      "The rows are under the first of `names` (one or two) that the first dict has; there are "
      "none\n"
      "if they are not of one type and length. Raises NotPlain (a ValueError) if the file is not\n"
      "plain data, and OSError if reading or writing fails.")
      .def(py::init<int, int64_t, const std::vector<std::string>&, int64_t>(), without_gil(),
           py::arg("descriptor"), py::arg("bytes"), py::arg("names"), py::arg("most_steps"))
      .def("__len__", &PickledRows::rows)
      .def_property_readonly("name", [](const PickledRows& rows) { return rows.list().name; })
      .def_property_readonly("columns", [](const PickledRows& rows) { return rows.list().columns; })
      .def_property_readonly("value_bytes",
                             [](const PickledRows& rows) { return rows.list().value_bytes; })
      .def_property_readonly("has_others",
                             [](const PickledRows& rows) { return rows.list().has_others; })
      .def_property_readonly(
          "replaceable", [](const PickledRows& rows) { return rows.list().replaceable; },
          "Whether `write` can be used: no other value shares the bytes of the rows.")
      .def("read", &read_pickled, py::arg("descriptor"), py::arg("row"), py::arg("out"),
           "Fill `out`, a writable buffer, with the rows from `row` on.")
      .def("write", &write_pickled, py::arg("descriptor"), py::arg("row"), py::arg("numbers"),
           py::arg("out"),
           "Append to the open file `out` the bytes from the end of the row before `row` on, with\n"
           "`numbers` in place of the rows; without numbers, append the rest of the file.");

  module.def(
      "start_writing", &start_writing, without_gil(), py::arg("descriptor"), py::arg("begin"),
      py::arg("bytes"),
      "Ask the kernel to write these bytes of a file to disk now, not when the file is synced.");
}
