"""Rows of a cached parquet file, read from its pages, against pyarrow and embedding-reader.

The ceiling is reading the same bytes from memory. pyarrow reads the column at once, which is its
fastest way, and its numbers are not copied again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_files import embedding_reader, ours
from harness import ceilings, inputs, table, timing
from peers import packages

from realign_fast.corpus import Corpus
from realign_fast.corpus.formats import parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@table.of("read", "parquet")
def bench_read_parquet(line, tmp_path, measure):
    rows = inputs.random_rows(line.dtype, line.dimension, line.rows)
    path = tmp_path / "x.parquet"
    made = _table(rows.numpy(), line.kind.removeprefix("parquet "))
    pq.write_table(made, path, compression="none", use_dictionary=False)
    del made
    (shard,) = Corpus(path).shards
    with parquet._opened(shard.path) as (file, descriptor, _):
        for group in range(file.num_row_groups):
            parquet.ColumnPages(file, descriptor, shard).of(group).check()  # not read by pyarrow
    truth = float(rows[:, 0].double().sum())
    case = timing.Case(
        **line.facts(),
        bytes=rows.nbytes,
        flops=0,
        limit="bytes",
        error_of=lambda found: abs(found - truth),
        tolerance=0.0,
    )
    case.add("read", lambda _: ours(path), "ours")
    case.add("read from memory", lambda _: ceilings.read(rows), "ceiling")
    reader = "embedding-reader", "embedding_reader"
    case.add_peers(
        *packages.installed(
            {
                "to_numpy": ("pyarrow", "pyarrow", lambda _: _pyarrow(path, line)),
                "to_numpy mapped": ("pyarrow", "pyarrow", lambda _: _pyarrow(path, line, True)),
                "EmbeddingReader": (*reader, lambda _: embedding_reader(path.parent, "parquet")),
            }
        )
    )
    measure(case)


def _table(rows: np.ndarray, kind: str) -> pa.Table:
    values = pa.array(rows.reshape(-1))
    if kind == "list":
        offsets = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), values)
    else:
        array = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    return pa.table({"embedding": array})


def _pyarrow(path: Path, line: table.Line, memory_map: bool = False) -> float:
    """Return the checksum of a column that pyarrow converts to numpy."""
    found = pq.read_table(path, columns=["embedding"], memory_map=memory_map)["embedding"]
    total, columns = 0.0, line.dimension
    for array in found.chunks:
        flat = array.flatten().to_numpy(zero_copy_only=False)
        total += float(flat.reshape(-1, columns)[:, 0].sum(dtype=np.float64))
    return total
