"""The paper's pickled lists: read as plain data, kept whole, and never run."""

import collections
import io
import os
import pickle
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realign_fast.cli.main import main
from realign_fast.corpus import Corpus
from realign_fast.corpus.formats import pickle_list
from realign_fast.corpus.io_extension import io as _io
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

DIMENSION = 6
QUICK = Settings(progress=False, batch_bytes=100)


pytestmark = pytest.mark.usefixtures("needs_the_reader")


def random_rows(count, dtype="float32", seed=0):
    return (np.random.default_rng(seed).standard_normal((count, DIMENSION)) + 1).astype(dtype)


def entries_of(rows, make=np.array):
    """What the paper's script saves, and more beside the rows."""
    shared = ["the same list in every entry"]
    return [
        {
            "id": f"é{i}",
            "embed": make(row),
            "caption": None if i == 1 else "x" * i,
            "more": {"n": i, "pair": (1.5, True), "raw": b"\0" * 300, "shared": shared},
            "box": np.arange(4, dtype=np.int64),
            "score": np.float32(i),
        }
        for i, row in enumerate(rows)
    ]


def save(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def read(path, **options):
    corpus = Corpus(path, allow_pickle=True, **options)
    return torch.cat([batch.rows for batch in corpus.batches(batch_rows=4)]).numpy()


# ---- reading and writing


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_come_out_of_every_protocol(tmp_path, protocol, dtype):
    rows = random_rows(11, dtype)
    for make in (np.array, lambda row: row[None], lambda row: row[None].T.T.copy("F")):
        path = save(tmp_path / "x.pkl", entries_of(rows, make), protocol)
        got = read(path)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, rows)
    corpus = Corpus(path, allow_pickle=True)
    np.testing.assert_array_equal(corpus.take([10, 0, 3]), rows[[10, 0, 3]])


def test_lists_of_floats_and_other_keys(tmp_path):
    rows = random_rows(5, "float64")
    path = save(tmp_path / "x.pickle", [{"text": row.tolist()} for row in rows])
    np.testing.assert_array_equal(read(path, column="text"), rows)
    with pytest.raises(ValueError, match="row 0 under 'embed' is missing, of the keys 'text'; exp"):
        read(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_aligned_lists_keep_all_but_the_rows(tmp_path, protocol):
    np.save(tmp_path / "target.npy", -random_rows(20))
    (tmp_path / "npy").mkdir()
    (tmp_path / "in").mkdir()
    for i, count in enumerate((9, 4)):
        rows = random_rows(count, seed=i)
        np.save(tmp_path / "npy" / f"x_{i}.npy", rows)
        save(tmp_path / "in" / f"x_{i}.pkl", entries_of(rows, lambda row: row[None]), protocol)
    align(tmp_path / "npy", tmp_path / "target.npy", tmp_path / "want", QUICK)
    source = Corpus(tmp_path / "in", allow_pickle=True)
    align(source, tmp_path / "target.npy", tmp_path / "out", QUICK)
    for i in range(2):
        want = np.load(tmp_path / "want" / f"x_{i}.npy")
        before = pickle.loads((tmp_path / "in" / f"x_{i}.pkl").read_bytes())
        after = pickle.loads((tmp_path / "out" / f"x_{i}.pkl").read_bytes())  # ours: plain data
        assert [list(entry) for entry in after] == [list(entry) for entry in before]
        for row, old, new in zip(want, before, after, strict=True):
            assert new["embed"].shape == (1, DIMENSION) and new["embed"].tobytes() == row.tobytes()
            assert type(new["box"]) is np.ndarray and type(new["score"]) is np.float32
            assert new["box"].tolist() == old["box"].tolist()
            for key in ("id", "caption", "more", "score"):
                assert new[key] == old[key]
    assert read(tmp_path / "out").shape == (13, DIMENSION)


def test_the_command_line_asks(tmp_path, capsys):
    save(tmp_path / "x.pkl", entries_of(random_rows(9)))
    np.save(tmp_path / "t.npy", -random_rows(9))
    command = ["align", "--text", str(tmp_path / "x.pkl"), "--image", str(tmp_path / "t.npy")]
    command += ["--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 3
    assert "a pickle is read only when asked to: give" in capsys.readouterr().err
    assert main([*command, "--allow-pickle"]) == 0
    assert (tmp_path / "out" / "x.pkl").exists()


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = save(tmp_path / "x.pkl", entries_of(random_rows(3)))
    shard = Corpus(path, allow_pickle=True).shards[0]
    with pytest.raises(ValueError, match="got 2 rows, expected 3"):
        with shard.writer(tmp_path / "out" / "x.pkl") as writer:
            writer.write(torch.zeros(2, DIMENSION))
    assert os.listdir(tmp_path / "out") == []


# ---- refusals


def refuse(path, words, error=ValueError):
    with pytest.raises(error, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)


FLOATS, OTHERS = np.zeros(3), np.zeros(4)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": 1}, "holds a dict; expected a pickled list"),
        ([], "has no row that is a vector, so nothing says its dimension"),
        ([{"embed": None}], "row 0 under 'embed' is a NoneType; expected arrays"),
        ([{"embed": [True]}], "row 0 under 'embed' is a list of 1 bool; "),
        ([1], "row 0 under 'embed' is missing: its entry is a int"),
        ([{"embed": np.zeros(3, int)}], r"an array \[3\] of <i8; expected .* one of <f2, <f4"),
        ([{"embed": "text"}], "is a str; expected arrays"),
        ([{"embed": [1.0, "a"]}], "is a list of 2 float/str; "),
        ([{"embed": [10**400]}], "is a list of 1 int; .* lists of floats"),
        ([{"embed": np.zeros((2, 3))}], r"an array \[2, 3\] of <f8; expected arrays \[D\]"),
        ([{"embed": np.zeros(0)}], r"an array \[0\] of"),
        ([{"embed": FLOATS}, {"embed": OTHERS}], r"row 1 .*array \[4\] .*row 0 an array \[3\]"),
        ([{"embed": FLOATS}] * 2 + [7], "row 2 under 'embed' is missing: its entry is a int"),
        ([{"embed": FLOATS}, {"id": 5}], "row 1 under 'embed' is missing, of the keys 'id', row 0"),
        ([{"embed": FLOATS}, {"embed": FLOATS.astype("f2")}], "row 1 .* of <f2, row 0 .*<f8"),
        ([{"embed": FLOATS}, {"embed": [1.0, 2.0, 3.0]}], "row 1 .* list of 3 float, row 0 an arr"),
        ([{"embed": torch.ones(3)}], "not plain data: .* names torch"),
    ],
)
def test_what_is_not_a_list_of_rows_says_so(tmp_path, value, words):
    refuse(save(tmp_path / "x.pkl", value), words)


def test_arrays_of_protocol_2_are_refused(tmp_path):
    refuse(save(tmp_path / "x.pkl", [{"embed": FLOATS}], 2), r"row 0 .*protocol 3 on: pickle")


def test_a_part_without_entries_keeps_its_place(tmp_path):
    rows = random_rows(5)
    save(tmp_path / "rows_0.pkl", entries_of(rows))
    save(tmp_path / "rows_1.pkl", [])
    corpus = Corpus(tmp_path, allow_pickle=True)
    assert [shard.num_rows for shard in corpus.shards] == [5, 0] and corpus.dtype == torch.float32
    (batch,) = corpus.batches()
    np.testing.assert_array_equal(batch.rows.numpy(), rows)
    assert not corpus.shards[1].has_other_columns
    with corpus.shards[1].writer(tmp_path / "out" / "rows_1.pkl") as writer:
        writer.write(torch.zeros(0, DIMENSION))
    assert pickle.loads((tmp_path / "out" / "rows_1.pkl").read_bytes()) == []


def test_hostile_tensors_are_one_error_and_nothing_runs(tmp_path):
    """Neither their bytes nor the sizes that they state get past the interpreter."""
    touched, path = tmp_path / "touched", tmp_path / "x.pkl"
    sound = storage_file(torch.ones(3))
    shell = pickle.dumps(Calls(os.system, (f"touch {touched}",)), protocol=2)
    saved = io.BytesIO()
    torch.save(torch.ones(3), saved)

    def changed(old, new):
        """Return a tensor with other bytes in its storage."""
        assert sound.count(old) == 1
        return tensor_of(sound.replace(old, new))

    hostile_tensors = [
        tensor_of(shell),
        changed(b"\x80\2M\xe9\3.", shell),
        changed(b"ctorch\nFloatStorage", b"cposix\nsystem"),
        changed(b"K\3N", b"J\xff\xff\xff\x7fN"),
        changed(b"K\3N", b"J\xff\xff\xff\xffN"),
        changed(b"K\3N", b"K\2N"),
        changed(b"q\1a.", b"q\1."),
        changed(b"Q.", b"0N."),
        tensor_of(saved.getvalue(), offset=1),
        tensor_of(sound[:-1]),
        tensor_of(sound, offset=1),
        tensor_of(sound, stride=(2,)),
        tensor_of(sound, size=(1, 3), stride=(1 << 40, 2)),
        tensor_of(sound, offset=-1),
        tensor_of(sound, size=(1 << 61,), stride=(0,)),
        tensor_of(sound, size=(1 << 20,), stride=(0,)),
        tensor_of(sound, stride=(-1,)),
        tensor_of(sound, stride=(1, 1)),
    ]
    for tensor in hostile_tensors:
        save(path, [{"id": 0, "embed": np.ones(3)}, {"id": 1, "embed": tensor}])
        refuse(path, "not plain data: ")
    assert not touched.exists()


def test_a_file_too_large_for_memory_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_list, "MAX_BYTES", 1000)
    path = save(tmp_path / "x.pkl", entries_of(random_rows(50)))
    monkeypatch.setattr(pickle_list, "build", None)
    refuse(path, r"has \d+ bytes.* expected at most 1000; split it")


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def tensor_of(storage_file, offset=0, size=(3,), stride=(1,)):
    """A tensor as `pickle.dump` writes it, of any bytes in place of its storage."""
    storage = Calls(torch.storage._load_from_bytes, (storage_file,))
    no_hooks = collections.OrderedDict()
    return Calls(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, no_hooks))


def storage_file(tensor):
    """Return the bytes of its storage that `pickle.dump` writes."""
    return tensor.storage().__reduce__()[1][0]


class State:
    def __reduce__(self):
        return object.__new__, (State,), {"a": 1}


def nested(*values):
    return [{"id": value, "embed": np.zeros(3)} for value in values]


def hostile(touched):
    """Pickles, each with what must be said; `touched` is the file that none may make."""
    shell, at = f"touch {touched}", np.zeros(3)
    yield "system", Calls(os.system, (shell,)), "names posix"
    yield "in an entry", nested(Calls(os.system, (shell,))), "names posix"
    yield "eval", Calls(eval, (f"open({str(touched)!r}, 'w')",)), "names (builtins.)?eval"
    yield "getattr", Calls(getattr, ("a", "upper")), "names (builtins.)?getattr"
    yield "open", Calls(open, (str(touched), "w")), "names _?io"
    yield "class", State(), "names"
    yield "ordered", collections.OrderedDict(a=1), "needs a value of another type"
    yield "torch", nested(Calls(torch.load, (str(touched),))), "names torch.serialization"
    yield (
        "objects",
        [{"embed": np.array([Calls(os.system, (shell,))], object)}],
        "object arrays",
    )
    yield "plain objects", [{"embed": np.array([None, 1], object)}], "object arrays"
    yield "fields", [{"embed": np.zeros(2, [("a", "f4"), ("b", "O")])}], "object arrays"
    yield "numpy name", Calls(np.load, (str(touched),)), "names (numpy.)?load"
    yield "reconstruct a class", Calls(np._core.multiarray._reconstruct, (int, (0,), b"b")), "names"
    yield "no text", b"\x80\x02cposix\xff\x85\nsystem\n.", r"names posix\?\?,"
    yield "persistent", b"\x80\x04\x8c\x01aQ.", "opcode that does not build"
    yield "instance", b"\x80\x02(c__builtin__\neval\no.", "names eval"
    yield "extension", b"\x80\x02\x82\x01.", "opcode that does not build"
    yield "new object", b"\x80\x02cnumpy\nndarray\n)\x81.", "opcode that does not build"
    yield "protocol 0", b"cposix\nsystem\n(S'" + shell.encode() + b"'\ntR.", "names posix"
    yield "call a value", b"\x80\x02K\x01)R.", "calls a value that is not a global"
    yield "call text", b"\x80\x04\x8c\x05array)R.", "calls a value that is not a global"
    yield "state of a list", b"\x80\x02]}b.", "sets the state of a value other"
    yield "state of a global", b"\x80\x02cnumpy\nndarray\n)b.", "sets the state of a value other"
    yield "append to a dict", b"\x80\x02}K\x01a.", "needs a value of another type"
    yield (
        "codecs",
        b"\x80\x02c_codecs\nencode\n\x8c\x01a\x8c\x03rot\x86R.",
        "with unexpected arguments",
    )
    beyond = pickle.dumps([{"embed": at, "id": np.str_("é")}]).replace(b"\xe9\0\0\0", b"\xe9\0\0\1")
    yield "text beyond Unicode", beyond, "beyond Unicode"
    yield "a list as key", b"\x80\x02}]K\x01s.", "a key of a dict or set is neither"
    yield "bytes after", pickle.dumps([{"embed": at}]) + b"more", "before the file does"
    yield "second pickle", pickle.dumps([{"embed": at}]) * 2, "before the file does"


HOSTILE = [name for name, *_ in hostile(Path("x"))]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_one_error_and_nothing_runs(tmp_path, name, protocol):
    touched = tmp_path / "touched"
    value, words = next(rest for one, *rest in hostile(touched) if one == name)
    path = tmp_path / "x.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    refuse(path, rf"not plain data: .*({words}).*; expected a pickled list", ValueError)
    assert not touched.exists()


def test_the_hostile_pickles_would_run_elsewhere(tmp_path):
    """The test above can fail: Python's own unpickler does what the files say."""
    touched = tmp_path / "touched"
    value = next(rest for one, *rest in hostile(touched) if one == "system")[0]
    pickle.loads(pickle.dumps(value))
    assert touched.exists()


def counts():
    """Small files that state huge counts."""
    most = struct.pack("<Q", (1 << 63) - 1)
    yield b"\x80\x04\x8e" + most + b"x."  # bytes
    yield b"\x80\x04\x8d" + most + b"x."  # text
    yield b"\x80\x05\x96" + most + b"x."  # bytearray
    yield b"\x80\x04X\xff\xff\xff\xffx."
    yield b"\x80\x04B\xff\xff\xff\xffx."
    yield b"\x80\x04\x95" + most + b"]"  # a frame, and then nothing
    yield b"\x80\x04\x8b\xff\xff\xff\x7fx."  # a number of 2 GiB
    yield b"\x80\x04\x8a\xffx."
    yield b"\x80\x04j\xff\xff\xff\xff."  # a memo that is not there
    yield b"\x80\x04\x85."
    yield b"\x80\x04u."
    yield b"\x80\x04" + b"0" * 50
    yield b""


@pytest.mark.parametrize("data", list(counts()), ids=range(13))
def test_huge_counts_allocate_nothing(tmp_path, data):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    begin = time.perf_counter()
    refuse(path, "not plain data")
    assert time.perf_counter() - begin < 5


def test_a_huge_array_is_not_made(tmp_path):
    good = pickle.dumps([{"embed": np.zeros(3, "f4")}], protocol=4)
    assert good.count(b"K\x03\x85") == 1
    path = tmp_path / "x.pkl"
    for shape in (
        b"K\x04\x85",
        b"J\xff\xff\xff\x7f\x85",
        b"J\xff\xff\xff\xff\x85",
        b"G" + b"a" * 8 + b"\x85",
    ):
        path.write_bytes(good.replace(b"K\x03\x85", shape))
        refuse(path, "not plain data")


def test_deep_nesting_does_not_recurse(tmp_path):
    depth = 200_000
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".")
    refuse(path, "its entry is a list")
    path.write_bytes(b"\x80\x04" + b")" + b"\x85" * depth + b".")
    refuse(path, "holds a tuple")
    whole = pickle.dumps([{"embed": np.zeros(3, "f4"), "id": "here"}], protocol=4)
    deep = b"]" * depth + b"a" * (depth - 1)
    path.write_bytes(whole.replace(b"\x8c\x04here", deep))
    assert read(path).shape == (1, 3)
    shard = Corpus(path, allow_pickle=True).shards[0]
    with shard.writer(tmp_path / "out" / "x.pkl") as writer:
        writer.write(torch.zeros(1, 3))
    assert (tmp_path / "out" / "x.pkl").read_bytes().count(deep) == 1  # kept as it is
    with pytest.raises(ValueError, match=r"x\.pkl: cannot keep the other columns"):
        with pickle_list.PickleWriter(tmp_path / "new/x.pkl", 1, 3, torch.float32, shard) as writer:
            writer.write(torch.zeros(1, 3))  # built as values it cannot be
    assert os.listdir(tmp_path / "new") == []


def text(data):
    return b"X" + struct.pack("<I", len(data)) + data


def bombs():
    """Files whose objects take far more memory than the file."""
    begin, long = b"\x80\x02", text(b"a" * 1_000_000)
    encode = b"c_codecs\nencode\nq\x00" + long + b"q\x01" + text(b"latin1") + b"q\x02("
    yield "encode", begin + encode + b"h\x00h\x01h\x02\x86R" * 900 + b"l."
    dtype = b"cnumpy\ndtype\n" + text(b"S99999") + b"\x89\x88\x87R(K\x03" + text(b"|")
    dtype += b"NNNJ" + struct.pack("<I", 99999) + b"K\x01K\x00tb"
    scalar = b"cnumpy.core.multiarray\nscalar\nq\x00" + dtype + b"q\x01"
    scalar += b"B" + struct.pack("<I", 99999) + b"a" * 99999 + b"q\x02("
    yield "scalar", begin + scalar + b"h\x00h\x01h\x02\x86R" * 9000 + b"l."
    items = b"]q\x01(" + b"".join(b"M" + struct.pack("<H", i) for i in range(5000)) + b"e("
    for name in (b"set", b"frozenset"):
        kind = b"cbuiltins\n" + name + b"\nq\x00"
        yield name.decode(), begin + kind + items + b"h\x00h\x01\x85R" * 900 + b"l."
    storage = b"ctorch.storage\n_load_from_bytes\nq\x00B" + struct.pack("<I", 99999)
    storage += b"a" * 99999 + b"q\x01("
    yield "storages", begin + storage + b"h\x00h\x01\x85R" * 9000 + b"l."
    for code in b"]}\x8f":
        yield f"empty {code:#x}", begin + b"(" + bytes([code]) * 3_000_000 + b"l."
        yield f"deep {code:#x}", begin + bytes([code]) * 3_000_000 + b"0" * 2_999_999 + b"."
    yield "tuples", begin + b"N" + b"\x85" * 3_000_000 + b"."
    yield "small dicts", begin + b"(" + b"}K\x01Ns" * 900_000 + b"l."
    yield "small sets", begin + b"(" + b"\x8f(K\x01K\x02\x90" * 900_000 + b"l."
    yield "frozen sets", begin + b"(" + b"(\x91" * 900_000 + b"l."


BOMBS = dict(bombs())


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path, name):
    path = tmp_path / "x.pkl"
    path.write_bytes(BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(path, "not plain data: byte [0-9]+: its? (has|values take) more")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (400 << 10)  # KiB


def test_a_distant_place_in_the_memo_is_refused(tmp_path):
    """Python's unpickler would make room for all places before it."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\xff.")
    refuse(path, "not plain data: byte 8: its memo entries are not numbered consecutively")


def test_frames_are_those_that_python_writes(tmp_path):
    """Python's unpickler goes on elsewhere than behind an opcode that a frame cuts in two."""
    sound = pickle.dumps([{"embed": np.ones(3, "f4"), "id": "a text"}], protocol=4)
    assert sound[2] == 0x95 and pickle_list.build(sound)
    (size,) = struct.unpack_from("<Q", sound, 3)
    path = tmp_path / "x.pkl"
    for other in (size + 1, size - 15, 1 << 62):
        path.write_bytes(sound[:3] + struct.pack("<Q", other) + sound[11:])
        refuse(path, "not plain data: .*a frame (ends in the middle|begins in another or is cut)")
    path.write_bytes(sound[:-1] + b"\x95" + bytes(8) + b".")
    refuse(path, "a frame begins in another")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_sound_pickles_take_less_memory_than_the_bound(protocol):
    """Also the smallest entries of use: they have the most memory for each byte of the file."""
    count = 150_000  # the objects of which take far more than 64 MiB
    for entries in (
        [{"id": i, "embed": [1.5]} for i in range(2 * count)],
        [{"id": str(i), "embed": np.float16([i % 9]), "box": [[i, 2, 3, 4]]} for i in range(count)],
        [{"embed": np.ones(3), "n": np.float32(i), "tags": [], "k": {}} for i in range(count)],
    ):
        _io.check_pickle(pickle.dumps(entries, protocol=protocol), 1 << 30)


def test_errors_do_not_print_values_that_never_end(tmp_path):
    """The text of 60 tuples, each twice in the next, would have 2^60 parts."""
    laughs = b"N" + b"".join(b"\x94h%c\x86" % place for place in range(60))
    for data, words in (
        (laughs + text(b"a") + b"\x93.", "the name of a global is not a text"),
        (b"cnumpy\ndtype\n" + laughs + b"\x85R.", "unexpected arguments"),
    ):
        path = tmp_path / "x.pkl"
        path.write_bytes(b"\x80\x04" + data)
        refuse(path, words)


def test_a_shape_of_many_large_numbers_is_not_multiplied(tmp_path):
    shape = b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 20_000 + b"t"
    data = pickle.dumps([{"embed": np.zeros(3, "f4")}], protocol=4)
    assert data.count(b"K\x03\x85") == 1
    path = tmp_path / "x.pkl"
    path.write_bytes(data[:2] + data[11:].replace(b"K\x03\x85", shape))  # without its frame
    refuse(path, "too many dimensions")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_pickles_never_escape(tmp_path, data):
    path = tmp_path / "x.pkl"
    damaged = bytearray(pickle.dumps(entries_of(random_rows(2)), data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    path.write_bytes(damaged[:cut])
    try:
        read(path)
    except (ValueError, TypeError) as error:
        assert str(path) in str(error)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**100), 2**100)
        | st.floats()
        | st.text()
        | st.binary(),
        lambda inner: (
            st.lists(inner)
            | st.tuples(inner, inner)
            | st.tuples(inner, inner, inner, inner)
            | st.dictionaries(st.text() | st.integers(), inner)
        ),
        max_leaves=20,
    ),
    st.integers(2, 5),
)
def test_plain_data_is_what_python_loads(value, protocol):
    data = pickle.dumps(value, protocol=protocol)
    assert repr(pickle_list.build(data)) == repr(pickle.loads(data))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_sets_scalars_and_arrays_are_plain_too(protocol):
    values = [{1, 2}, frozenset("a"), set(), np.float16(1.5), np.int64(3), np.bool_(True)]
    values += [np.str_("é"), b"abc\xff", np.arange(6).reshape(2, 3), np.array(["a", "bé"])]
    values += [np.array([b"a"]), np.asfortranarray(np.ones((2, 3))), np.arange(3, dtype=">f4")]
    for value in values:
        data = pickle.dumps([value, value], protocol=protocol)
        assert repr(pickle_list.build(data)) == repr(pickle.loads(data))


def test_without_the_reader_pickles_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "x.pkl", entries_of(random_rows(3)))
    monkeypatch.setattr(pickle_list, "_io", None)
    refuse(path, "read by the native reader alone, .*install a C\\+\\+ compiler")


def test_only_constructors_of_plain_data_are_known():
    """Beside the check of the native reader: no other name becomes an object."""
    data = pickle.dumps([Calls(os.system, ("true",))])
    with pytest.raises(pickle.UnpicklingError, match=r"names posix\.system"):
        pickle_list.PlainUnpickler(io.BytesIO(data)).load()
    for module, names in pickle_list.GLOBALS.items():
        for name in names:
            assert callable(pickle_list.PlainUnpickler(io.BytesIO()).find_class(module, name))
