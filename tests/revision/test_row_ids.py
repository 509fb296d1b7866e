"""Ids of rows: each shard is joined with its own file of metadata, whatever its name."""

import tracemalloc

import numpy as np
import pytest

from realign_fast.corpus import Corpus
from realign_fast.revision.training_data import row_finder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CUTS = [(0, 5), (5, 10), (10, 15)]  # as many rows each: a wrong file would not be noticed
NAMES = {
    "number": ("text_emb_{i}", "metadata_{i:05}"),
    "of": ("train-{i:05}-of-{n:05}", "train-{i:05}-of-{n:05}"),
    "another side": ("text-{i}-of-{n}", "metadata-{i:05}-of-{n:05}"),
    "converted": ("data-{i:05}-of-{n:05}", "metadata_{i}"),
    "ten": ("x_{i}", "x_{i}"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_each_shard_gets_the_ids_of_its_own_file(tmp_path, names):
    cuts = [(5 * i, 5 * i + 5) for i in range(12)] if names is NAMES["ten"] else CUTS
    for folder in ("text_emb", "metadata"):
        (tmp_path / folder).mkdir()
    for i, (first, end) in enumerate(cuts):
        shard, metadata = (name.format(i=i, n=len(cuts)) for name in names)
        np.save(tmp_path / "text_emb" / f"{shard}.npy", np.ones((end - first, 4), np.float32))
        table = pa.table({"id": [f"id {row}" for row in range(first, end)]})
        pq.write_table(table, tmp_path / "metadata" / f"{metadata}.parquet")
    row_of = row_finder(Corpus(tmp_path))
    assert [row_of(f"id {row}") for row in range(cuts[-1][1])] == [*range(cuts[-1][1])]
    assert row_of("id") is None


def test_files_of_other_parts_are_not_joined(tmp_path):
    (tmp_path / "metadata").mkdir()
    for i in range(2):
        np.save(tmp_path / f"train-0000{i}-of-00004.npy", np.ones((3, 4), np.float32))
        table = pa.table({"id": [f"{i} {row}" for row in range(3)]})
        pq.write_table(table, tmp_path / "metadata" / f"metadata-0000{i + 2}-of-00004.parquet")
    with pytest.raises(ValueError, match=r"metadata: has no .* named as train-00000-of-00004\.npy"):
        row_finder(Corpus(tmp_path))


def test_ids_take_no_memory_that_grows_with_their_number(tmp_path):
    (tmp_path / "metadata").mkdir()
    rows = 200_000
    np.save(tmp_path / "rows_0.npy", np.ones((rows, 2), np.float16))
    table = pa.table({"id": [f"the id of row {row}" for row in range(rows)]})
    pq.write_table(table, tmp_path / "metadata" / "metadata_0.parquet")
    corpus = Corpus(tmp_path)
    tracemalloc.start()
    try:
        row_of = row_finder(corpus)
        assert row_of(f"the id of row {rows - 1}") == rows - 1
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # a dict of them takes 35 MB
    finally:
        tracemalloc.stop()
