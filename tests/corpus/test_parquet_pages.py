"""Rows read straight out of parquet pages are pyarrow's rows; what is not plain is left to it."""

import os
import re
from itertools import groupby

import numpy as np
import pytest
import torch
from support.memory import forked

from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.corpus.formats import parquet
from realign_fast.corpus.formats.parquet import ColumnPages, ParquetShard
from realign_fast.storage.paths import storage_path

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FLOATS = ("float16", "float32", "float64")
KINDS = ("list", "large_list", "fixed_list", "binary")
PLAIN = {"compression": "none", "use_dictionary": False}


pytestmark = pytest.mark.usefixtures("needs_the_reader")


@pytest.fixture
def only_direct(monkeypatch):
    """Decoding a row by pyarrow is an error."""

    def refuse(*arguments):
        raise AssertionError("pyarrow was asked for rows")

    monkeypatch.setattr(ParquetShard, "_decoded", refuse)


def random_rows(count, columns, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(dtype)


def save(path, rows, kind="list", *, nullable=True, element=True, **options):
    """Rows as a column `embedding`, behind another one; plain unless options say otherwise."""
    values, count, columns = pa.array(rows.reshape(-1)), *rows.shape
    item = pa.field("element", values.type, nullable=element)
    offsets = np.arange(count + 1) * columns
    if kind == "binary":
        width, data = pa.binary(columns * rows.itemsize), pa.py_buffer(rows)
        array = pa.FixedSizeBinaryArray.from_buffers(width, count, [None, data])
    elif kind == "fixed_list":
        array = pa.FixedSizeListArray.from_arrays(values, type=pa.list_(item, columns))
    elif kind == "list":
        array = pa.ListArray.from_arrays(offsets.astype("i4"), values, type=pa.list_(item))
    else:
        array = pa.LargeListArray.from_arrays(offsets, values, type=pa.large_list(item))
    field = pa.field("embedding", array.type, nullable, metadata={"dtype": str(rows.dtype)})
    schema = pa.schema([pa.field("id", pa.string()), field])
    table = pa.Table.from_arrays([pa.array(map(str, range(count))), array], schema=schema)
    pq.write_table(table, path, **(PLAIN | options))
    return path


def read(path, **options):
    parts = [batch.rows for batch in Corpus(path).batches(**options)]
    return torch.cat(parts).numpy() if parts else None


def is_direct(path):
    """Whether the compiled reader reads all row groups of a file."""
    with parquet._opened(storage_path(path)) as (file, descriptor, _):
        pages = ColumnPages(file, descriptor, Corpus(path).shards[0])
        try:
            for group in range(file.num_row_groups):
                pages.of(group).check()
        except ValueError:
            return False
    return True


# What is read directly.


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_were_written(tmp_path, only_direct, kind, dtype, version):
    for columns in (1, 2, 7, 8, 9, 64, 300):
        rows = random_rows(41, columns, dtype)
        path = save(tmp_path / "x.parquet", rows, kind, data_page_version=version)
        np.testing.assert_array_equal(read(path, batch_rows=10), rows)
        assert is_direct(path)


@pytest.mark.parametrize("element", [True, False])
@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_may_be_nullable_or_not(tmp_path, only_direct, kind, nullable, element):
    rows = random_rows(23, 5)
    path = save(tmp_path / "x.parquet", rows, kind, nullable=nullable, element=element)
    np.testing.assert_array_equal(read(path), rows)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("kind", ["list", "binary"])
def test_reading_begins_at_any_row(tmp_path, only_direct, kind, version):
    """Of several row groups, each of several pages."""
    rows = random_rows(60, 20)
    pages = {"data_page_size": 400, "write_batch_size": 30, "data_page_version": version}
    path = save(tmp_path / "x.parquet", rows, kind, row_group_size=23, **pages)
    for start in range(60):
        np.testing.assert_array_equal(read(path, batch_rows=7, start=start), rows[start:])
        first = next(Corpus(path).batches(batch_rows=7, start=start))
        assert first.first == start and len(first.rows) == min(7 - start % 7, 60 - start)


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def level_bytes(levels, width, packed):
    """Levels as parquet writes them, all in groups of 8 or all in runs, behind their length."""
    if packed:
        levels = np.pad(levels, (0, -len(levels) % 8), constant_values=1)
        bits = levels[:, None] >> np.arange(width) & 1
        data = varint(len(levels) // 8 << 1 | 1) + np.packbits(bits, bitorder="little").tobytes()
    else:
        runs = ((len(list(run)), level) for level, run in groupby(levels.tolist()))
        data = b"".join(varint(length << 1) + bytes([level]) for length, level in runs)
    return len(data).to_bytes(4, "little") + data


def made_page(values, first, row, most, packed):
    """A page v1 of the values from place `first` on; `most` is the level of one that is there."""
    repetition = (np.arange(first, first + len(values)) % row > 0).astype(int)
    levels = level_bytes(repetition, 1, packed)
    levels += level_bytes(np.full(len(values), most), most.bit_length(), packed)
    size, count = (varint(2 * n) for n in (len(levels) + values.nbytes, len(values)))
    head = b"\x15\x00\x15" + size + b"\x15" + size  # type, the two sizes
    head += b"\x2c\x15" + count + b"\x15\x00\x15\x06\x15\x06\x00\x00"  # PLAIN, levels RLE
    return head + levels + values.tobytes()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [1, 2, 3])  # a bare list, one of two levels, one of three
@pytest.mark.parametrize(
    ("columns", "step"), [(30, 7), (30, 30), (30, 64), (5, 16), (1, 3), (8, 1)]
)
def test_pages_may_end_inside_rows(tmp_path, columns, step, most, packed):
    """As other writers cut them; pages that pyarrow writes begin with a row."""
    rows = random_rows(23, columns)
    flat, empty = rows.reshape(-1), rows[:0].reshape(-1)
    places = range(0, len(flat), step)
    pages = [made_page(flat[i : i + step], i, columns, most, packed) for i in places]
    pages.insert(2, made_page(empty, 2 * step, columns, most, packed))
    path = tmp_path / "pages"
    path.write_bytes(b"before" + b"".join(pages) + b"behind")
    sizes = {"rows": 23, "row_values": columns, "value_bytes": 4}
    levels = {"max_definition": most, "max_repetition": 1}
    with open(path, "rb") as file:
        end = path.stat().st_size - 6
        reader = parquet._io.ParquetPages(file.fileno(), 6, end, **sizes, **levels)
    reader.check()
    for first in (0, 22, 11, 10, 3):  # back and forth
        out = np.full((23 - first, columns), np.nan, "f4")
        reader.read(first, out)
        np.testing.assert_array_equal(out, rows[first:])


def test_batches_that_are_kept_stay_as_they_are(tmp_path, only_direct):
    """Memory is used again, and only when nobody looks at it."""
    rows = random_rows(64, 20)
    path = save(tmp_path / "x.parquet", rows, row_group_size=40)
    kept = [batch.rows[1:] for batch in Corpus(path).batches(batch_rows=8)]
    expected = np.concatenate([part[1:] for part in np.split(rows, 8)])
    np.testing.assert_array_equal(torch.cat(kept), expected)


def test_rows_are_taken_by_their_numbers(tmp_path, only_direct, monkeypatch):
    rows = random_rows(200, 24, "float16")
    pages = {"data_page_size": 500, "write_batch_size": 50, "row_group_size": 70}
    path = save(tmp_path / "x.parquet", rows, **pages)
    monkeypatch.delattr(ParquetShard, "pieces")  # no stretch of rows is read
    ids = [199, 0, 69, 70, 70, 139, 140, 5]
    np.testing.assert_array_equal(Corpus(path).take(ids), rows[ids])


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_we_write_we_read_directly(tmp_path, only_direct, dtype):
    rows = random_rows(3000, 24, dtype)
    np.save(tmp_path / "x.npy", rows)
    convert(Corpus(tmp_path / "x.npy"), tmp_path / "out", "parquet")
    path = tmp_path / "out" / "x.parquet"
    assert is_direct(path)
    np.testing.assert_array_equal(read(path), rows)


# What is left to pyarrow.


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"use_byte_stream_split": ["embedding.list.element"]},
        {"write_page_checksum": True},
    ],
)
def test_another_way_of_writing_is_pyarrows_to_read(tmp_path, options):
    rows = random_rows(50, 6)
    path = save(tmp_path / "x.parquet", rows, row_group_size=20, **options)
    assert not is_direct(path)
    np.testing.assert_array_equal(read(path, batch_rows=7, start=9), rows[9:])
    np.testing.assert_array_equal(Corpus(path).take([3, 49]), rows[[3, 49]])


def test_without_the_compiled_reader_pyarrow_reads(tmp_path, monkeypatch):
    rows = random_rows(50, 6)
    path = save(tmp_path / "x.parquet", rows)
    monkeypatch.setattr(parquet, "_io", None)
    np.testing.assert_array_equal(read(path), rows)
    np.testing.assert_array_equal(Corpus(path).take([7, 8]), rows[[7, 8]])
    assert not is_direct(path)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("wrong", [None, [1.0, None], []])
def test_a_wrong_row_is_not_a_number_and_those_around_it_are_read(tmp_path, wrong, version):
    values = [[float(i), 1.0] for i in range(100)]
    expected, values[57] = np.array(values, np.float32), wrong
    expected[57] = [1.0, np.nan] if wrong == [1.0, None] else np.nan
    table = pa.table({"embedding": pa.array(values, pa.list_(pa.float32()))})
    path = tmp_path / "x.parquet"
    pages = {"data_page_size": 16, "write_batch_size": 3, "data_page_version": version}
    pq.write_table(table, path, row_group_size=20, **pages, **PLAIN)
    np.testing.assert_array_equal(read(path, batch_rows=5), expected)
    assert read(path, start=60)[0, 0] == 60
    np.testing.assert_array_equal(Corpus(path).take([10, 57, 70]), expected[[10, 57, 70]])


def test_pyarrow_goes_on_in_the_middle_of_a_row_group(tmp_path, monkeypatch):
    """At a page that states a wrong number of rows, which pyarrow does not ask for."""
    rows, pages = random_rows(40, 6), {"data_page_version": "2.0", "write_batch_size": 10}
    path = save(tmp_path / "x.parquet", rows, "binary", data_page_size=16, **pages)
    begin = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    damaged = bytearray(path.read_bytes())
    heads = list(re.finditer(rb"\x5c\x15\x14\x15\x00\x15(\x14)", damaged[begin:]))
    damaged[begin + heads[2].start(1)] = 2 * 9
    path.write_bytes(damaged)
    asked, decode = [], ParquetShard._decoded

    def record(self, file, group, row, first, size):
        asked.append((group, row, first))
        return decode(self, file, group, row, first, size)

    monkeypatch.setattr(ParquetShard, "_decoded", record)
    np.testing.assert_array_equal(read(path, batch_rows=7), rows)
    assert asked == [(0, 0, 14)], "(row 20 lies in the page, batches are of 7 rows)"


@pytest.mark.parametrize("wrong", [[[1.0]], [[1.0, 2.0, 3.0, 4.0]], [[3.0], [4.0, 5.0, 6.0]]])
def test_a_row_of_another_length_is_named(tmp_path, wrong):
    """Also where two lengths make up for each other."""
    values = [[1.0, 2.0]] * 57 + wrong + [[7.0, 8.0]]
    table = pa.table({"embedding": pa.array(values, pa.list_(pa.float32()))})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=20, data_page_size=16, **PLAIN)
    with pytest.raises(ValueError, match=rf"{path}: row 57 of column 'embedding' has \d numbers"):
        read(path, batch_rows=5)
    np.testing.assert_array_equal(Corpus(path).take([10]), [[1.0, 2.0]])


def test_a_null_fixed_size_binary_is_seen(tmp_path):
    array = pa.array([b"12345678", None, b"12345678"], pa.binary(8))
    pq.write_table(pa.table({"embedding": array}), tmp_path / "x.parquet", **PLAIN)
    (batch,) = Corpus(tmp_path / "x.parquet", column="embedding:float32").batches()
    assert batch.rows.isnan().all(dim=1).tolist() == [False, True, False]


def test_a_page_that_differs_from_its_checksum_is_refused(tmp_path):
    rows = random_rows(50, 6)
    path = save(tmp_path / "x.parquet", rows, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(rows[20].tobytes())] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"x\.parquet: cannot be read .*CRC"):
        read(path)


def test_a_column_whose_name_could_be_anothers_is_read_by_pyarrow(tmp_path):
    rows = random_rows(5, 2)
    lists = pa.array(rows.tolist(), pa.list_(pa.float32()))
    columns = {"a": lists, "a.b": pa.array(range(5))}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", **PLAIN)
    corpus = Corpus(tmp_path / "x.parquet", column="a")
    np.testing.assert_array_equal(corpus.take(range(5)), rows)


# Hostile bytes.


def outcome(path):
    try:
        return read(path, batch_rows=7)
    except (ValueError, TypeError, OSError) as error:
        assert str(path) in str(error)
        return None


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("kind", ["list", "binary"])
def test_damaged_files_are_read_as_pyarrow_reads_them(tmp_path, monkeypatch, kind, version):
    """Rows that pyarrow reads we read, the same ones; what it refuses never crashes."""
    pages = {"data_page_size": 200, "write_batch_size": 20, "data_page_version": version}
    path = save(tmp_path / "x.parquet", random_rows(40, 6), kind, row_group_size=30, **pages)
    whole, generator = path.read_bytes(), np.random.default_rng(5)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    begin, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    read_by_pyarrow = 0
    for _ in range(150):
        path.write_bytes(damaged(whole, generator, begin, end, 4))
        ours, theirs = both_outcomes(path, monkeypatch)
        if theirs is not None:
            read_by_pyarrow += 1
            np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    assert read_by_pyarrow > 30


def damaged(whole, generator, begin, end, most):
    """Return the bytes of a file with one byte or several, below `most`, drawn anew in a part."""
    contents = np.frombuffer(whole, np.uint8).copy()
    places = generator.integers(begin, end, generator.integers(1, most))
    contents[places] = generator.integers(0, 256, len(places))
    return contents.tobytes()


def both_outcomes(path, monkeypatch):
    """Return what the direct reader and what pyarrow alone reads of a file."""
    ours = outcome(path)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_io", None)
        return ours, outcome(path)


def test_an_unknown_codec_is_an_error_and_no_abort(tmp_path):
    """pyarrow throws through Python's frames where it is asked for the name of such a codec."""
    path = save(tmp_path / "x.parquet", random_rows(40, 6), "fixed_list")
    whole = path.read_bytes()
    codec = whole.rindex(b"element\x15\x00\x16") + len(b"element\x15")
    path.write_bytes(whole[:codec] + b"\x5a" + whole[codec + 1 :])

    def read_it():
        assert not is_direct(path)
        for read_rows in (read, lambda path: Corpus(path).take([3])):
            with pytest.raises(ValueError, match=rf"{path}: cannot be read .*codec"):
                read_rows(path)

    assert forked(read_it) == ("", 0)


@pytest.mark.parametrize("kind", ["list", "fixed_list", "binary"])
def test_damaged_footers_end_no_process_and_change_no_rows(tmp_path, monkeypatch, kind):
    path = save(tmp_path / "x.parquet", random_rows(40, 6), kind, row_group_size=30)
    whole, generator = path.read_bytes(), np.random.default_rng(7)
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")

    def read_them():
        read_by_both = 0
        for _ in range(120):
            path.write_bytes(damaged(whole, generator, begin, len(whole) - 8, 3))
            ours, theirs = both_outcomes(path, monkeypatch)
            if ours is not None and theirs is not None:
                read_by_both += 1
                np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
            assert (ours is None) == (theirs is None)
        assert read_by_both > 10

    assert forked(read_them) == ("", 0)


def test_a_chunk_that_ends_early_or_late_is_not_read(tmp_path):
    rows = random_rows(40, 6)
    path = save(tmp_path / "x.parquet", rows)
    begin = pq.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    sizes = {"rows": 40, "row_values": 6, "value_bytes": 4, "max_definition": 3}
    out = np.empty_like(rows)
    with open(path, "rb") as file:
        for end in (begin, begin + 1, begin + 30, begin + rows.nbytes, 1 << 40):
            pages = parquet._io.ParquetPages(file.fileno(), begin, end, **sizes, max_repetition=1)
            if end == 1 << 40:
                file.close()  # (it has a descriptor of its own)
                os.truncate(path, begin + 200)
            with pytest.raises(parquet._io.NotPlain):
                pages.read(0, out)


def test_only_whole_rows_of_the_chunk_are_read_into_memory_that_may_be_written(tmp_path):
    path = save(tmp_path / "x.parquet", random_rows(40, 6))
    with open(path, "rb") as file:
        shard = Corpus(path).shards[0]
        pages = ColumnPages(pq.ParquetFile(path), file.fileno(), shard).of(0)
    for row in (-1, 38, 41, 1 << 62):
        with pytest.raises(IndexError, match="has 40 rows"):
            pages.read(row, np.empty((3, 6), "f4"))
    with pytest.raises(ValueError, match="whole number of rows"):
        pages.read(0, np.empty(7, "f4"))
    for wrong in (b"x" * 24, np.empty((6, 3), "f4").T):
        with pytest.raises((BufferError, ValueError)):
            pages.read(0, wrong)
