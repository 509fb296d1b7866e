"""Rows on disk: what is accepted, what is refused and how it is said, memory, atomic writes."""

import os
import pickle
import re
import resource
import signal
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.memory import memory_growth

from realign_fast.corpus import (
    Batch,
    Corpus,
    ShardWriter,
    read_header,
    sample_ids,
)
from realign_fast.corpus import shard as shard_module
from realign_fast.storage.paths import natural_order

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.float32, torch.float64)


def save(path, rows=5, columns=3, dtype=np.float16, seed=0):
    """Random rows at `path`; returns them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)
    np.save(path, array)
    return array


def header(
    descr="'<f4'", shape="(2, 3)", order="False", magic=b"\x93NUMPY", version=(1, 0), length=None
):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + (11 if version[0] == 1 else 13)) % 64) + b"\n"
    size = len(text) if length is None else length
    return magic + bytes(version) + size.to_bytes(2 if version[0] == 1 else 4, "little") + text


def fork(work):
    """What `work()` raised in a process of its own, as text, and how that process ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except Exception as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    return said, os.waitpid(child, 0)[1]


# ---- reading


def test_corpus_rows_is_a_deprecated_name_of_num_rows(tmp_path):
    save(tmp_path / "a.npy", 3)
    with pytest.warns(DeprecationWarning, match="Corpus.num_rows"):
        assert Corpus(tmp_path).rows == 3


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("batch_rows", [1, 2, 3, 7, 100])
def test_batches_are_the_rows_of_np_load(tmp_path, dtype, batch_rows):
    arrays = [save(tmp_path / f"x_{i}.npy", rows, 4, dtype, i) for i, rows in enumerate((7, 1, 6))]
    corpus = Corpus(tmp_path)
    assert (corpus.num_rows, corpus.dimension, len(corpus)) == (14, 4, 14)
    assert corpus.subfolder == "" and corpus.nbytes == 14 * 4 * np.dtype(dtype).itemsize
    assert corpus.dtype == torch.from_numpy(arrays[0]).dtype
    batches = list(corpus.batches(batch_rows=batch_rows))
    want = [
        (i, a, min(batch_rows, r - a))
        for i, r in enumerate((7, 1, 6))
        for a in range(0, r, batch_rows)
    ]
    assert [(b.shard, b.first, len(b.rows)) for b in batches] == want
    for batch in batches:
        assert isinstance(batch, Batch) and batch.rows.dtype == corpus.dtype
        expected = arrays[batch.shard][batch.first : batch.first + len(batch.rows)]
        np.testing.assert_array_equal(batch.rows.numpy(), expected)


def test_batch_bytes_sets_the_batch_and_a_wide_row_is_still_read(tmp_path):
    save(tmp_path / "x.npy", 10, 8, "<f4")
    sizes = [len(b.rows) for b in Corpus(tmp_path).batches(batch_bytes=100)]  # 32 bytes a row
    assert sizes == [3, 3, 3, 1]
    assert [len(b.rows) for b in Corpus(tmp_path).batches(batch_bytes=5)] == [1] * 10


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("batch_rows", [1, 9, 40, 200])
def test_blocks_do_not_show(tmp_path, monkeypatch, batch_rows, native):
    """Blocks smaller than a batch, and many a file: the rows are the same, whoever reads them."""
    if not native:
        monkeypatch.setattr(shard_module.io_extension, "io", None)
    elif not shard_module.io_extension.io:
        pytest.skip("the native reader was not built")
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 8192)
    array = save(tmp_path / "x.npy", 333, 100, "<f4")
    for start in (0, 5, 332):
        batches = list(Corpus(tmp_path).batches(batch_rows=batch_rows, start=start))
        np.testing.assert_array_equal(torch.cat([b.rows for b in batches]).numpy(), array[start:])


def test_start_keeps_the_partition(tmp_path):
    for i, rows in enumerate((7, 0, 6)):
        save(tmp_path / f"x_{i}.npy", rows)
    corpus = Corpus(tmp_path)

    def shape(**options):
        return [(b.shard, b.first, len(b.rows)) for b in corpus.batches(batch_rows=3, **options)]

    assert shape() == [(0, 0, 3), (0, 3, 3), (0, 6, 1), (2, 0, 3), (2, 3, 3)]
    assert shape(start=4) == [(0, 4, 2), (0, 6, 1), (2, 0, 3), (2, 3, 3)]
    assert shape(start=7) == shape()[3:]
    assert shape(start=8) == [(2, 1, 2), (2, 3, 3)]
    assert shape(start=13) == []
    assert shape(shard=2, start=4) == [(2, 4, 2)]
    assert shape(shard=0) == shape()[:3]
    assert shape(shard=1) == []


def test_batches_refuses_bad_arguments_at_the_call(tmp_path):
    save(tmp_path / "x_0.npy", 5)
    corpus = Corpus(tmp_path)
    for options in ({"batch_rows": 0}, {"start": -1}, {"start": 6}, {"shard": 0, "start": 6}):
        with pytest.raises(ValueError, match=r"expected 1 or more and 0\.\.5"):
            corpus.batches(**options)
    for shard in (1, -1):
        with pytest.raises(IndexError, match="expected one of 1"):
            corpus.batches(shard)


def test_natural_order_and_what_is_not_a_shard(tmp_path):
    names = ["emb_10.npy", "emb_2.npy", "emb_1.npy", "emb_01.npy", "a\u00b2.npy", "B.NPY"]
    for name in [*names, ".hidden.npy"]:
        with open(tmp_path / name, "wb") as file:
            np.save(file, np.zeros((1, 2), np.float32))
    for name in (
        "x.npz",
        "emb_3.npy.partial",
        ".emb_3.npy.partial",
        "notes.txt",
        "emb_0_stats.json",
    ):
        (tmp_path / name).write_bytes(b"junk")
    got = [shard.path.name for shard in Corpus(tmp_path).shards]
    assert got == ["B.NPY", "a\u00b2.npy", "emb_01.npy", "emb_1.npy", "emb_2.npy", "emb_10.npy"]


def test_natural_order_compares_all_numbers_before_their_zeros():
    names = ["a1b1", "a01b2", "a1b10", "a01", "a1", "a2", "a10", "b"]
    assert sorted(names, key=natural_order) == [
        "a01",
        "a1",
        "a1b1",
        "a01b2",
        "a1b10",
        "a2",
        "a10",
        "b",
    ]


def test_zero_row_shards_keep_their_place(tmp_path):
    for i, rows in enumerate((0, 2, 0, 3, 0)):
        save(tmp_path / f"x_{i}.npy", rows)
    corpus = Corpus(tmp_path)
    assert [s.num_rows for s in corpus.shards] == [0, 2, 0, 3, 0] and corpus.num_rows == 5
    assert [b.shard for b in corpus.batches()] == [1, 3]
    everything = torch.cat([b.rows for b in corpus.batches()])
    assert torch.equal(corpus.take(range(5)), everything)
    save(tmp_path / "none" / "x.npy", 0)
    empty = Corpus(tmp_path / "none")
    assert (
        empty.num_rows == 0
        and list(empty.batches()) == []
        and sample_rows(empty, 3).shape == (0, 3)
    )


def test_a_single_file_is_a_corpus_and_a_corpus_pickles(tmp_path):
    array = save(tmp_path / "x.npy")
    corpus = pickle.loads(pickle.dumps(Corpus(str(tmp_path / "x.npy"))))
    np.testing.assert_array_equal(next(corpus.batches()).rows.numpy(), array)
    assert corpus.shards[0].path == tmp_path / "x.npy" and corpus.shards[0].offset == 128


def test_batches_are_private_views_without_a_warning(tmp_path):
    array = save(tmp_path / "x.npy", 4, 2, "<f4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = next(Corpus(tmp_path).batches()).rows
    rows.zero_()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array)


def test_threads_read_different_shards(tmp_path):
    arrays = [save(tmp_path / f"x_{i}.npy", 500, 16, "<f4", i) for i in range(8)]
    corpus = Corpus(tmp_path)

    def read(index):
        return torch.cat([b.rows for b in corpus.batches(index, batch_rows=7)])

    with ThreadPoolExecutor(8) as pool:
        for array, got in zip(arrays, pool.map(read, range(8)), strict=True):
            np.testing.assert_array_equal(got.numpy(), array)


def test_descriptors_do_not_leak(tmp_path):
    for i in range(20):
        save(tmp_path / f"x_{i}.npy")
    corpus = Corpus(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in corpus.batches(batch_rows=1):
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # the file and two windows
    abandoned = corpus.batches()
    next(abandoned)
    del abandoned, _
    assert len(os.listdir("/proc/self/fd")) == before


# ---- rows by id


def test_take_returns_rows_in_the_order_asked(tmp_path):
    arrays = [save(tmp_path / f"x_{i}.npy", r, 4, "<f4", i) for i, r in enumerate((3, 0, 5, 2))]
    everything = np.concatenate(arrays)
    ids = [9, 0, 3, 3, 2, 7, 8]
    np.testing.assert_array_equal(Corpus(tmp_path).take(ids).numpy(), everything[ids])
    assert Corpus(tmp_path).take([]).shape == (0, 4)
    for bad in ([10], [-11, 3]):
        with pytest.raises(IndexError, match=rf"{tmp_path}.*expected -10\.\.9"):
            Corpus(tmp_path).take(bad)


def sample_rows(corpus, count, seed=0):
    return corpus.take(sample_ids(len(corpus), count, seed))


def test_sample_is_seeded_sorted_spread_and_complete(tmp_path):
    for i in range(3):
        start = 100 * i
        np.save(tmp_path / f"x_{i}.npy", np.arange(start, start + 100, dtype=np.float64)[:, None])
    corpus = Corpus(tmp_path)
    sample = sample_rows(corpus, 30, seed=1).flatten()
    assert torch.equal(sample, sample_rows(corpus, 30, seed=1).flatten())
    assert not torch.equal(sample, sample_rows(corpus, 30, seed=2).flatten())
    assert torch.equal(sample // 10, torch.arange(30, dtype=torch.float64))  # one of each stretch
    assert torch.equal(sample_rows(corpus, 999).flatten(), torch.arange(300, dtype=torch.float64))
    drawn = torch.cat([sample_rows(corpus, 7, seed) for seed in range(400)]).flatten()
    assert len(drawn.unique()) == 300  # every row can be drawn
    assert abs(drawn.mean() - 149.5) < 1  # standard error of the stratified mean: .23


# ---- refusals


def refuse(path, error, message, modality=None):
    with pytest.raises(error, match=message) as caught:
        Corpus(path, modality)
    assert str(path) in str(caught.value), "the error must name the file"


@pytest.mark.parametrize(
    ("descr", "name"),
    [
        ("'<i4'", "<i4"),
        ("'>f4'", ">f4"),
        ("'|V2'", "|V2"),
        ("'|O'", "|O"),
        ("[('a', '<f4')]", "|V4"),
    ],
)
def test_other_dtypes_are_refused(tmp_path, descr, name):
    path = tmp_path / "x.npy"
    path.write_bytes(header(descr) + bytes(24))
    refuse(
        path,
        TypeError,
        rf"dtype is {re.escape(name)}, expected <f2, <f4 or <f8; save array\.astype",
    )


@pytest.mark.parametrize("ids", [np.arange(2), np.array(["a", "b"]), np.array(["a", 3], object)])
def test_a_list_of_ids_among_the_rows_is_named(tmp_path, ids):
    np.save(tmp_path / "text.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "ids.npy", ids)
    reason = r"ids\.npy: shape is \(2,\) of .*, expected rows; is this a list of ids\? move it out"
    refuse(tmp_path, TypeError, reason)
    assert len(Corpus(tmp_path / "text.npy")) == 2


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.save(tmp_path / "x.npy", np.array([[Bomb()]]), allow_pickle=True)
    refuse(tmp_path / "x.npy", TypeError, "pickles and never loaded")
    (tmp_path / "x.npy").write_bytes(pickle.dumps(Bomb()))
    refuse(tmp_path / "x.npy", ValueError, "not a .npy file")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "shape", ["(6,)", "(1, 2, 3)", "()", "(-2, 3)", "(6, 0)", "(0, -1)", f"(0, {1 << 40})"]
)
def test_other_shapes_are_refused(tmp_path, shape):
    path = tmp_path / "x.npy"
    path.write_bytes(header(shape=shape) + bytes(24))
    refuse(path, ValueError, rf"shape is {re.escape(shape)}, expected \[rows, columns\]")


def test_fortran_order_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(np.ones((4, 3), np.float32)))
    refuse(tmp_path / "x.npy", ValueError, "Fortran order, expected C")


@pytest.mark.parametrize(
    ("extra", "word"), [(-1, "truncated"), (-24, "truncated"), (1, "longer than")]
)
def test_wrong_file_size_is_refused_with_both_numbers(tmp_path, extra, word):
    path = tmp_path / "x.npy"
    path.write_bytes(header() + bytes(24 + extra))
    begin = len(header())
    refuse(path, ValueError, rf"{word}.*got {begin + 24 + extra} bytes, expected {begin + 24}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUM",
        b"PK\x03\x04 an npz",
        header(magic=b"\x94NUMPY"),
        header(version=(9, 0)),
        header(length=60000),
        header(version=(2, 0), length=2**32 - 1),
        header(shape="__import__('os').system('touch boom')"),
        header(shape="(" * 3000),
        header(shape="-" * 7000 + "1"),
        header(descr="'nonsense'"),
        header(descr="[1]"),
        b"\x93NUMPY\x01\x00\x03\x00abc",
    ],
    ids=range(13),
)
def test_garbage_is_one_clear_error(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content + bytes(24))
    with pytest.raises(ValueError, match=r"x\.npy: not a \.npy file .*; write it with numpy\.save"):
        Corpus(tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_headers_never_escape(tmp_path, data):
    good = bytearray(header() + bytes(24))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(header()) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.npy").write_bytes(good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of headers written by Python 2
        try:
            shard = read_header(tmp_path / "x.npy")
        except (ValueError, TypeError) as error:
            assert str(tmp_path / "x.npy") in str(error)
        else:
            assert shard.stamp[0] == len(good)


def test_versions_2_and_3_and_a_foreign_offset_are_read(tmp_path):
    values = np.arange(6, dtype="<f4")
    for version in ((2, 0), (3, 0)):
        (tmp_path / "x.npy").write_bytes(header(version=version) + values.tobytes())
        assert next(Corpus(tmp_path).batches()).rows.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}\n"
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    assert len(head) % 4 == 0
    (tmp_path / "x.npy").write_bytes(head + values.tobytes())
    assert next(Corpus(tmp_path).batches()).rows.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_rows_at_any_byte_are_read_aligned(tmp_path, monkeypatch, native, version, dtype):
    """Headers of every length: rows that are not aligned in the file are so in memory."""
    if not native:
        monkeypatch.setattr(shard_module.io_extension, "io", None)
    monkeypatch.setattr(shard_module, "BLOCK_BYTES", 4096)
    rows = np.random.default_rng(0).standard_normal((301, 7)).astype(dtype)
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (301, 7)}}".encode()
    for padding in range(8):
        padded = text + b" " * padding + b"\n"
        head = (
            b"\x93NUMPY" + bytes(version) + len(padded).to_bytes(2 * min(version[0], 2), "little")
        )
        (tmp_path / "x.npy").write_bytes(head + padded + rows.tobytes())
        corpus = Corpus(tmp_path / "x.npy")
        for start in (0, 5):
            batches = [batch.rows for batch in corpus.batches(batch_rows=40, start=start)]
            assert all(batch.data_ptr() % rows.itemsize == 0 for batch in batches)
            np.testing.assert_array_equal(torch.cat(batches).numpy(), rows[start:])
        np.testing.assert_array_equal(corpus.take([300, 0, 7]).numpy(), rows[[300, 0, 7]])


def test_mixed_shards_are_refused_by_both_names(tmp_path):
    save(tmp_path / "a_0.npy", columns=3)
    save(tmp_path / "a_1.npy", columns=4)
    a, b = tmp_path / "a_0.npy", tmp_path / "a_1.npy"
    want = rf"{b}: rows are \[\*, 4\] float16, expected \[\*, 3\] float16 as in {a}; move"
    refuse(tmp_path, ValueError, want)
    save(b, columns=3, dtype="<f4")
    refuse(
        tmp_path,
        ValueError,
        rf"{b}: rows are \[\*, 3\] float32, expected \[\*, 3\] float16 as in {a}",
    )


def test_what_is_not_there(tmp_path):
    refuse(tmp_path, FileNotFoundError, r"has no \.npy file")
    refuse(tmp_path / "missing", FileNotFoundError, "No such file.*check that it exists")
    (tmp_path / "x.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(
        FileNotFoundError, match=rf"x\.npy \(a link to {tmp_path}/gone\.npy\): No such"
    ):
        Corpus(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_npy_that_is_not_a_file(tmp_path, make):
    make(tmp_path / "x.npy")
    with pytest.raises(OSError, match=r"x\.npy: Not a regular file"):
        Corpus(tmp_path)


@pytest.fixture
def unprivileged():
    """A folder anyone may enter, and no rights to what is closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        user = os.geteuid()
        yield Path(folder), lambda: os.seteuid(65534) if user == 0 else None
        os.seteuid(user)


def test_unreadable_file_and_folder(unprivileged):
    folder, drop = unprivileged
    save(folder / "rows" / "x.npy")
    (folder / "closed").mkdir()
    os.chmod(folder / "rows" / "x.npy", 0)
    os.chmod(folder / "closed", 0)
    drop()
    with pytest.raises(PermissionError, match=r"x\.npy: Permission denied; check .* this user may"):
        Corpus(folder / "rows")
    with pytest.raises(PermissionError, match=r"closed"):
        Corpus(folder / "closed")


# ---- changes under the reader


def test_truncation_while_reading_is_an_error_not_a_signal(tmp_path):
    path = tmp_path / "x.npy"
    save(path, 9000, 8, "<f4")

    def read_on():
        batches = Corpus(path).batches(batch_rows=1000)
        next(batches)
        os.truncate(path, 40000)
        for batch in batches:
            batch.rows.numpy().copy()

    said, status = fork(read_on)
    assert status == 0  # not -SIGBUS
    assert re.search(r"^ValueError: .*x\.npy: changed while it was read; open it when", said)


def test_a_shard_replaced_after_opening_is_refused(tmp_path):
    save(tmp_path / "x.npy", 6, 4)
    corpus = Corpus(tmp_path)
    save(tmp_path / "x.npy", 4, 6)  # the same number of bytes
    for read in (lambda: next(corpus.batches()), lambda: corpus.take([0])):
        with pytest.raises(ValueError, match=r"x\.npy: changed while"):
            read()
    os.unlink(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError, match=r"x\.npy"):
        next(corpus.batches())


# ---- clip-retrieval


def clip(root, text=(3, 4), image=(3, 4), metadata=2, pattern="{side}_emb_{i}.npy"):
    for side, sizes in (("text", text), ("img", image)):
        for i, rows in enumerate(sizes):
            save(root / f"{side}_emb" / pattern.format(side=side, i=i), rows, 2 + (side == "img"))
    (root / "metadata").mkdir(parents=True)
    for i in range(metadata):
        (root / "metadata" / f"metadata_{i}.parquet").touch()
    return root


def test_clip_retrieval_root_needs_a_side(tmp_path):
    root = clip(tmp_path)
    refuse(root, ValueError, "has text_emb and img_emb; choose with modality 'text' or 'image'")
    refuse(root, ValueError, "modality is 'img', expected 'text', 'image' or None", "img")
    text, image = Corpus(root, "text"), Corpus(root, "image")
    assert (text.subfolder, text.dimension) == ("text_emb", 2)
    assert (image.subfolder, image.num_rows, image.dimension) == ("img_emb", 7, 3)
    assert text.shards[1].path == root / "text_emb" / "text_emb_1.npy" and text.path == root
    plain = Corpus(root / "text_emb", "text")
    assert (plain.subfolder, plain.num_rows) == ("", 7)


def test_clip_retrieval_one_side_only(tmp_path):
    root = clip(tmp_path, image=())
    assert Corpus(root).subfolder == "text_emb"
    refuse(root, FileNotFoundError, "has text_emb/ but no img_emb/", "image")
    assert Corpus(root, "text").num_rows == 7
    (root / "img_emb").mkdir()
    assert Corpus(root, "text").num_rows == 7
    with pytest.raises(FileNotFoundError, match=r"img_emb: has no \.npy file"):
        Corpus(root, "image")


def test_clip_retrieval_beside_loose_shards_is_refused(tmp_path):
    (clip(tmp_path) / "model.pt").write_bytes(b"a checkpoint is no shard")
    assert Corpus(tmp_path, "text").num_rows == 7
    save(tmp_path / "stray.npy")
    refuse(
        tmp_path, ValueError, r"has \.npy files and text_emb/; open the folder of the rows", "text"
    )


def test_clip_retrieval_pairs_must_have_as_many_rows(tmp_path):
    root = clip(tmp_path, text=(3, 4, 5), image=(3, 9), metadata=3)
    want = r"text_emb_1\.npy: has 4 rows, .*img_emb_1\.npy has 9; .*embed again, or open .*text_emb"
    refuse(root, ValueError, want, "text")
    with pytest.raises(ValueError, match=r"img_emb_1\.npy: has 9 rows, .*text_emb_1\.npy has 4"):
        Corpus(root, "image")
    assert Corpus(root / "text_emb").num_rows == 12
    save(root / "img_emb" / "img_emb_1.npy", 4)
    assert Corpus(root, "text").num_rows == 12  # a number one side lacks is no error
    os.rename(root / "img_emb" / "img_emb_1.npy", root / "img_emb" / "img_emb_0001.npy")
    save(root / "img_emb" / "img_emb_0001.npy", 8)
    refuse(root, ValueError, r"img_emb_0001\.npy has 8", "text")  # paired by number, not by name


def test_clip_retrieval_names_without_numbers_pair_by_name(tmp_path):
    root = clip(tmp_path, text=(3,), image=(4,), metadata=0, pattern="rows.npy")
    refuse(root, ValueError, r"text_emb/rows\.npy: has 3 rows, .*img_emb/rows\.npy has 4", "text")


NAMES = {  # of shard i of n on each side
    "number": "{side}_emb_{i}",
    "zeros": "{side}_emb_{i:05}",
    "of": "train-{i:05}-of-{n:05}",
    "of with a side": "{side}-{i}-of-{n}",
    "model": "vit-b-32-{side}-{i}-float16",
    "spark": "part-{i:05}-{hash}-c000",
    "no number": "{letter}",
}


def name_shard(kind, side, i, n):
    parts = {"letter": "abcd"[i], "hash": {"text": "3f2a-9", "img": "7c1b", "metadata": "0e"}[side]}
    return NAMES[kind].format(side=side, i=i, n=n, **parts)


@pytest.mark.parametrize("kind", NAMES)
def test_clip_retrieval_shards_pair_whatever_their_names(tmp_path, kind):
    """Sound roots open without a warning, and any two shards that differ are found."""
    sizes = (5, 4, 2)
    for side in ("text", "img"):
        for i, rows in enumerate(sizes):
            save(tmp_path / f"{side}_emb" / f"{name_shard(kind, side, i, 3)}.npy", rows, seed=i)
    (tmp_path / "metadata").mkdir()
    for i in range(3):
        (tmp_path / "metadata" / f"{name_shard(kind, 'metadata', i, 3)}.parquet").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Corpus(tmp_path, "text").num_rows == Corpus(tmp_path, "image").num_rows == 11
    for i in range(3):
        path = tmp_path / "img_emb" / f"{name_shard(kind, 'img', i, 3)}.npy"
        save(path, 7)
        refuse(tmp_path, ValueError, f"has {sizes[i]} rows, .*{path.name} has 7", "text")
        save(path, sizes[i])


def test_clip_retrieval_other_parts_of_a_root_do_not_pair(tmp_path):
    """Parts 0 and 1 of one side, and 2 and 3 of the other: nothing says that they are aligned."""
    for kind in ("number", "of"):
        root = tmp_path / kind
        for side, first in (("text", 0), ("img", 2)):
            for i in range(2):
                name = name_shard(kind, side, i + first, 4)
                save(root / f"{side}_emb" / f"{name}.npy", 3 + i + first)
        assert Corpus(root, "text").num_rows == 7


# ---- memory

CODE_BYTES = 60 << 20  # of libraries, which a process maps again as it runs them


def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    """A file of 1 GiB takes the windows that are read ahead, however a busy machine runs them."""
    size = 1 << 30
    head = header("'<f2'", f"({size >> 11}, 1024)")  # 2 KiB a row, sparse on disk
    (tmp_path / "x.npy").write_bytes(head)
    os.truncate(tmp_path / "x.npy", len(head) + size)
    corpus = Corpus(tmp_path)

    def read_it():
        zeros = (len(batch.rows) for batch in corpus.batches() if not batch.rows[:, 0].any())
        assert corpus.num_rows == sum(zeros)

    windows = (shard_module.BLOCKS_AHEAD + 3) * shard_module.BLOCK_BYTES
    assert memory_growth(read_it) < windows + CODE_BYTES < size // 4


def test_writing_does_not_grow_memory(tmp_path):
    rows = torch.ones(32768, 512)

    def write_it():
        with ShardWriter(tmp_path / "x.npy", 4 * 32768, 512, torch.float32) as writer:
            for _ in range(4):
                writer.write(rows)

    assert memory_growth(write_it) < CODE_BYTES < rows.nbytes
    assert Corpus(tmp_path).num_rows == 4 * 32768


# ---- writing


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.integers(1, 71),
    st.integers(1, 71),
)
def test_round_trip(tmp_path, rows, columns, dtype, write_rows, read_rows):
    values = torch.randn(rows, columns).to(dtype)
    path = tmp_path / "out" / "x.npy"
    with ShardWriter(path, rows, columns, dtype) as writer:
        for part in values.split(write_rows):
            writer.write(part)
    np.save(tmp_path / "numpy.npy", values.numpy())
    assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    parts = [b.rows for b in Corpus(path).batches(batch_rows=read_rows)]
    assert torch.equal(torch.cat([torch.empty(0, columns, dtype=dtype), *parts]), values)
    assert os.listdir(path.parent) == ["x.npy"]


def test_no_write_is_larger_than_a_mebibyte(tmp_path):
    """Larger ones take large blocks of the page cache, which are slow in virtual machines."""
    sizes, rows = [], torch.randn(3 << 10, 512)  # 6 MiB
    with ShardWriter(tmp_path / "a.npy", len(rows), 512, rows.dtype) as writer:
        write = writer._file.write
        writer._file = SimpleNamespace(
            write=lambda data: sizes.append(len(data)) or write(data),
            tell=writer._file.tell,
            fileno=writer._file.fileno,
        )
        writer.write(rows)
    assert max(sizes) <= 1 << 20 and sum(sizes) == rows.nbytes
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows)


def test_strided_and_gradient_rows_are_written(tmp_path):
    values = torch.randn(6, 8, requires_grad=True)
    with ShardWriter(tmp_path / "x.npy", 8, 3, torch.float32) as writer:
        writer.write(values[::2, 1:4])
        writer.write(values.T[:5, :3])
    want = torch.cat([values[::2, 1:4], values.T[:5, :3]]).detach()
    assert torch.equal(next(Corpus(tmp_path).batches()).rows, want)


def test_writer_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "x.npy"
    for dtype in (torch.bfloat16, torch.int64):
        with pytest.raises(
            TypeError, match=rf"x\.npy: got {dtype}, expected one of float16.*convert"
        ):
            ShardWriter(path, 1, 1, dtype)
    for name, rows, columns in (
        ("x.npy", -1, 2),
        ("x.npy", 1, 0),
        ("x.bin", 1, 1),
        (".x.npy", 1, 1),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}: got \[{rows}, {columns}\], expected rows >= 0"
        ):
            ShardWriter(tmp_path / name, rows, columns, torch.float32)


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(1, 4),
        torch.ones(3),
        torch.ones(1, 1, 3),
        torch.ones(3, 3),
        torch.ones(1, 3).half(),
        torch.tensor(1.0),
    ],
    ids=["columns", "1-d", "3-d", "too many", "dtype", "0-d"],
)
def test_wrong_rows_leave_nothing(tmp_path, rows):
    want = (
        r"x\.npy: got \[.*\] torch\.float.* after 2 rows, expected \[n, 3\] torch\.float32, 4 rows"
    )
    with (
        pytest.raises(ValueError, match=want),
        ShardWriter(tmp_path / "x.npy", 4, 3, torch.float32) as w,
    ):
        w.write(torch.ones(2, 3))
        w.write(rows)
    assert os.listdir(tmp_path) == []


def test_too_few_rows_and_exceptions_leave_what_was_there(tmp_path):
    array = save(tmp_path / "x.npy", 2, 3, "<f4")
    with pytest.raises(ValueError, match=r"x\.npy: got 1 rows, expected 2; nothing was kept"):
        with ShardWriter(tmp_path / "x.npy", 2, 3, torch.float32) as writer:
            writer.write(torch.ones(1, 3))
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path / "x.npy", 2, 3, torch.float32) as writer:
            writer.write(torch.ones(2, 3))
            assert sorted(os.listdir(tmp_path)) == [".x.npy.partial", "x.npy"]
            assert len(Corpus(tmp_path).shards) == 1
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["x.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array)


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    with ShardWriter(tmp_path / "x.npy", 1, 1, torch.float32) as writer:
        writer.write(torch.ones(1, 1))
    assert calls == [".x.npy.partial", "rename", tmp_path.name]


def test_a_killed_writer_leaves_no_shard_and_the_next_run_replaces_its_file(tmp_path):
    def die():
        with ShardWriter(tmp_path / "x.npy", 2, 3, torch.float32) as writer:
            writer.write(torch.ones(2, 3))
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(fork(die)[1]) == signal.SIGKILL
    assert os.listdir(tmp_path) == [".x.npy.partial"]
    refuse(tmp_path, FileNotFoundError, r"has no \.npy file")
    with ShardWriter(tmp_path / "x.npy", 1, 3, torch.float32) as writer:
        writer.write(torch.zeros(1, 3))
    assert os.listdir(tmp_path) == ["x.npy"]
    assert next(Corpus(tmp_path).batches()).rows.tolist() == [[0, 0, 0]]


def test_of_two_writers_the_later_one_wins_and_nothing_mixes(tmp_path):
    first = ShardWriter(tmp_path / "x.npy", 1, 2, torch.float32).__enter__()
    second = ShardWriter(tmp_path / "x.npy", 1, 2, torch.float32).__enter__()
    first.write(torch.ones(1, 2))
    second.write(torch.zeros(1, 2))
    with pytest.raises(OSError, match=r"x\.npy: Another writer took over the file"):
        first.__exit__(None, None, None)
    assert os.listdir(tmp_path) == [".x.npy.partial"]
    second.__exit__(None, None, None)
    assert next(Corpus(tmp_path).batches()).rows.tolist() == [[0, 0]]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with ShardWriter(tmp_path / "x.npy", 1000, 3, torch.float32) as writer:
            writer.write(torch.ones(1000, 3))

    assert re.search(r"^OSError: .*x\.npy: File too large; .*the disk has room", fork(fill)[0])
    assert os.listdir(tmp_path) == []


def test_a_destination_that_cannot_be_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/x\.npy: "):
        ShardWriter(tmp_path / "file" / "x.npy", 1, 1, torch.float32).__enter__()
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(IsADirectoryError, match=r"x\.npy: Is a directory"):
        with ShardWriter(tmp_path / "x.npy", 0, 1, torch.float32):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "x.npy"]


def test_shards_in_folders_are_not_read_and_the_folders_are_named(tmp_path):
    save(tmp_path / "only/a/x.npy")
    save(tmp_path / "only/b/x.npy")
    with pytest.raises(
        FileNotFoundError,
        match=r"only: has no .npy file .*, only folders \(a, b\); open one",
    ):
        Corpus(tmp_path / "only")
    save(tmp_path / "both/x.npy", rows=4)
    save(tmp_path / "both/more/y.npy")
    assert Corpus(tmp_path / "both").num_rows == 4


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.npy.zst"])
def test_compressed_files_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x1f\x8b\x08\0")
    with pytest.raises(ValueError, match=rf"{name}: its suffix is none of .*decompress it"):
        Corpus(path)
    with pytest.raises(FileNotFoundError, match=r"has no \.npy file .*decompress it"):
        Corpus(tmp_path)


def test_a_dataset_of_several_splits_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"embedding": [[1.0, 2.0], [3.0, 4.0]]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=r"only folders \(test, train\); open one of them"):
        Corpus(tmp_path / "d")
    assert Corpus(tmp_path / "d/train").num_rows == 2
