"""Rows of a corpus by number and with their ids, as an array and for torch's DataLoader."""

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils.data import DataLoader

from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = np.random.default_rng(0).standard_normal((23, 3)).astype(np.float32)
IDS = [f"id {number}" for number in range(23)]
CUTS = [(0, 7), (7, 8), (8, 8), (8, 23)]


def table(first, end):
    rows = pa.FixedSizeListArray.from_arrays(pa.array(ROWS[first:end].reshape(-1)), 3)
    return pa.table({"id": IDS[first:end], "embedding": rows})


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A folder of four parquet files with ids, one of them without a row."""
    folder = tmp_path_factory.mktemp("parquet")
    for number, (first, end) in enumerate(CUTS):
        pq.write_table(table(first, end), folder / f"x_{number}.parquet", row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def npy(tmp_path_factory):
    """The same rows as `.npy` files, without ids."""
    folder = tmp_path_factory.mktemp("npy")
    for number, (first, end) in enumerate(CUTS):
        np.save(folder / f"x_{number}.npy", ROWS[first:end])
    return folder


# ---- ids


@pytest.mark.parametrize(
    "form", ["parquet", "arrow", "hf", "pickle", "tar", "npz", "pt", "tensors"]
)
def test_ids_lie_beside_the_rows_of_every_format(tmp_path, parquet, form):
    ids = IDS
    if form in ("npz", "pt", "tensors"):
        ids = [str(100 + number) for number in range(23)]
        for number, (first, end) in enumerate(CUTS):
            entries = {"embedding": ROWS[first:end], "id": np.arange(100 + first, 100 + end)}
            if form == "npz":
                np.savez(tmp_path / f"x_{number}.npz", **entries)
            elif form == "tensors":
                save_file(entries, tmp_path / f"x_{number}.safetensors")
            else:
                tensors = {name: torch.from_numpy(entry) for name, entry in entries.items()}
                torch.save(tensors, tmp_path / f"x_{number}.pt")
    elif form in ("pickle", "tar"):  # neither can hold a shard without rows
        source = tmp_path / "one.parquet"
        name = "__key__" if form == "tar" else "id"
        pq.write_table(table(0, 23).rename_columns([name, "embedding"]), source)
        convert(Corpus(source), tmp_path / "out", form)
    else:
        convert(Corpus(parquet), tmp_path / "out", form)
    place = tmp_path / "out" if (tmp_path / "out").exists() else tmp_path
    corpus = Corpus(place, allow_pickle=form == "pickle")
    for batch in corpus.batches(batch_rows=4):
        first = corpus.starts[batch.shard] + batch.first
        np.testing.assert_array_equal(batch.rows.numpy(), ROWS[first : first + len(batch.rows)])
    assert list(corpus.ids()) == ids


def test_ids_of_a_root_come_from_its_metadata(tmp_path):
    for number, (first, end) in enumerate(CUTS):
        for folder in ("text_emb", "metadata"):
            (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / f"text_emb/text_emb_{number}.npy", ROWS[first:end])
        ids = pa.table({"id": IDS[first:end], "caption": [""] * (end - first)})
        pq.write_table(ids, tmp_path / f"metadata/metadata_{number}.parquet")
    corpus = Corpus(tmp_path)
    assert list(corpus.ids()) == IDS
    longer = pa.table({"id": IDS})
    pq.write_table(longer, tmp_path / "metadata/metadata_3.parquet")
    with pytest.raises(
        ValueError, match=r"metadata_3\.parquet: has more than 15 entries, .* 15 rows"
    ):
        list(corpus.ids())


@pytest.mark.parametrize("form", ["parquet", "npz", "metadata"])
def test_ids_of_bytes_are_utf8_and_lists_are_no_ids(tmp_path, form):
    def ids_of(ids):
        rows = pa.FixedSizeListArray.from_arrays(pa.array(ROWS[: len(ids)].reshape(-1)), 3)
        shard, of_ids = pa.table({"id": ids, "embedding": rows}), tmp_path / "metadata/x.parquet"
        if form == "npz":
            np.savez(tmp_path / "x.npz", embedding=ROWS[: len(ids)], id=np.array(ids))
        elif form == "metadata":
            for path in (tmp_path / "text_emb", of_ids.parent):
                path.mkdir(exist_ok=True)
            np.save(tmp_path / "text_emb/x.npy", ROWS[: len(ids)])
            pq.write_table(shard.select(["id"]), of_ids)
        else:
            pq.write_table(shard, tmp_path / "x.parquet")
        return list(Corpus(tmp_path).ids())

    place = {"npz": "x.npz", "metadata": "metadata/x.parquet"}
    place = place.get(form, "x.parquet")
    assert ids_of([b"a", "é".encode()]) == ["a", "é"]
    with pytest.raises(ValueError, match=rf"{place}: row 1 has b'\\xff', no UTF-8 .*; write it"):
        ids_of([b"a", b"\xff"])
    with pytest.raises(ValueError, match=rf"{place}: row 0 has the id \[1, 2\] of list, expected"):
        ids_of([[1, 2], [3, 4]])
    if form != "npz":  # which has no nulls
        with pytest.raises(ValueError, match=rf"{place}: row 1 has the id None of NoneType, expec"):
            ids_of(["a", None])


def test_only_the_column_of_ids_is_read(tmp_path, monkeypatch):
    wide = table(0, 23).append_column("image", pa.array([b"png"] * 23))
    pq.write_table(wide, tmp_path / "x.parquet")
    asked, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *a, columns, **k: (
            asked.append(columns) or read(self, *a, columns=columns, **k)
        ),
    )
    assert list(Corpus(tmp_path).ids()) == IDS
    assert "image" not in str(asked) and ["id"] in asked


def test_rows_without_ids_say_what_is_there(tmp_path, npy):
    with pytest.raises(ValueError, match=r"x_0\.npy: holds no ids, and .*/metadata is not there"):
        next(Corpus(npy).ids())
    pq.write_table(table(0, 5).rename_columns(["url", "embedding"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: row 0: no column id or .*, but 'url'"):
        next(Corpus(tmp_path).ids())
    entries = {"embedding": ROWS, "label": np.arange(23)}
    save_file(entries, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **entries)
    for name in ("x.safetensors", "x.npz"):
        with pytest.raises(ValueError, match=f"{name}: .*no column id or .*, but 'label'"):
            next(Corpus(tmp_path / name).ids())


# ---- rows by number


@pytest.mark.parametrize("form", ["npy", "parquet"])
@pytest.mark.parametrize(
    "rows",
    [
        0,
        -1,
        np.int64(8),
        torch.tensor(22),
        slice(None),
        slice(5, 9),
        slice(-4, None),
        slice(9, 5),
        slice(100, 200),
        slice(None, None, -3),
        slice(2, 20, 5),
        [3, -1, 3, 0],
        [],
        np.array([7, 8], np.uint8),
        torch.tensor([22, 1]),
    ],
    ids=str,
)
def test_rows_are_those_of_numpy(request, form, rows):
    corpus = Corpus(request.getfixturevalue(form))
    expected = ROWS[np.asarray(rows, int) if isinstance(rows, list) else rows]
    result = corpus[rows]
    assert result.shape == expected.shape and result.dtype == torch.float32
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (23, IndexError),
        (-24, IndexError),
        ([0, 23], IndexError),
        ((1, 2), TypeError),
        (1.5, TypeError),
        ([0.0], TypeError),
        ("id 1", TypeError),
        (None, TypeError),
        ([True, False], TypeError),
        ([[1, 2]], TypeError),
    ],
    ids=str,
)
def test_what_numbers_no_row_is_refused(npy, rows, error):
    with pytest.raises(error, match=rf"^{re.escape(str(npy))}: "):
        Corpus(npy)[rows]


@pytest.mark.parametrize("rows", [-24, [0, -24], 23, np.array([22, 23])], ids=str)
def test_the_error_of_a_row_has_the_given_number(npy, rows):
    number = np.asarray(rows).reshape(-1)[-1]
    with pytest.raises(IndexError, match=rf": got row {number}, expected -23\.\.22$"):
        Corpus(npy)[rows]


def test_a_corpus_says_what_it_is(npy):
    assert repr(Corpus(npy)) == f"<Corpus '{npy}': 23 rows [3] float32>"
    for value, name in ((None, "NoneType"), (5, "int"), ((row for row in ROWS), "generator")):
        with pytest.raises(TypeError, match=f"^Corpus: expected a path, got a {name}; give"):
            Corpus(value)


def test_take_refuses_numbers_that_are_not_whole(npy):
    with pytest.raises(TypeError, match=r"expected whole numbers of rows, got float64"):
        Corpus(npy).take([1.5])


def test_a_corpus_is_a_sequence_of_rows_for_python_and_a_loader(npy):
    corpus = Corpus(npy)
    np.testing.assert_array_equal(torch.stack(list(corpus)).numpy(), ROWS)
    batches = list(DataLoader(corpus, batch_size=10))
    np.testing.assert_array_equal(torch.cat(batches).numpy(), ROWS)


# ---- as an array


def test_numpy_makes_an_array_of_the_rows(tmp_path, npy):
    corpus = Corpus(npy)
    np.testing.assert_array_equal(np.asarray(corpus), ROWS)
    np.testing.assert_array_equal(np.array(corpus, np.float64, copy=True), ROWS.astype(float))
    with pytest.raises(ValueError, match="always copied; leave copy=False out"):
        np.asarray(corpus, copy=False)
    save_file_of_bfloat16(tmp_path / "x.safetensors")
    widened = np.asarray(Corpus(tmp_path))
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, torch.from_numpy(ROWS).bfloat16().float())


def save_file_of_bfloat16(path):
    from safetensors.torch import save_file

    save_file({"embedding": torch.from_numpy(ROWS).bfloat16()}, path)
