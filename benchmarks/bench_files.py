"""Files, cold and cached: reading npy against dd, and `apply` against cp on the same files.

Cold: before each turn the pages of the files are dropped. What `apply` writes is synced, so the
copy is too. Bytes read and bytes written both count. The checksum, a sum of the first column,
looks into every page.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import ceilings, inputs, table, timing
from peers import packages, row_ops

from realign_fast import ReAlign
from realign_fast.corpus import Corpus, ShardWriter, io_extension
from realign_fast.pipeline.align_run import AlignRun
from realign_fast.pipeline.settings import Settings

SHARDS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write two shards of npy."""
    made = tmp_path_factory.mktemp("files") / "text"
    (line,) = {(one.dtype, one.dimension, one.rows) for one in table.TABLE if one.op == "apply"}
    dtype, columns, count = line
    rows = inputs.random_rows(dtype, columns, count // SHARDS)
    for index in range(SHARDS):
        path = made / f"emb_{index}.npy"
        with ShardWriter(path, len(rows), columns, dtype) as writer:
            writer.write(rows)
    return made


def embedding_reader(folder: Path, kind: str = "npy") -> float:
    """Read with LAION's reader, which returns float32."""
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(str(folder), file_format=kind)
    batches = reader(batch_size=16_384, show_progress=False)
    return sum(float(rows[:, 0].sum(dtype=np.float64)) for rows, _ in batches)


def ours(folder: Path) -> float:
    """Read the batches of a corpus."""
    batches = Corpus(folder).batches(batch_bytes=16 << 20)
    return sum(float(one.rows[:, 0].double().sum()) for one in batches)


def through_mmap(folder: Path) -> float:
    """Read through Python's mmap, as is done where nothing is compiled."""
    kept, io_extension.io = io_extension.io, None
    try:
        return ours(folder)
    finally:
        io_extension.io = kept


def numpy_mapped(folder: Path) -> float:
    shards = (np.load(path, mmap_mode="r") for path in sorted(folder.iterdir()))
    return sum(float(one[:, 0].sum(dtype=np.float64)) for one in shards)


@table.of("read", "npy")
def bench_read_npy(line, folder, measure):
    assert io_extension.io, "the native reader was not built"
    paths = sorted(folder.iterdir())
    truth = numpy_mapped(folder)
    case = timing.Case(
        **line.facts(),
        bytes=sum(path.stat().st_size for path in paths),
        flops=0,
        limit="bytes",
        error_of=lambda found: abs(found - truth),
        tolerance=0.0,
        prepare=partial(ceilings.drop if line.cache == "cold" else ceilings.fill, paths),
    )
    case.add("read", lambda _: ours(folder), "ours")
    case.add("dd", lambda _: ceilings.dd(paths), "ceiling")
    if line.cache == "cold":
        case.add("dd past the cache", lambda _: ceilings.dd(paths, "iflag=direct"), "ceiling")
    case.add("read through mmap", lambda _: through_mmap(folder), "variant")
    case.add(f"np.load mapped (numpy {np.__version__})", lambda _: numpy_mapped(folder))
    reader = "embedding-reader", "embedding_reader", lambda _: embedding_reader(folder)
    case.add_peers(*packages.installed({"EmbeddingReader": reader}))
    measure(case)


@table.of("apply")
def bench_apply(line, folder, tmp_path, measure):
    paths, out = sorted(folder.iterdir()), tmp_path / "out"
    kind = line.dtype, line.dimension, 4096
    text, image = (inputs.random_rows(*kind).roll(step, 1) for step in (1, 5))
    aligner = ReAlign.fit(text, image)
    first = inputs.random_rows(line.dtype, line.dimension, line.rows // SHARDS)

    def error_of(result: Path) -> float:
        found = next(Corpus(result).batches(batch_bytes=1 << 30)).rows
        return row_ops.align_rows_error(first[: len(found)], aligner.row_map, found)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (ceilings.drop if line.cache == "cold" else ceilings.fill)(paths)
        os.sync()

    def apply(_: object) -> Path:
        AlignRun(Settings(progress=False)).apply(aligner, Corpus(folder), out)
        return out

    case = timing.Case(
        **line.facts(),
        bytes=2 * sum(path.stat().st_size for path in paths),
        flops=12 * line.rows * line.dimension,
        limit="bytes",
        error_of=error_of,
        tolerance=2**-11,
        prepare=prepare,
    )
    case.add("apply", apply, "ours")
    case.add("cp and sync", lambda _: ceilings.cp(paths, out), "ceiling")
    measure(case)
    shutil.rmtree(out)
