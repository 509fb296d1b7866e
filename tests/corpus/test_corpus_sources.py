"""Corpora of lists, globs, tables and datasets; files that are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from realign_fast import Moments, ReAlign, SharedSpace
from realign_fast.cli.main import main
from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

pa = pytest.importorskip("pyarrow")
pq, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")

ROWS = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32) + 1
OTHERS = np.random.default_rng(1).standard_normal((9, 3)).astype(np.float32) - 1
IDS = [str(number) for number in range(9)]


def vectors(rows=ROWS):
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


# ---- tables and datasets in memory


class Stream:
    """A table of a library of which nothing but Arrow's stream interface is known."""

    def __init__(self, table):
        self.table, self.columns = table, table.schema.names

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def table_in_memory(kind):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    table = pa.table({"id": IDS, "embedding": vectors()})
    dataset = datasets.Dataset(table)
    if kind == "reordered dataset":  # which has a table of indices
        dataset = dataset.select([*range(8, -1, -1)]).select([*range(8, -1, -1)])
    return {
        "pyarrow": lambda: table,
        "batches": lambda: pa.RecordBatchReader.from_batches(table.schema, table.to_batches(4)),
        "stream": lambda: Stream(table),
        "pandas": lambda: pandas.DataFrame({"id": IDS, "embedding": list(ROWS)}),
        "dataset": lambda: dataset.with_format("torch"),
        "reordered dataset": lambda: dataset,
        "iterable dataset": lambda: dataset.to_iterable_dataset(2),
    }[kind]()


TABLES = ["pyarrow", "batches", "stream", "pandas", "dataset"]
TABLES += ["reordered dataset", "iterable dataset"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_or_dataset_is_a_corpus(tmp_path, kind):
    corpus = Corpus(table_in_memory(kind))
    assert (len(corpus), corpus.dimension, corpus.dtype) == (9, 3, torch.float32)
    assert corpus.encoder is None
    batches = list(corpus.batches(batch_rows=4, with_ids=True))
    assert [batch.ids for batch in batches] == [IDS[:4], IDS[4:8], IDS[8:]]
    np.testing.assert_array_equal(torch.cat([batch.rows for batch in batches]).numpy(), ROWS)
    np.testing.assert_array_equal(corpus[[7, -9, 7]].numpy(), ROWS[[7, 0, 7]])
    np.testing.assert_array_equal(corpus[5:7].numpy(), ROWS[5:7])
    (written,) = convert(corpus, tmp_path / "out", "parquet")
    assert pq.read_table(written)["id"].to_pylist() == IDS


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda pandas: pandas.DataFrame({"embedding": list(ROWS)}), id="frame"),
        pytest.param(
            lambda pandas: pandas.DataFrame({"embedding": list(ROWS)})["embedding"], id="series"
        ),
        pytest.param(lambda pandas: pandas.DataFrame(ROWS), id="wide frame"),
        pytest.param(lambda pandas: pa.table({"embedding": vectors()}), id="table"),
        pytest.param(lambda pandas: pa.chunked_array([vectors()]), id="column"),
        pytest.param(lambda pandas: table_in_memory("dataset"), id="dataset"),
        pytest.param(lambda pandas: np.asfortranarray(ROWS.astype(">f4")), id="big-endian"),
    ],
)
def test_maps_take_tables_and_datasets(rows):
    pandas = pytest.importorskip("pandas")
    target = torch.from_numpy(OTHERS)
    expected = ReAlign.fit(torch.from_numpy(ROWS), target)
    aligner = ReAlign.fit(rows(pandas), target)
    torch.testing.assert_close(aligner.shift, expected.shift)
    aligned = torch.as_tensor(aligner(rows(pandas)))
    torch.testing.assert_close(aligned, expected(torch.from_numpy(ROWS)))
    torch.testing.assert_close(Moments().update(rows(pandas)).mean, expected.source_mean)
    options = {"query_role": "image", "method": "calibrate"}
    with pytest.warns(UserWarning, match="standard error"):
        space = SharedSpace.fit(text=rows(pandas), image=target, **options)
    documents = torch.as_tensor(space.documents("text", rows(pandas)))
    torch.testing.assert_close(documents, space.documents("text", torch.from_numpy(ROWS)))


def test_rows_that_are_null_are_nan_and_those_of_another_length_are_named():
    pandas = pytest.importorskip("pandas")
    corpus = Corpus(pandas.DataFrame({"v": [[1.0, 2.0], [], None, [np.nan, 1.0]]}), column="v")
    np.testing.assert_array_equal(corpus[:], [[1, 2]] + [[np.nan] * 2] * 2 + [[np.nan, 1]])
    with pytest.raises(ValueError, match="DataFrame: row 1 of column 'embedding' has 1 numbers"):
        ReAlign.fit(pandas.DataFrame({"embedding": [[1.0, 2.0], [1.0]]}), OTHERS[:, :2])


def test_columns_of_frames_are_matched_by_name():
    """Both sides have the same columns in another order, as two queries return them."""
    pandas = pytest.importorskip("pandas")
    text, image = (pandas.DataFrame(rows, columns=list("abc")) for rows in (ROWS, OTHERS))
    expected = ReAlign.fit(text, image)
    for other in (image[["c", "a", "b"]], image[["b", "a", "c"]]):
        assert torch.equal(ReAlign.fit(text, other).shift, expected.shift)
    space = SharedSpace.fit(text=text, image=image[["c", "a", "b"]])
    by_position = SharedSpace.fit(text=ROWS, image=OTHERS)
    np.testing.assert_array_equal(space.text(ROWS), by_position.text(ROWS))
    renamed = image.rename(columns={"a": "x"})  # by position, as names of two models
    assert torch.equal(ReAlign.fit(text, renamed).shift, expected.shift)


def test_one_column_of_numbers_is_no_row():
    pandas = pytest.importorskip("pandas")
    for fit in (ReAlign.fit, lambda rows, others: SharedSpace.fit(text=others, image=rows)):
        with pytest.raises(
            TypeError, match=r"\w+: expected rows .*one column of 9 numbers in a Seri"
        ):
            fit(pandas.Series(ROWS[:, 0]), OTHERS)
    with pytest.raises(TypeError, match="one column of 9 numbers in a Series; give a frame"):
        ReAlign.fit(ROWS, OTHERS)(pandas.Series(ROWS[:, 0]))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"embedding": [1, "a"]}, TypeError, "DataFrame: cannot become an Arrow table .*one type"),
        ({"embedding": ["a", "b"]}, TypeError, "DataFrame: column 'embedding' is .*choose another"),
        ({"embedding": [[1], [2]]}, TypeError, "DataFrame: column 'embedding' holds int64"),
        ({"v": [[1.0], [2.0]]}, ValueError, "DataFrame: has no column 'embedding'; .*of: v "),
        ({"embedding": []}, TypeError, "DataFrame: column 'embedding' is"),
        ({"embedding": [[], []]}, TypeError, "DataFrame: column 'embedding' holds null"),
    ],
)
def test_frames_without_rows_are_refused(data, error, words):
    with pytest.raises(error, match=words):
        Corpus(pytest.importorskip("pandas").DataFrame(data))


def test_rows_in_memory_have_no_place_in_a_run(tmp_path):
    corpus = Corpus(pa.table({"embedding": vectors()}))
    with pytest.raises(TypeError, match="Table: its rows are in memory, expected files; save it"):
        align(corpus, corpus, tmp_path / "out", Settings(progress=False))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (ROWS, r"got a ndarray; give rows \[N, D\] of an array to ReAlign.fit"),
        (torch.from_numpy(ROWS), "got a Tensor"),
        ({"train": 1, "test": 2}, "got a dict; .* one value of a dict"),
    ],
    ids=["array", "tensor", "splits"],
)
def test_other_objects_are_no_corpus(path, words):
    with pytest.raises(TypeError, match=f"^Corpus: expected a path, a table or a dataset, {words}"):
        Corpus(path)


# ---- lists and globs


@pytest.fixture
def folders(tmp_path):
    """Folders `part_2` and `part_10` with an `.npy` file each, the second with ids."""
    for folder, rows in (("part_2", ROWS), ("part_10", OTHERS)):
        (tmp_path / folder).mkdir()
        pq.write_table(
            pa.table({"id": [f"{folder} {n}" for n in range(9)], "embedding": vectors(rows)}),
            tmp_path / folder / "x.parquet",
        )
    (tmp_path / "notes.txt").write_text("no shard")
    (tmp_path / "_stats").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "names", [["part_2", "part_10"], "*", "part_*", "*/x.*", "**/*.parquet"], ids=str
)
def test_folders_are_one_corpus_by_a_list_or_a_glob(folders, names):
    path = [folders / name for name in names] if isinstance(names, list) else f"{folders}/{names}"
    corpus = Corpus(path)
    np.testing.assert_array_equal(np.asarray(corpus), np.concatenate([ROWS, OTHERS]))
    assert list(corpus.ids()) == [f"part_2 {n}" for n in range(9)] + [
        f"part_10 {n}" for n in range(9)
    ]
    with pytest.raises(ValueError, match=r"two shards would become x.parquet; rename them"):
        align(corpus, corpus, folders / "out", Settings(progress=False))


def test_ids_of_each_root_of_a_list_are_its_own(tmp_path):
    for root, rows in (("a", ROWS), ("b", OTHERS)):
        for folder in ("text_emb", "metadata"):
            (tmp_path / root / folder).mkdir(parents=True)
        np.save(tmp_path / root / "text_emb/text_emb_0.npy", rows)
        ids = pa.table({"id": [f"{root}{n}" for n in range(9)]})
        pq.write_table(ids, tmp_path / root / "metadata/metadata_0.parquet")
    corpus = Corpus([tmp_path / "a", tmp_path / "b"], "text")
    assert [batch.ids[0] for batch in corpus.batches(with_ids=True)] == ["a0", "b0"]
    assert corpus.subfolder == "text_emb"
    np.save(tmp_path / "x.npy", ROWS)
    with pytest.raises(
        ValueError, match="a and 1 more: its parts have no folder of a side and tex"
    ):
        Corpus([tmp_path / "a", tmp_path / "x.npy"], "text")


def test_a_glob_is_a_source_of_commands(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, rows in enumerate((ROWS, ROWS + 1)):
        np.save(tmp_path / f"in/text_{number}.npy", rows)
        np.save(tmp_path / f"in/image_{number}.npy", -rows)
    sides = [f"--text={tmp_path}/in/text_*.npy", f"--image={tmp_path}/in/image_*.npy"]
    assert main(["align", *sides, f"--out={tmp_path}/out", "--quiet"]) == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").glob("*.npy")} == {"text_0.npy", "text_1.npy"}


def test_a_glob_at_a_url_is_expanded_there():
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for number, rows in enumerate((ROWS, OTHERS)):
        with files.open(f"/globs/part_{number}/x.npy", "wb") as file:
            np.save(file, rows)
    try:
        for pattern in ("part_*", "*/x.npy"):
            rows = np.asarray(Corpus(f"memory://globs/{pattern}"))
            np.testing.assert_array_equal(rows, np.concatenate([ROWS, OTHERS]))
    finally:
        files.rm("/globs", recursive=True)


def test_lists_and_globs_that_name_no_corpus_are_refused(folders):
    with pytest.raises(ValueError, match=r"^Corpus: got an empty list"):
        Corpus([])
    with pytest.raises(FileNotFoundError, match=r"/z\*: matches no file or folder"):
        Corpus(f"{folders}/z*")
    with pytest.raises(ValueError, match=r"x\.parquet: is there twice; name it once"):
        Corpus([folders / "part_2", folders / "part_2/x.parquet"])
    (folders / "part_3").mkdir()
    np.save(folders / "part_3/x.npy", ROWS[:, :2])
    with pytest.raises(ValueError, match=r"x\.npy: rows are \[\*, 2\] .*, expected \[\*, 3\]"):
        Corpus(f"{folders}/part_*")
    os.rename(folders / "part_3/x.npy", folders / "[x].npy")
    assert len(Corpus(folders / "[x].npy")) == 9  # a name that is there is no pattern


# ---- formats that are not read


@pytest.mark.parametrize("name", ["x.h5", "x.csv", "x.fbin", "x.data"])
def test_other_formats_are_refused_and_the_page_that_converts_them_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(40))
    with pytest.raises(ValueError, match=rf"{name}: its suffix is none of .* page `formats`"):
        Corpus(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"has no \.npy file .* page `formats`"):
        Corpus(tmp_path)


def save_foreign(path):
    """Write ROWS in the format of the suffix."""
    if path.suffix == ".fbin":
        path.write_bytes(np.array([9, 3], "<i4").tobytes() + ROWS.tobytes())
    elif path.suffix == ".fvecs":
        np.insert(ROWS.view("<i4"), 0, 3, axis=1).tofile(path)
    elif path.suffix == ".bin":
        ROWS.tofile(path)
    else:
        path.write_text("\n".join(json.dumps({"embedding": row.tolist()}) for row in ROWS))


@pytest.mark.parametrize("name", ["x.fbin", "x.fvecs", "x.bin", "x.jsonl"])
def test_the_conversions_of_the_documentation_work(tmp_path, monkeypatch, name):
    pytest.importorskip("pyarrow.json")
    monkeypatch.chdir(tmp_path)
    save_foreign(tmp_path / name)
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    suffix = name.removeprefix("x")
    (line,) = (line for line in page.splitlines() if line.startswith("|") and f"`{suffix}`" in line)
    exec(line.split("`")[-2], {"numpy": np, "pyarrow": pa, "file": name, "columns": 3})
    (shard,) = tmp_path.glob("rows.*")
    np.testing.assert_allclose(np.asarray(Corpus(shard)), ROWS, rtol=1e-6)
