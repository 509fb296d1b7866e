"""Corpora of globs; files and objects that are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from realign_fast import Moments, ReAlign, SharedSpace
from realign_fast.cli.main import main
from realign_fast.corpus import Corpus
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

pa = pytest.importorskip("pyarrow")
pq, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")

ROWS = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32) + 1
OTHERS = np.random.default_rng(1).standard_normal((9, 3)).astype(np.float32) - 1


def vectors(rows=ROWS):
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


@pytest.mark.parametrize(
    "rows", [ROWS, torch.from_numpy(ROWS), {"train": 1}, pa.table({"embedding": vectors()}), []]
)
def test_other_objects_are_no_corpus(rows):
    words = f"^Corpus: expected a path, got a {type(rows).__name__}; give rows .* save a table"
    with pytest.raises(TypeError, match=words):
        Corpus(rows)


@pytest.mark.parametrize("kind", ["frame", "table"])
def test_maps_name_the_conversion_of_a_table(kind):
    table = pa.table({"embedding": vectors()})
    rows = pytest.importorskip("pandas") and table.to_pandas() if kind == "frame" else table
    target = torch.from_numpy(OTHERS)
    for use in (
        lambda rows: ReAlign.fit(rows, target),
        ReAlign.fit(ROWS, target),
        Moments().update,
        lambda rows: SharedSpace.fit(text=rows, image=target),
    ):
        with pytest.raises(TypeError, match=r"expected rows as a tensor of .* got (Data|Table)"):
            use(rows)


# ---- globs


@pytest.fixture
def folders(tmp_path):
    """Folders `part_2` and `part_10` with a parquet file each, which has ids."""
    for folder, rows in (("part_2", ROWS), ("part_10", OTHERS)):
        (tmp_path / folder).mkdir()
        pq.write_table(
            pa.table({"id": [f"{folder} {n}" for n in range(9)], "embedding": vectors(rows)}),
            tmp_path / folder / "x.parquet",
        )
    (tmp_path / "notes.txt").write_text("no shard")
    (tmp_path / "_stats").mkdir()
    return tmp_path


@pytest.mark.parametrize("pattern", ["*/x.parquet", "*/x.*", "**/*.parquet", "part_*/*"])
def test_the_shards_that_match_a_glob_are_one_corpus(folders, pattern):
    corpus = Corpus(f"{folders}/{pattern}")
    np.testing.assert_array_equal(np.asarray(corpus), np.concatenate([ROWS, OTHERS]))
    assert list(corpus.ids()) == [f"part_2 {n}" for n in range(9)] + [
        f"part_10 {n}" for n in range(9)
    ]
    with pytest.raises(ValueError, match=r"two shards would become x.parquet; rename them"):
        align(corpus, corpus, folders / "out", Settings(progress=False))
    with pytest.raises(
        ValueError, match=r"part_2: is or lies in .*, which holds rows that are read"
    ):
        align(Corpus(f"{folders}/part_2/*"), corpus, folders / "part_2", Settings(progress=False))


def test_a_list_of_shards_is_one_corpus(folders):
    corpus = Corpus([folders / "part_10/x.parquet", f"{folders}/part_2/x.parquet"])
    np.testing.assert_array_equal(np.asarray(corpus), np.concatenate([OTHERS, ROWS]))
    assert str(corpus.path) == f"{folders}/part_10/x.parquet and 1 more"
    with pytest.raises(OSError, match=r"part_2: Not a regular file"):
        Corpus([folders / "part_2"])


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
        rows = np.asarray(Corpus("memory://globs/*/x.npy"))
        np.testing.assert_array_equal(rows, np.concatenate([ROWS, OTHERS]))
    finally:
        files.rm("/globs", recursive=True)


def test_globs_that_name_no_corpus_are_refused(folders):
    for pattern in ("z*", "part_*"):
        with pytest.raises(FileNotFoundError, match=r"\*: matches no shard; check the pattern"):
            Corpus(f"{folders}/{pattern}")
    np.save(folders / "y.npy", ROWS[:, :2])
    with pytest.raises(ValueError, match=r"y\.npy: rows are \[\*, 2\] .*, expected \[\*, 3\]"):
        Corpus(f"{folders}/**/*.*")
    os.rename(folders / "y.npy", folders / "[x].npy")
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
