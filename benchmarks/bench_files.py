"""Files, cold and cached: reading npy against dd, and `apply` against cp on the same files.

Cold: before each turn the pages of the files are dropped. dd reads in blocks of 16 MiB, through the
page cache and past it (O_DIRECT). Copies are compared twice: cp alone, which returns while its
result still lies in memory, and cp with a sync of its result, which is what `apply` does with its
own. Bytes are those of the source, counted once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import timing
import torch

from realign_fast import ReAlign
from realign_fast.corpus import Corpus, ShardWriter, native, reading
from realign_fast.passes import Settings
from realign_fast.pipeline import Run

DIMENSION, SHARDS, SHARD_ROWS = 768, 2, 500_000  # 1.5 GB


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("files") / "text"
    rows = timing.random_rows(torch.float16, DIMENSION, SHARD_ROWS)
    for index in range(SHARDS):
        path = folder / f"emb_{index}.npy"
        with ShardWriter(path, SHARD_ROWS, DIMENSION, torch.float16) as writer:
            writer.write(rows)
    return Corpus(folder)


@pytest.fixture(scope="module")
def aligner() -> ReAlign:
    text, image = (timing.random_rows(torch.float16, DIMENSION, 4096).roll(n, 1) for n in (0, 5))
    return ReAlign.fit(text, image)


def drop(paths: list[Path]) -> None:
    """Leave nothing of these files in the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(paths: list[Path]) -> None:
    """Have all of these files in the page cache."""
    for path in paths:
        path.read_bytes()


def read(corpus: Corpus) -> None:
    """Every batch, a word of each page of it."""
    for batch in corpus.batches(batch_bytes=16 << 20):
        batch.rows.view(torch.int64).view(-1)[::512].sum()


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def dd(corpus: Corpus, *flags: str) -> None:
    for shard in corpus.shards:
        run("dd", f"if={shard.path}", "of=/dev/null", "bs=16M", *flags)


def copy(corpus: Corpus, out: Path, synced: bool) -> None:
    for shard in corpus.shards:
        run("cp", shard.path, out / shard.path.name)
        if synced:
            with open(out / shard.path.name, "rb") as file:
                os.fsync(file.fileno())


def apply(corpus: Corpus, out: Path, aligner: ReAlign) -> None:
    Run(Settings(progress=False)).apply(aligner, corpus, out)


def with_python_reader(call: Callable[[], None]) -> Callable[[], None]:
    """The same through Python's mmap, as where nothing was compiled."""

    def do() -> None:
        kept, native.io = native.io, None
        try:
            call()
        finally:
            native.io = kept

    return do


def bench_cold_reading(corpus, benchmark, table):
    assert reading.native.io, "the native reader was not built"
    paths = [shard.path for shard in corpus.shards]
    case = timing.Case("read_npy", corpus.dtype, DIMENSION, 2 * DIMENSION, 0.0, corpus.rows, "cold")
    case.prepare = lambda: drop(paths)
    case.add("ceiling", lambda: dd(corpus))
    case.add("dd past the cache", lambda: dd(corpus, "iflag=direct"))
    case.add("read_npy", lambda: read(corpus))
    case.add("read_npy through mmap", with_python_reader(lambda: read(corpus)))
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(read, (corpus,), setup=case.prepare, rounds=3)


@pytest.mark.parametrize("state", ["cached", "cold"])
def bench_apply(state, corpus, aligner, tmp_path, benchmark, table):
    paths, out = [shard.path for shard in corpus.shards], tmp_path / "out"
    case = timing.Case("apply", corpus.dtype, DIMENSION, 2 * DIMENSION, 0.0, corpus.rows, state)

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (fill if state == "cached" else drop)(paths)
        os.sync()

    case.prepare = prepare
    case.add("ceiling", lambda: copy(corpus, out, synced=True))
    case.add("cp without a sync", lambda: copy(corpus, out, synced=False))
    case.add("apply", lambda: apply(corpus, out, aligner))
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(apply, (corpus, out, aligner), setup=case.prepare, rounds=3)
    shutil.rmtree(out)
