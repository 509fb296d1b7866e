"""Every format of rows on disk: what goes in comes out, aligned or not, and what is refused how."""

import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.memory import memory_growth

from realign_fast.cli.main import main
from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.corpus.formats import arrow
from realign_fast.corpus.formats import arrow as arrow_module
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

pa = pytest.importorskip("pyarrow")
ipc, pq = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[2]
DIMENSION = 12
FLOATS = ("float16", "float32", "float64")
KINDS = ("list", "large_list", "fixed_list", "binary")
TABLES = [f"{file}-{kind}" for file in ("parquet", "arrow", "stream") for kind in KINDS]


def random_rows(count, dtype="float32", seed=0, columns=DIMENSION):
    return (np.random.default_rng(seed).standard_normal((count, columns)) + 1).astype(dtype)


def vectors(rows, kind):
    """The rows as an Arrow column of a kind."""
    values = pa.array(rows.reshape(-1))
    if kind == "fixed_list":
        return pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    if kind == "binary":
        width = rows.shape[1] * rows.itemsize
        return pa.array([row.tobytes() for row in rows], pa.binary(width))
    make = pa.list_ if kind == "list" else pa.large_list
    return pa.array(list(rows), make(values.type))


def table_of(rows, kind="fixed_list", column="embedding"):
    """Rows between two other columns, one of them with nulls, and metadata everywhere."""
    array, count = vectors(rows, kind), len(rows)
    ids = pa.array([None if i == 1 else f"id é {i}" for i in range(count)], pa.string())
    schema = pa.schema(
        [
            pa.field("id", pa.string(), metadata={"about": "text"}),
            pa.field(column, array.type, metadata={"dtype": str(rows.dtype)}),
            pa.field("tags", pa.list_(pa.int64())),
        ],
        metadata={"made by": "hand"},
    )
    return pa.Table.from_arrays(
        [ids, array, pa.array([[i] * (i % 3) for i in range(count)])], schema=schema
    )


def save_table(table, path, file, chunk=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    if file == "parquet":
        pq.write_table(table, path, row_group_size=chunk)
    else:
        with (ipc.new_file if file == "arrow" else ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk)


def load_table(path, file):
    if file == "parquet":
        return pq.read_table(path)
    return (ipc.open_file if file == "arrow" else ipc.open_stream)(path.read_bytes()).read_all()


def save_shards(folder, form, parts):
    """`parts` as shards of a format; returns their paths."""
    file, _, kind = form.partition("-")
    folder.mkdir(parents=True, exist_ok=True)
    suffix = {"stream": "arrow"}.get(file, file)
    paths = [folder / f"rows_{i}.{suffix}" for i in range(len(parts))]
    for path, rows in zip(paths, parts, strict=True):
        if file == "npy":
            np.save(path, rows)
        elif file == "safetensors":
            tensors = {"a": rows[:, :1].copy(), "embedding": rows, "n": np.arange(len(rows))}
            tensors["z"] = rows[:, :2].copy()  # lies behind the rows
            save_file(tensors, path, metadata={"made by": "hand"})
        elif file == "npz":
            np.savez(path, n=np.arange(len(rows)), rows=rows)
        elif file == "pt":
            torch.save({"n": torch.arange(len(rows)), "rows": torch.from_numpy(rows)}, path)
        else:
            save_table(table_of(rows, kind), path, file)
    return paths


def everything(corpus, **options):
    return torch.cat([batch.rows for batch in corpus.batches(**options)]).numpy()


# ---- reading


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", ["safetensors", "npz", "pt", *TABLES])
def test_rows_and_batches_are_those_of_npy(tmp_path, form, dtype):
    parts = [random_rows(n, dtype, n) for n in (23, 1, 16)]
    save_shards(tmp_path / "npy", "npy", parts)
    save_shards(tmp_path / "form", form, parts)
    npy, corpus = Corpus(tmp_path / "npy"), Corpus(tmp_path / "form")
    assert (corpus.num_rows, corpus.dimension, corpus.dtype) == (
        npy.num_rows,
        npy.dimension,
        npy.dtype,
    )
    for options in ({"batch_rows": 5}, {"batch_rows": 5, "start": 12}, {"batch_rows": 100}):
        for ours, theirs in zip(corpus.batches(**options), npy.batches(**options), strict=True):
            assert ours[:2] == theirs[:2] and ours.rows.dtype == theirs.rows.dtype
            assert torch.equal(ours.rows, theirs.rows)
            ours.rows.zero_()  # a batch may be written to, and the file stays as it is
    np.testing.assert_array_equal(everything(corpus), np.concatenate(parts))
    ids = [39, 0, 22, 23, 24, 24, 7]
    assert torch.equal(corpus.take(ids), npy.take(ids))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(TABLES),
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 40),
)
def test_any_chunks_any_batches_any_start(tmp_path, form, rows, chunk, batch, start):
    file, _, kind = form.partition("-")
    data, start = random_rows(rows), min(start, rows)
    path = tmp_path / f"x.{ {'stream': 'arrow'}.get(file, file) }"
    save_table(table_of(data, kind), path, file, chunk)
    got = [batch.rows for batch in Corpus(path).batches(batch_rows=batch, start=start)]
    np.testing.assert_array_equal(torch.cat([torch.empty(0, DIMENSION), *got]), data[start:])


def test_pieces_are_joined_in_the_memory_of_one_batch(tmp_path):
    """The reader of a tar gives row after row; a batch of views would hold them all as well."""
    np.save(tmp_path / "rows.npy", random_rows(3000, columns=256))
    convert(Corpus(tmp_path / "rows.npy"), tmp_path / "tar", "tar")
    tracemalloc.start()
    try:
        for batch in Corpus(tmp_path / "tar").batches(batch_rows=1000):
            assert batch.rows.shape == (1000, 256)
        batch_bytes = 1000 * 256 * 4  # that of the loop, and the one that is filled meanwhile
        assert tracemalloc.get_traced_memory()[1] < 2.6 * batch_bytes
    finally:
        tracemalloc.stop()


def test_another_column_is_read_by_its_name(tmp_path):
    data = random_rows(9, "float16")
    path = tmp_path / "x.parquet"
    save_table(table_of(data, "binary", "text_emb").replace_schema_metadata(), path, "parquet")
    assert np.array_equal(everything(Corpus(path, column="text_emb")), data)
    bare = pa.table({"v": pa.array([row.tobytes() for row in data], pa.binary(DIMENSION * 2))})
    pq.write_table(bare, path)
    assert np.array_equal(everything(Corpus(path, column="v:float16")), data)
    with pytest.raises(TypeError, match=r"x\.parquet: column 'v' .*of no type; .* v:float16"):
        Corpus(path, column="v")
    with pytest.raises(
        TypeError, match="of float64; expected its number type and a multiple of its bytes"
    ):
        pq.write_table(pa.table({"v": pa.array([b"123456"], pa.binary(6))}), path)
        Corpus(path, column="v:float64")


def test_a_tensor_is_read_by_its_name(tmp_path):
    a, b = random_rows(4), random_rows(6, "float64")
    save_file({"text": a, "image": b}, tmp_path / "x.safetensors")
    assert np.array_equal(everything(Corpus(tmp_path, column="image")), b)
    with pytest.raises(ValueError, match=r"no tensor 'embedding'; .*of: .*text \[4, 12\]"):
        Corpus(tmp_path)
    save_file({"only": a}, tmp_path / "x.safetensors")
    assert np.array_equal(everything(Corpus(tmp_path)), a)


def test_compressed_arrow_and_sliced_tables_are_read(tmp_path):
    data = random_rows(40)
    options = ipc.IpcWriteOptions(compression="zstd")
    with ipc.new_file(tmp_path / "x.arrow", table_of(data).schema, options=options) as writer:
        writer.write_table(table_of(data).slice(3, 20))
    assert np.array_equal(everything(Corpus(tmp_path)), data[3:23])


# ---- writing


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", ["safetensors", "npz", "pt", *TABLES])
def test_aligned_rows_are_those_of_npy_and_all_else_is_kept(tmp_path, form, dtype):
    parts = [random_rows(n, dtype, n) for n in (23, 1, 16)]
    np.save(tmp_path / "target.npy", -random_rows(30, dtype))
    quick = Settings(progress=False, batch_bytes=400)
    save_shards(tmp_path / "npy", "npy", parts)
    align(tmp_path / "npy", tmp_path / "target.npy", tmp_path / "out-npy", quick)
    paths = save_shards(tmp_path / form, form, parts)
    out = tmp_path / "out"
    align(tmp_path / form, tmp_path / "target.npy", out, quick)
    assert sorted(os.listdir(out)) == sorted(["__realign__", *(path.name for path in paths)])
    got, want = everything(Corpus(out)), everything(Corpus(tmp_path / "out-npy"))
    assert got.dtype == dtype and got.tobytes() == want.tobytes()
    for path in paths:
        same_but_rows(path, out / path.name, form.partition("-")[0])
    align(tmp_path / form, tmp_path / "target.npy", out, quick)  # again, over the first result
    assert everything(Corpus(out)).tobytes() == want.tobytes()


def same_but_rows(source, result, file):
    if file in ("npz", "pt"):
        load = np.load if file == "npz" else torch.load
        before, after = load(source), load(result)
        assert set(before) == set(after) == {"n", "rows"}
        assert np.array_equal(before["n"], after["n"])
        return
    if file == "safetensors":
        before, after = load_file(source), load_file(result)
        assert source.stat().st_size == result.stat().st_size
        for name in ("a", "n", "z"):
            assert before[name].tobytes() == after[name].tobytes()
        length = 8 + int.from_bytes(source.read_bytes()[:8], "little")
        assert source.read_bytes()[:length] == result.read_bytes()[:length]
        return
    before, after = load_table(source, file), load_table(result, file)
    assert before.schema.equals(after.schema, check_metadata=True)
    assert before.drop_columns(["embedding"]).equals(after.drop_columns(["embedding"]))
    assert not before.equals(after)


@pytest.mark.parametrize(
    "form", ["safetensors", "npz", "pt", "parquet-list", "arrow-list", "stream-binary"]
)
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, form):
    (path,) = save_shards(tmp_path / "in", form, [random_rows(9)])
    shard, out = Corpus(path).shards[0], tmp_path / "out" / path.name
    with shard.writer(out) as writer:
        writer.write(torch.zeros(4, DIMENSION))
        assert os.listdir(out.parent) == [f".{path.name}.partial"]
        writer.write(torch.ones(5, DIMENSION))
    assert os.listdir(out.parent) == [path.name]
    whole = out.read_bytes()
    with pytest.raises(ValueError, match="got 4 rows, expected 9; nothing was kept"):
        with shard.writer(out) as writer:
            writer.write(torch.zeros(4, DIMENSION))
    with pytest.raises(KeyboardInterrupt), shard.writer(out) as writer:
        writer.write(torch.zeros(9, DIMENSION))
        raise KeyboardInterrupt
    assert os.listdir(out.parent) == [path.name] and out.read_bytes() == whole
    assert everything(Corpus(out)).sum() == 5 * DIMENSION


def test_the_file_is_whole_before_it_is_synced_and_renamed(tmp_path, monkeypatch):
    (path,) = save_shards(tmp_path / "in", "parquet-list", [random_rows(9)])
    sizes, fsync = [], os.fsync

    def record(descriptor):
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with Corpus(path).shards[0].writer(tmp_path / "x.parquet") as writer:
        writer.write(torch.zeros(9, DIMENSION))
    assert sizes[0] == (tmp_path / "x.parquet").stat().st_size


# ---- Hugging Face datasets


def test_a_saved_dataset_becomes_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = random_rows(50)
    data = {"id": [f"n{i}" for i in range(50)], "embedding": list(rows)}
    kind = getattr(datasets, "List", datasets.Sequence)
    features = {"id": datasets.Value("string"), "embedding": kind(datasets.Value("float32"))}
    made = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    made.save_to_disk(tmp_path / "in", num_shards=12)
    np.save(tmp_path / "target.npy", -random_rows(30))
    corpus = Corpus(tmp_path / "in")
    np.testing.assert_array_equal(everything(corpus), rows)
    align(corpus, tmp_path / "target.npy", tmp_path / "out", Settings(progress=False))
    back = datasets.load_from_disk(tmp_path / "out")
    assert back["id"] == data["id"] and back.features == made.features
    np.testing.assert_array_equal(
        np.asarray(back["embedding"], np.float32), everything(Corpus(tmp_path / "out"))
    )
    old, new = (
        json.loads((tmp_path / place / "state.json").read_text())["_fingerprint"]
        for place in ("in", "out")
    )
    assert new != old  # or the library would serve cached maps of the old rows


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("{", "expected a json object"),
        ("[]", "expected a json object"),
        ("{}", "expected _data_files to name files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "expected _data_files to name files"),
        ('{"_data_files": [{"filename": "x.arrow"}], "_indices_files": [1]}', "flatten_indices"),
    ],
)
def test_a_state_that_names_no_shards_is_refused(tmp_path, state, words):
    save_shards(tmp_path, "stream-list", [random_rows(3)])
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=rf"state\.json: .*{words}"):
        Corpus(tmp_path)


# ---- refusals


def refuse(path, words, error=ValueError, **options):
    with pytest.raises(error, match=words) as caught:
        everything(Corpus(path, **options))
    assert str(path) in str(caught.value), "the error must name the file"
    return str(caught.value)


@pytest.mark.parametrize("file", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize(
    ("values", "kind", "words", "error"),
    [
        ([[1, 2]], pa.list_(pa.int64()), "int64>, expected a list or fixed-size", TypeError),
        ([1.0], pa.float32(), "is float, expected a list", TypeError),
        (["a"], pa.string(), "is string, expected a list", TypeError),
        (
            [[[1.0]]],
            pa.list_(pa.list_(pa.float32())),
            "is list<.*expected a list .*of half",
            TypeError,
        ),
        ([None, []], pa.list_(pa.float32()), "nothing says its dimension; leave it", ValueError),
        ([], pa.list_(pa.float32()), "nothing says its dimension; leave it", ValueError),
    ],
)
def test_a_column_that_holds_no_rows_says_which_row(tmp_path, file, values, kind, words, error):
    table = pa.table({"id": range(len(values)), "embedding": pa.array(values, kind)})
    path = tmp_path / ("x.parquet" if file == "parquet" else "x.arrow")
    save_table(table, path, file)
    refuse(path, words, error)


@pytest.mark.parametrize("begin", [1 << 20, -(1 << 20)])
@pytest.mark.parametrize("rows", [2, 9])  # in the first record batch, in the second
def test_offsets_beyond_the_numbers_are_not_followed(tmp_path, rows, begin):
    (path,) = save_shards(tmp_path, "stream-list", [random_rows(rows)])
    offsets, whole = np.arange(3, dtype="<i4") * DIMENSION, path.read_bytes()
    place = whole.rindex(offsets.tobytes())
    shifted = (offsets + np.int32(begin)).tobytes()
    path.write_bytes(whole[:place] + shifted + whole[place + len(shifted) :])
    refuse(path, "cannot be read")


@pytest.mark.parametrize("file", ["parquet", "arrow"])
def test_ids_that_are_no_utf8_are_not_copied_on(tmp_path, file):
    array = vectors(random_rows(3), "list")
    ids = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    path = tmp_path / f"x.{file}"
    save_table(pa.table({"id": ids, "embedding": array}), path, file)
    shard = Corpus(path).shards[0]
    with pytest.raises(ValueError, match=rf"{path}: cannot be read .*UTF8"):
        with shard.writer(tmp_path / "out" / path.name) as writer:
            writer.write(torch.zeros(3, DIMENSION))
    assert os.listdir(tmp_path / "out") == []


# ---- rows that are missing, parts that are empty


@pytest.mark.parametrize("file", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_list", "binary"])
def test_a_row_that_is_missing_is_not_a_number_and_keeps_its_place(tmp_path, file, dtype, kind):
    rows = random_rows(40, dtype)
    values, expected = rows.tolist(), rows.copy()
    for row in (0, 7, 39):  # the first says no dimension
        values[row], expected[row] = None, np.nan
    if kind != "binary":
        values[9][4], expected[9, 4] = None, np.nan
    if kind in ("list", "large_list"):
        values[11], expected[11] = [], np.nan
    number = pa.from_numpy_dtype(np.dtype(dtype))
    types = {
        "list": pa.list_(number),
        "large_list": pa.large_list(number),
        "fixed_list": pa.list_(number, DIMENSION),
        "binary": pa.binary(rows[0].nbytes),
    }
    if kind == "binary":
        values = [None if row is None else np.array(row, dtype).tobytes() for row in values]
    field = pa.field("embedding", types[kind], metadata={"dtype": dtype})
    path = tmp_path / ("x.parquet" if file == "parquet" else "x.arrow")
    array = pa.array(values, types[kind])
    save_table(pa.Table.from_arrays([array], schema=pa.schema([field])), path, file)
    corpus = Corpus(path)
    np.testing.assert_array_equal(everything(corpus, batch_rows=6), expected)
    np.testing.assert_array_equal(corpus.take([39, 8, 9]).numpy(), expected[[39, 8, 9]])


@pytest.mark.parametrize("file", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize("kind", ["short", "long"])
def test_a_row_of_another_length_is_an_error_that_names_it(tmp_path, file, kind):
    """Not a bad row: it would say the dimension of all others if it were the first."""
    values = random_rows(30).tolist()
    values[3], found = None, f"{DIMENSION + 1} numbers"
    if kind == "long":
        values[20].append(1.0)
    else:
        values[20], found = values[20][:2], "2 numbers"
    table = pa.table({"embedding": pa.array(values, pa.list_(pa.float32()))})
    path = tmp_path / ("x.parquet" if file == "parquet" else "x.arrow")
    save_table(table, path, file)
    corpus = Corpus(path)
    expected = f"row 20 of column 'embedding' has {found}, expected {DIMENSION} numbers as in"
    for read in (lambda: everything(corpus, batch_rows=9), lambda: corpus.take([20])):
        with pytest.raises(ValueError, match=f"{corpus.path}: {expected}"):
            read()


def test_null_rows_are_bad_rows_of_a_run(tmp_path):
    values = [None if i in (7, 90) else row.tolist() for i, row in enumerate(random_rows(100))]
    values[50] = []
    table = pa.table({"embedding": pa.array(values, pa.list_(pa.float32()))})
    save_table(table, tmp_path / "x.parquet", "parquet")
    np.save(tmp_path / "target.npy", -random_rows(30))
    sides = tmp_path / "x.parquet", tmp_path / "target.npy"
    with pytest.raises(ValueError, match=r"x\.parquet.* row 7 .*(not finite|non-finite|bad)"):
        align(*sides, tmp_path / "error", Settings(progress=False))
    for bad_rows, expected in (("skip", [0.0]), ("keep", [np.nan])):
        out = tmp_path / bad_rows
        report = align(*sides, out, Settings(progress=False, bad_rows=bad_rows))
        aligned = everything(Corpus(out))
        assert np.isfinite(aligned).all(axis=1).sum() == (100 if bad_rows == "skip" else 97)
        for row in (7, 50, 90):
            np.testing.assert_array_equal(aligned[row], expected * DIMENSION)
        assert '"nonfinite_rows": 3' in json.dumps(report)
    convert(Corpus(sides[0]), tmp_path / "npy", "npy")
    converted = everything(Corpus(tmp_path / "npy"))
    assert np.flatnonzero(np.isnan(converted).all(axis=1)).tolist() == [7, 50, 90]


@pytest.mark.parametrize(
    "file", ["parquet", "arrow", "stream", "npy", "npz", "pt", "safetensors", "hf"]
)
@pytest.mark.parametrize("kind", ["list", "fixed_list"])
def test_a_part_without_rows_keeps_its_place(tmp_path, file, kind):
    rows = random_rows(30)
    source, form = tmp_path / "in", {"hf": "stream"}.get(file, file)
    parts = [rows[:0], rows[:20], rows[:0], rows[20:], rows[:0]]
    paths = save_shards(
        source, f"{form}-{kind}" if form not in ("npy", "safetensors") else form, parts
    )
    if file == "hf":
        arrow.write_state(source, paths)
    corpus = Corpus(source)
    assert [shard.num_rows for shard in corpus.shards] == [0, 20, 0, 10, 0]
    assert {shard.dimension for shard in corpus.shards} == {DIMENSION}
    np.testing.assert_array_equal(everything(corpus), rows)
    np.testing.assert_array_equal(corpus.take(range(30)).numpy(), rows)
    np.save(tmp_path / "target.npy", -random_rows(30))
    align(corpus, tmp_path / "target.npy", tmp_path / "out", Settings(progress=False))
    assert [shard.num_rows for shard in Corpus(tmp_path / "out").shards] == [0, 20, 0, 10, 0]
    for to in ("npy", "parquet", "arrow"):
        convert(corpus, tmp_path / to, to)
        np.testing.assert_array_equal(everything(Corpus(tmp_path / to)), rows)


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet-fixed_list", "stream-fixed_list"])
def test_a_corpus_of_empty_parts_has_no_rows(tmp_path, form):
    save_shards(tmp_path / "in", form, [random_rows(0)] * 2)
    corpus = Corpus(tmp_path / "in")
    assert (corpus.num_rows, corpus.dimension, list(corpus.batches())) == (0, DIMENSION, [])
    np.save(tmp_path / "target.npy", -random_rows(30))
    with pytest.raises(ValueError, match="row"):
        align(corpus, tmp_path / "target.npy", tmp_path / "out", Settings(progress=False))


# ---- tensor types of Arrow and Ray


def tensor_column(kind, rows):
    """Rows in a tensor type, as its library or a process without the library sees it."""
    shape = {"vector": rows.shape[1:], "matrix": (1, DIMENSION), "wrong": (2, DIMENSION // 2)}
    library, _, name = kind.partition(" ")
    shape = shape[name]
    if library == "arrow":
        tensors = rows.reshape(len(rows), *shape)
        return pa.FixedShapeTensorArray.from_numpy_ndarray(tensors), None
    metadata = {"ARROW:extension:name": "ray.data.arrow_tensor_v2"}
    metadata["ARROW:extension:metadata"] = json.dumps(shape)
    return pa.array(rows.tolist(), pa.large_list(pa.float32())), metadata


TENSORS = ["arrow vector", "arrow matrix", "ray vector", "ray matrix"]


@pytest.mark.parametrize("file", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensor_types_are_read_and_kept(tmp_path, kind, file):
    rows = random_rows(20)
    array, metadata = tensor_column(kind, rows)
    schema = pa.schema([pa.field("embedding", array.type, metadata=metadata)])
    table = pa.Table.from_arrays([array], schema=schema)
    path = tmp_path / "in" / ("x.parquet" if file == "parquet" else "x.arrow")
    save_table(table, path, file)
    corpus = Corpus(path)
    np.testing.assert_array_equal(everything(corpus, batch_rows=6), rows)
    with corpus.shards[0].writer(tmp_path / "out" / path.name) as writer:
        writer.write(torch.from_numpy(-rows))
    result = load_table(tmp_path / "out" / path.name, file)
    assert result.schema.equals(load_table(path, file).schema, check_metadata=True)
    np.testing.assert_array_equal(everything(Corpus(tmp_path / "out")), -rows)


@pytest.mark.parametrize("kind", ["arrow wrong", "ray wrong"])
def test_tensors_that_are_no_vectors_are_refused(tmp_path, kind):
    array, metadata = tensor_column(kind, random_rows(3))
    schema = pa.schema([pa.field("embedding", array.type, metadata=metadata)])
    save_table(pa.Table.from_arrays([array], schema=schema), tmp_path / "x.parquet", "parquet")
    words = r"column 'embedding' holds tensors \[2, 6\], expected vectors \[D\] or \[1, D\]"
    refuse(tmp_path / "x.parquet", words, TypeError)


def test_a_missing_column_lists_those_there_are(tmp_path):
    save_shards(tmp_path, "parquet-list", [random_rows(3)])
    words = r"no column 'emb'; choose one as the column, of: id \(string\), embedding \(list<"
    refuse(tmp_path / "rows_0.parquet", words, column="emb")


def test_mixed_formats_are_refused_by_both_names(tmp_path):
    save_shards(tmp_path, "parquet-list", [random_rows(3)])
    save_shards(tmp_path, "npy", [random_rows(3)])
    refuse(tmp_path, r"has rows_0\.\w+ and rows_0\.\w+; a folder holds one format")


def test_a_wrong_suffix_and_none_are_refused(tmp_path):
    for form in ("npy", "npz", "pt", "safetensors", "parquet-list", "arrow-list", "stream-list"):
        (path,) = save_shards(tmp_path, form, [random_rows(3)])
        wrong = tmp_path / ("x.npy" if form == "parquet-list" else "x.parquet")
        path.rename(wrong)
        refuse(wrong, r"not a \.npy file|cannot be read")
        wrong.rename(tmp_path / "x")
        refuse(tmp_path / "x", r"its suffix is none of \.tar, .*: rename it")


@pytest.mark.parametrize(
    "form", ["safetensors", "npz", "pt", "parquet-list", "arrow-list", "stream-list"]
)
def test_a_truncated_file_is_one_clear_error(tmp_path, form):
    (path,) = save_shards(tmp_path, form, [random_rows(60)])
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(20, len(whole) - 1, len(whole) // 25), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refuse(path, r"write it|save")


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
@pytest.mark.parametrize("form", ["safetensors", "npz", "pt", "parquet-fixed_list", "stream-list"])
def test_damaged_files_never_escape(tmp_path, form, data):
    (path,) = save_shards(tmp_path, form, [random_rows(20)])
    damaged = bytearray(path.read_bytes())
    places = st.integers(0, min(len(damaged), 600) - 1) | st.integers(0, len(damaged) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(places)] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        list(Corpus(path).batches())  # none, if the damage is a shape of no rows
    except (ValueError, TypeError, OSError) as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "BF16"])
def test_safetensors_at_any_byte_are_read_and_aligned(tmp_path, dtype):
    """Headers of every length, as MLX writes them; the tensor before the rows has an odd size."""
    torch_dtype = getattr(torch, dtype.lower().replace("f", "float"))
    rows = torch.from_numpy(random_rows(37)).to(torch_dtype)
    data = rows.view(torch.uint8).numpy().tobytes()
    np.save(tmp_path / "target.npy", random_rows(50, seed=1))
    for padding in range(8):
        entries = {
            "ids": {"dtype": "U8", "shape": [37], "data_offsets": [0, 37]},
            "embedding": {
                "dtype": dtype,
                "shape": list(rows.shape),
                "data_offsets": [37, 37 + len(data)],
            },
        }
        head = json.dumps(entries).encode() + b" " * padding
        path = tmp_path / "in" / "x.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(range(37)) + data)
        corpus = Corpus(path)
        batches = [batch.rows for batch in corpus.batches(batch_rows=10)]
        assert all(batch.data_ptr() % rows.itemsize == 0 for batch in batches)
        assert torch.equal(torch.cat(batches), rows)
        assert torch.equal(corpus.take([36, 0, 5]), rows[[36, 0, 5]])
    if dtype == "F32":
        align(path, tmp_path / "target.npy", tmp_path / "out", Settings(progress=False))
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        assert after["ids"].tobytes() == before["ids"].tobytes()
        np.testing.assert_array_equal(
            after["embedding"], Corpus(tmp_path / "out" / path.name).take(range(37)).numpy()
        )


@pytest.mark.parametrize("padding", [0, 1, 3, 4])
def test_arrow_buffers_at_any_byte_are_read(tmp_path, padding):
    """The metadata of each message are longer by `padding`, so the numbers begin at an odd byte."""
    rows = random_rows(37)
    sink = pa.BufferOutputStream()
    table = pa.table({"embedding": vectors(rows, "fixed_list")})
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data, at, written = sink.getvalue().to_pybytes(), 0, b""
    while size := int.from_bytes(data[at + 4 : at + 8], "little"):
        message = ipc.MessageReader.open_stream(pa.BufferReader(data[at:])).read_next_message()
        body = at + 8 + size
        written += data[at : at + 4] + (size + padding).to_bytes(4, "little")
        written += data[at + 8 : body] + bytes(padding)
        at = body + len(message.body or b"")
        written += data[body:at]
    (tmp_path / "x.arrow").write_bytes(written + data[at:])
    corpus = Corpus(tmp_path / "x.arrow")
    np.testing.assert_array_equal(next(corpus.batches()).rows.numpy(), rows)
    np.testing.assert_array_equal(corpus.take([36, 0]).numpy(), rows[[36, 0]])


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"embedding":{"dtype":"I16","shape":[1,2],"data_offsets":[0,4]}}', "expected F16"),
        (b'{"embedding":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', r"shape \[4\]"),
        (b'{"embedding":{"dtype":"F32","shape":[-1,2],"data_offsets":[0,8]}}', "shape"),
        (b'{"embedding":{"dtype":"F32","shape":[1,2],"data_offsets":[0,4]}}', "takes 8 bytes"),
        (b'{"embedding":{"dtype":"F32","shape":[1,2],"data_offsets":[0]}}', "takes 8 bytes"),
        (b'{"embedding":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', "truncated"),
        (b'{"embedding":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}', "longer than"),
        (b'{"embedding":7}', "other things than tensors"),
        (b"{}", "no tensor 'embedding'.*of: none"),
        (b"[" * 100_000, "not a .safetensors file"),
        (b"[1]", "not a .safetensors file"),
    ],
)
def test_hostile_safetensors_headers(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refuse(path, words, (ValueError, TypeError))


def test_a_shard_replaced_after_opening_is_refused(tmp_path):
    for form in ("safetensors", "npz", "pt", "parquet-list", "stream-list"):
        (path,) = save_shards(tmp_path / form, form, [random_rows(30)])
        corpus = Corpus(path)
        save_shards(tmp_path / form, form, [random_rows(31)])
        for read in (lambda c=corpus: next(c.batches()), lambda c=corpus: c.take([0])):
            with pytest.raises(ValueError, match="changed while it was read"):
                read()


def test_what_a_run_wrote_beside_its_shards_is_no_shard(tmp_path):
    save_shards(tmp_path, "parquet-list", [random_rows(3)])
    save_file({"embedding": random_rows(3)}, tmp_path / "aligner.safetensors")
    assert [shard.path.name for shard in Corpus(tmp_path).shards] == ["rows_0.parquet"]


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    save_shards(tmp_path, "parquet-list", [random_rows(3)])
    for module in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    command = ["fit", *(f"--{name}={tmp_path}" for name in ("text", "image", "out"))]
    assert main(command) == 9
    assert "pip install 'realign_fast[parquet]'" in capsys.readouterr().err


# ---- memory


@pytest.mark.parametrize(
    "form", ["parquet-fixed_list", "parquet-binary", "arrow-list", "stream-list"]
)
def test_memory_is_bounded_by_the_batch_not_the_file(tmp_path, form):
    """One row group, one record batch, of 4 and of 80 MiB: nearly the same peak."""
    file, _, kind = form.partition("-")
    paths = []
    for mebibytes in (4, 80):
        rows = np.zeros((mebibytes << 8, 1024), np.float32)
        rows[:] = np.arange(1024)
        array = vectors(rows, "fixed_list") if kind != "binary" else vectors(rows, kind)
        if kind == "list":
            offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * 1024)
            array = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
        field = pa.field("embedding", array.type, metadata={"dtype": "float32"})
        table = pa.Table.from_arrays([array], schema=pa.schema([field]))
        paths.append(tmp_path / f"{mebibytes}.{ {'stream': 'arrow'}.get(file, file) }")
        save_table(table, paths[-1], file, chunk=len(rows))

    def copy(path):
        with Corpus(path).shards[0].writer(tmp_path / "out" / path.name) as writer:
            for batch in Corpus(path).batches(batch_bytes=1 << 20):
                writer.write(batch.rows)

    small, large = (memory_growth(lambda path=path: copy(path)) for path in paths)
    assert large - small < 40 << 20, f"growth in bytes: {small} {large}"
    assert everything(Corpus(tmp_path / "out" / paths[1].name))[::1000].mean() == 511.5


def test_the_map_of_an_arrow_file_is_let_go_of(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_module, "RELEASE_BYTES", 100)
    (path,) = save_shards(tmp_path, "stream-list", [random_rows(500)])
    np.testing.assert_array_equal(everything(Corpus(path), batch_rows=3), random_rows(500))
