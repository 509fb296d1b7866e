"""Rows that are copied out of pickled files are those that Python's unpickler builds."""

import pickle
import pickletools
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realign_fast.corpus import Corpus
from realign_fast.corpus.formats import pickle_list
from realign_fast.storage.paths import storage_path

FAST = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


_io = pickle_list._io
pytestmark = pytest.mark.usefixtures("needs_the_reader")


@pytest.fixture
def only_direct(monkeypatch):
    """Nothing is built."""
    monkeypatch.setattr(pickle_list, "build", None)


def random_rows(count, columns=6, dtype="float32", seed=0):
    return (np.random.default_rng(seed).standard_normal((count, columns)) + 1).astype(dtype)


def entries_of(rows, make=np.array):
    shared = ["one list", ("for", 1), np.arange(3)]
    return [
        {
            "id": f"é{i}" if i % 2 else np.str_(f"漢{i}"),
            "embed": make(row),
            "text": None if i == 1 else "x" * (90 * i),
            "more": {"n": i, 5: [1.5, True, -(2**40), 2**80], "raw": b"\0" * 300, "shared": shared},
            "box": np.arange(4.0).reshape(2, 2),
            "none": np.zeros((0, 4), "i8"),
            "score": np.float16(i),
        }
        for i, row in enumerate(rows)
    ]


def save(path, value, protocol=4):
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    pickle_list._located.cache_clear()  # (a file may be written twice in a tick)
    pickle_list._entries.cache_clear()
    return path


def read(path, **options):
    corpus = Corpus(path, column=options.pop("column", None), allow_pickle=True)
    return torch.cat([batch.rows for batch in corpus.batches(**options)]).numpy()


def rewrite(path, out, rows):
    """`path` with other rows, two at a time."""
    shard = Corpus(path, allow_pickle=True).shards[0]
    with shard.writer(out) as writer:
        for first in range(0, len(rows), 2):
            writer.write(torch.from_numpy(rows[first : first + 2].copy()))
    return out.read_bytes()


def is_direct(path):
    return Corpus(path, allow_pickle=True).shards[0].places is not None


# What is read directly.


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_are_those_that_were_saved(tmp_path, only_direct, protocol, dtype):
    for columns in (1, 2, 7, 300):
        rows = random_rows(11, columns, dtype)
        for make in (np.array, lambda row: row[None], lambda row: row[None].T.T.copy("F")):
            path = save(tmp_path / "x.pkl", entries_of(rows, make), protocol)
            got = read(path, batch_rows=4)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_lists_of_floats(tmp_path, only_direct, protocol):
    for columns in (1, 2, 999, 1000, 1001, 2500, 20_000):
        rows = random_rows(3, columns, "float64")
        rows[0, 0] = np.nan
        path = save(tmp_path / "x.pkl", entries_of(rows, np.ndarray.tolist), protocol)
        np.testing.assert_array_equal(read(path), rows)
        made = rewrite(path, tmp_path / "out" / "x.pkl", -rows)
        np.testing.assert_array_equal([one["embed"] for one in pickle.loads(made)], -rows)


def test_reading_begins_at_any_row_and_takes_single_ones(tmp_path, only_direct):
    rows = random_rows(60)
    path = save(tmp_path / "x.pkl", entries_of(rows))
    for start in range(60):
        np.testing.assert_array_equal(read(path, batch_rows=7, start=start), rows[start:])
        first = next(Corpus(path, allow_pickle=True).batches(batch_rows=7, start=start))
        assert first.first == start and len(first.rows) == min(7 - start % 7, 60 - start)
    np.testing.assert_array_equal(
        Corpus(path, allow_pickle=True).take([59, 0, 3]), rows[[59, 0, 3]]
    )


def test_the_key_is_the_one_asked_for(tmp_path, only_direct):
    first, second, third = (random_rows(4, seed=seed) for seed in range(3))
    entries = [
        {"embedding": a, "embed": b, "numpy": c}
        for a, b, c in zip(first, second, third, strict=True)
    ]
    path = save(tmp_path / "x.pkl", entries)
    np.testing.assert_array_equal(read(path), second)
    np.testing.assert_array_equal(read(path, column="embedding"), first)
    np.testing.assert_array_equal(read(path, column="numpy"), third)
    path = save(tmp_path / "y.pkl", [{"embedding": row} for row in first])
    np.testing.assert_array_equal(read(path), first)
    shard = Corpus(path, allow_pickle=True).shards[0]
    assert shard.column == "embedding" and not shard.has_other_columns
    assert Corpus(tmp_path / "x.pkl", allow_pickle=True).shards[0].places.has_others


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_files_of_numpy_1_are_read_too(tmp_path, only_direct, protocol):
    rows = random_rows(5)
    data = pickle.dumps([{"embed": row} for row in rows], protocol=protocol)
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        data = data.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)
        data = data.replace(b"c" + new, b"c" + old)
    data = data[:2] + data[11:] if protocol > 3 else data  # without its frame, which is shorter now
    assert b"_core" not in data and b"numpy.core" in data
    np.testing.assert_array_equal(read(save(tmp_path / "x.pkl", data)), rows)


def test_threads_read_and_copy_at_once(tmp_path, only_direct):
    rows, wrong = random_rows(500, 50), []
    path = save(tmp_path / "x.pkl", entries_of(rows))
    corpus = Corpus(path, allow_pickle=True)

    def work(number):
        for start in range(0, 500, 50):
            batches = corpus.batches(0, batch_rows=64, start=start)
            got = torch.cat([batch.rows for batch in batches]).numpy()
            wrong.extend([number] * (not np.array_equal(got, rows[start:])))
        made = rewrite(path, tmp_path / str(number) / "x.pkl", rows)
        wrong.extend([number] * (made != path.read_bytes()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What is written.


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("make", [np.array, lambda row: row[None], np.ndarray.tolist])
def test_a_copy_has_other_rows_and_nothing_else(tmp_path, only_direct, make, protocol):
    before, after = random_rows(9, 40, "float64"), random_rows(9, 40, "float64", seed=1)
    path = save(tmp_path / "x.pkl", entries_of(before, make), protocol)
    assert rewrite(path, tmp_path / "same" / "x.pkl", before) == path.read_bytes()
    made = rewrite(path, tmp_path / "out" / "x.pkl", after)
    assert made == pickle.dumps(entries_of(after, make), protocol=protocol)


def shared_rows():
    """Pickles in which the bytes of a row are also those of something else."""
    row, other = random_rows(2)
    entry = {"id": 1, "embed": row}
    yield "another key", [{"embed": row, "again": row}, {"embed": other}]
    yield "another entry", [{"embed": other, "list": [row]}, {"embed": row}]
    yield "an earlier entry", [{"embed": row}, {"embed": other, "parent": {"row": row}}]
    yield "rows", [{"embed": row}, {"embed": row}]
    yield "an entry", [entry, {"embed": other, "parent": entry}]
    floats = row.tolist()
    yield "a list", [{"embed": floats, "again": floats}, {"embed": other.tolist()}]
    whole = [{"embed": row}]
    whole[0]["all"] = whole
    yield "the whole", whole
    state = pickle.dumps([{"embed": row, "x": 5}], protocol=4)
    count = memos(state[: state.rindex(b"t\x94b")])
    yield "a state", fetched(state, count)
    yield "bytes", fetched(state, count - 1)


def memos(begin):
    """How many values a pickle of protocol 4 that begins so has in its memo."""
    return sum(op.name == "MEMOIZE" for op, *_ in pickletools.genops(begin + b"."))


def fetched(data, place):
    """A pickle with a value out of its memo where it has a five."""
    assert data.count(b"K\x05") == 1
    return data.replace(b"K\x05", b"h" + bytes([place]))


SHARED = [name for name, _ in shared_rows()]


@pytest.mark.parametrize("name", SHARED)
def test_bytes_that_others_share_are_not_written_over(tmp_path, name):
    path = save(tmp_path / "x.pkl", dict(shared_rows())[name])
    shard = Corpus(path, allow_pickle=True).shards[0]
    assert shard.places is not None and not shard.places.replaceable
    rows = -read(path)
    expected = repr(plain(with_rows(path, "embed", rows)))
    made = rewrite(path, tmp_path / "out" / "x.pkl", rows)
    assert repr(plain(pickle_list.build(made))) == expected
    np.testing.assert_array_equal(read(save(tmp_path / "y.pkl", made)), rows)


def with_rows(path, column, rows):
    """The entries of a file with other rows in the form of theirs."""
    entries = pickle_list.build(path.read_bytes())
    return [
        entry
        | {column: new.tolist() if type(old := entry[column]) is list else new.reshape(old.shape)}
        for entry, new in zip(entries, rows, strict=True)
    ]


def test_what_is_shared_beside_the_rows_is_no_matter(tmp_path, only_direct):
    path = save(tmp_path / "x.pkl", entries_of(random_rows(5)))
    assert Corpus(path, allow_pickle=True).shards[0].places.replaceable


# Where the native interpreter and Python's unpickler meet.


def outcome(path):
    """The rows of a file and where they are, or its error."""
    save(path, path.read_bytes())
    try:
        shard = Corpus(path, allow_pickle=True).shards[0]
        rows = torch.cat([batch for _, batch in shard.read(0, 3)]).numpy()
        return shard.column, shard.dtype, rows.shape, rows.tobytes(), not shard.has_other_columns
    except (ValueError, TypeError) as error:
        return without_addresses(str(error))


def plain(value, above=()):
    """What a value is, to compare."""
    if id(value) in above:
        return "around"
    above = (*above, id(value))
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(key, plain(one, above)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [plain(one, above) for one in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted(without_addresses(repr(one)) for one in value)
    return type(value), without_addresses(repr(value))


def without_addresses(text):
    return re.sub("0x[0-9a-f]{6,}", "an address", text)


def agree(path):
    """Located rows are those that are built, and what is written has no other changes."""
    found = outcome(path)
    if isinstance(found, str) or not is_direct(path):
        return False
    column, dtype, shape, data, is_alone = found
    entries, rows = pickle_list.build(path.read_bytes()), np.frombuffer(data, dtype).reshape(shape)
    for entry, row in zip(entries, rows, strict=True):
        assert np.asarray(entry[column]).dtype == dtype
        assert np.asarray(entry[column]).tobytes() == row.tobytes()
    assert is_alone == all(set(entry) == {column} for entry in entries)
    try:
        made = rewrite(path, path.parent / "out" / "x.pkl", -rows)
    except ValueError:  # what is beside the rows cannot be pickled again
        return True
    assert repr(plain(pickle_list.build(made))) == repr(plain(with_rows(path, column, -rows)))
    return True


def unusual():
    """Plain data whose rows do not lie in the file."""
    rows = random_rows(3)
    entries = [{"embed": row} for row in rows]
    yield "protocol 2", pickle.dumps(entries, protocol=2)
    yield "an entry twice", entries[:1] * 2
    floats = pickle.dumps([{"embed": [1.5, 2.5]}], protocol=4)
    end = floats.index(b"e", floats.index(b"G\x40"))
    floats = floats[:2] + floats[11:]  # without its frame
    end -= 9
    yield "a number that goes", floats[:end] + b"G" + bytes(8) + b"0" + floats[end:]
    yield "a number in the memo", floats[:end] + b"\x94" + floats[end:]


UNUSUAL = [name for name, _ in unusual()]


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_refused(tmp_path, name):
    path = save(tmp_path / "x.pkl", dict(unusual())[name])
    with pytest.raises(
        ValueError, match=rf"{path}: row 0 under 'embed' is an? .*: pickle it again"
    ):
        Corpus(path, allow_pickle=True)
    arguments = storage_path(path).stamp(), pickle_list.DEFAULTS, str(path)
    assert pickle_list._located(path, *arguments) is None


UTF8 = [b"\xc3\xa9", b"\xc1\x81", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xed\x9f\xbf"]
UTF8 += [b"\xf4\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf0\x80\x80\x80", b"\xf5\x80\x80\x80"]
UTF8 += [b"\x80", b"\xff", b"\xc3", b"\xe2\x82", b"\xc3A", b"\xe2\x82\x41", b"\xf0\x9f\x98\x80"]


@pytest.mark.parametrize("length", [0, 200, 70_000])
def test_text_is_utf8(tmp_path, length):
    """As strict as Python, in short texts and in long ones; across the reader's buffer too."""
    data = pickle.dumps([{"embed": random_rows(1)[0], "text": "T"}], protocol=4)
    data = data[:2] + data[11:]  # without its frame
    for text in UTF8:
        for before in {0, length, length // 2}:
            whole = b"a" * before + text + b"b" * (length - before)
            long = b"X" + len(whole).to_bytes(4, "little") + whole
            path = save(tmp_path / "x.pkl", data.replace(b"\x8c\x01T", long))
            try:
                whole.decode()
                assert agree(path)
            except UnicodeDecodeError:
                assert "a text is not UTF-8" in outcome(path)


FRAGMENTS = [bytes([code]) for code in b"N\x88\x89)]}(\x8f\x94\x85\x86\x87tl10aesu\x90\x91Rb.\x93"]
FRAGMENTS += [b"K\5", b"M\0\1", b"J\xff\xff\xff\xff", b"G" + bytes(8), b"\x8a\1\x80", b"C\4abcd"]
FRAGMENTS += [b"\x8a\x09" + bytes(9), b"q\5", b"\x8c\5embed", b"\x8c\2f4", b"\x8c\1>", b"\x8c\1C"]
FRAGMENTS += [b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy._core.multiarray\nscalar\n"]
FRAGMENTS += [b"cnumpy._core.numeric\n_frombuffer\n", b"\x96\4" + bytes(11), b"\x8c\2U1"]


@st.composite
def programs(draw):
    """Pickles with opcodes moved, doubled, left out, put in and damaged."""
    make = draw(st.sampled_from([np.array, lambda row: row[None], np.ndarray.tolist]))
    entries = [{"id": "a", "embed": make(row), "s": np.float16(2)} for row in random_rows(2, 3)]
    if draw(st.booleans()):
        entries[0]["more"] = [(1, np.arange(2)), {2.5}, np.str_("é"), {"x": None}]
    data = pickle.dumps(entries, protocol=draw(st.integers(2, 5)))
    starts = [place for _, _, place in pickletools.genops(data)]
    codes = [data[low:high] for low, high in zip(starts, [*starts[1:], len(data)], strict=True)]
    codes = [code for code in codes if code[0] != 0x95]  # (frames)
    for _ in range(draw(st.integers(1, 4))):
        place, kind = draw(st.integers(1, len(codes) - 1)), draw(st.integers(0, 5))
        other = draw(st.integers(1, len(codes) - 1))
        if kind == 0:
            del codes[place]
        elif kind == 1:
            codes.insert(place, codes[other])
        elif kind == 2:
            codes[place] = codes[other]
        elif kind == 3:
            codes[place] = draw(st.sampled_from(FRAGMENTS))
        elif kind == 4:
            code = draw(st.sampled_from(FRAGMENTS) | st.integers(0, 40).map(lambda n: b"h%c" % n))
            codes.insert(place, code)
        else:
            damaged = bytearray(codes[place])
            damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
            codes[place] = bytes(damaged)
    return b"".join(codes)


@FAST
@given(programs())
def test_located_and_built_rows_agree_in_any_pickle(tmp_path, data):
    agree(save(tmp_path / "x.pkl", data))


@pytest.mark.parametrize(
    "flag, is_read",
    [
        (b"K\1", True),
        (b"J\xff\xff\xff\xff", True),
        (b"\x8a\5\0\0\0\0\1", False),  # 2^32, which C's int does not hold
        (b"]", False),
        (b"N", False),
        (b"G" + bytes(8), False),
    ],
)
def test_the_order_of_an_array_is_an_int_of_c(tmp_path, flag, is_read):
    """NumPy refuses others; found by ``hostile.sanitizers``, which drew an empty list."""
    data = pickle.dumps([{"embed": np.ones(3)}], protocol=3)
    assert data.count(b"\x89C") == 1
    path = save(tmp_path / "x.pkl", data.replace(b"\x89C", flag + b"C"))
    assert agree(path) == is_read


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_and_about_whole_ones(tmp_path, protocol):
    """The test above is not of errors alone."""
    for make in (np.array, lambda row: row[None], np.ndarray.tolist):
        assert agree(save(tmp_path / "x.pkl", entries_of(random_rows(5), make), protocol))
    sets = [{"embed": np.ones(3), "sets": ({1, "a"}, frozenset([2.5]), set())}]
    assert agree(save(tmp_path / "x.pkl", sets, protocol))


# Files that change, and limits.


def test_a_file_that_becomes_another_is_an_error(tmp_path):
    path = save(tmp_path / "x.pkl", entries_of(random_rows(2000, 64)))
    batches = Corpus(path, allow_pickle=True).batches(batch_rows=10)
    next(batches)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.pkl: changed while it was read"):
        list(batches)
    path.write_bytes(whole)
    shard = Corpus(path, allow_pickle=True).shards[0]
    with pytest.raises(ValueError, match=r"x\.pkl: changed while it was read"):
        with shard.writer(tmp_path / "out" / "x.pkl") as writer:
            writer.write(torch.zeros(1000, 64))
            path.write_bytes(whole[:-9])
            writer.write(torch.zeros(1000, 64))
    assert not list((tmp_path / "out").iterdir())


def test_rows_beyond_the_list_are_not_read(tmp_path):
    path = save(tmp_path / "x.pkl", entries_of(random_rows(3)))
    rows = Corpus(path, allow_pickle=True).shards[0].places
    with path.open("rb") as file:
        for first, count in ((0, 4), (-1, 1), (3, 1), (2**62, 1)):
            with pytest.raises(IndexError, match="the list has 3 rows"):
                rows.read(file.fileno(), first, np.empty((count, 6), "f4"))
        with pytest.raises(ValueError, match="not a whole number of rows"):
            rows.read(file.fileno(), 0, np.empty(7, "f4"))
        with pytest.raises(OSError, match="Bad file descriptor"):
            rows.read(1 << 20, 0, np.empty((1, 6), "f4"))
    with path.open("rb") as file, open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError, match="No space left"):
            rows.write(file.fileno(), 0, np.empty((3, 6), "f4"), full.fileno())


@pytest.mark.parametrize("code", [b"]", b"}"])
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path, code):
    path = save(tmp_path / "x.pkl", b"\x80\x04(" + code * 4_000_000 + b"l.")
    with path.open("rb") as file, pytest.raises(_io.NotPlain, match=r"(has|take) more"):
        _io.PickledRows(file.fileno(), path.stat().st_size, (b"embed",), 1 << 27)
