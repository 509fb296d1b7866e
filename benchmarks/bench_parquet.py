"""Rows of a cached parquet file, read from its pages, against pyarrow's way to numpy.

The ceiling is reading the same bytes from memory. Ours includes opening the file, looking through
its levels and handing out batches of 4 MiB; pyarrow reads the column at once, which is its fastest
way, and its numbers are not copied again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timing
import torch

from realign_fast.corpus import Corpus

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS, DIMENSION = 200_000, 768
SLOW = 3  # rounds for the peers that are slower by far


@pytest.mark.parametrize("kind", ["list", "fixed-size list", "fixed-size binary"])
def bench_parquet_pages(kind, tmp_path, benchmark, table):
    rows = timing.random_rows(torch.float16, DIMENSION, ROWS)
    path = tmp_path / "x.parquet"
    pq.write_table(_table(rows.numpy(), kind), path, compression="none", use_dictionary=False)
    why = Corpus(path).shards[0].why_decoded()
    assert why == "", f"not read directly: {why}"
    for one in Corpus(path).batches():
        same = torch.equal(one.rows, rows[one.first : one.first + len(one.rows)])
        assert same, "no speed is printed for wrong results"
    assert np.array_equal(np.concatenate(_pyarrow(path)), rows.numpy())
    case = timing.Case("parquet_pages", rows.dtype, DIMENSION, 2 * DIMENSION, 0.0, ROWS, kind)
    case.add("ceiling", timing.read_ceiling(rows))
    case.add("parquet_pages", lambda: _batches(path))
    case.add("pyarrow to_numpy", lambda: _pyarrow(path), SLOW)
    case.add("pyarrow, mapped", lambda: _pyarrow(path, memory_map=True), SLOW)
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(_batches, (path,), rounds=5, warmup_rounds=1)


def _table(rows: np.ndarray, kind: str) -> pa.Table:
    values = pa.array(rows.reshape(-1))
    if kind == "list":
        offsets = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), values)
    elif kind == "fixed-size list":
        array = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    else:
        width = pa.binary(rows[0].nbytes)
        array = pa.FixedSizeBinaryArray.from_buffers(width, len(rows), [None, pa.py_buffer(rows)])
    field = pa.field("embedding", array.type, metadata={"dtype": "float16"})
    return pa.table([array], schema=pa.schema([field]))


def _batches(path: Path) -> None:
    for _ in Corpus(path).batches():
        pass


def _pyarrow(path: Path, **options: bool) -> list[np.ndarray]:
    """`[n, D]` at a time, through the column's own way to numpy."""
    parts = []
    for array in pq.read_table(path, columns=["embedding"], **options)["embedding"].chunks:
        if pa.types.is_fixed_size_binary(array.type):
            start, count = 2 * array.offset * DIMENSION, len(array) * DIMENSION
            flat = np.frombuffer(array.buffers()[1], np.float16, count, start)
        else:
            flat = array.flatten().to_numpy(zero_copy_only=False)
        parts.append(flat.reshape(-1, DIMENSION))
    return parts
