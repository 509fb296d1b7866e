"""A corpus measured, a map fitted, a corpus aligned: shards on disk in, shards on disk out.

Every pass walks the shards in order and a shard in fixed batches and merges in that order, so
results have the same bytes for any number of threads. Memory is a few batches, never the corpus.

``align`` = ``fit`` (moments of the source, of the target, drift of the source) + ``apply``.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__, ops
from .align import ReAlign
from .corpus import Batch, Corpus, Shard
from .family import NEED_COVARIANCE, Shrinkage
from .moments import Moments, RowMap, good_rows
from .output import ALIGNER, REPORT, check_output, write_json

BATCH_BYTES = 16 << 20  # smaller ones give the threads of a busy machine too little at a time


@dataclass(frozen=True)
class Settings:
    """How passes run.

    ``bad_rows``: a zero or non-finite row is an ``"error"``; ``"skip"`` leaves it out of the
    statistics and writes a zero row; ``"keep"`` counts a zero row as data (``u = 0``) and writes
    NaN for a non-finite one. Rows keep their places in every case.
    ``batch_bytes`` is also where float64 sums are cut: another value may move their last bits.
    ``method`` and ``shrinkage`` are those of :meth:`ReAlign.fit`.
    """

    bad_rows: str = "error"
    batch_bytes: int = BATCH_BYTES
    progress: bool = True
    method: str = "realign"
    shrinkage: Shrinkage = None


@dataclass
class Pass:
    """One walk over a corpus: what it read and how fast."""

    name: str
    rows: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    zero_rows: int = 0
    nonfinite_rows: int = 0

    def summary(self) -> dict[str, Any]:
        """The fields with rows/s and GB/s (bytes read and written, 1 GB = 10^9)."""
        seconds, moved = max(self.seconds, 1e-9), self.bytes_read + self.bytes_written
        rates = {"rows_per_second": self.rows / seconds, "gb_per_second": moved / seconds / 1e9}
        return vars(self) | rates


@dataclass
class Run:
    """What a command did: its passes in order, and what goes into ``report.json``."""

    settings: Settings = field(default_factory=Settings)
    passes: list[Pass] = field(default_factory=list)

    def measure(self, name: str, corpus: Corpus, through: RowMap | None = None) -> Moments:
        """Moments of a corpus, of its rows sent through a row map if one is given."""
        covariance = through is None and self.settings.method in NEED_COVARIANCE
        total = Moments(covariance, accurate=covariance)
        with self._pass(name, corpus, total) as advance:
            for index, shard in enumerate(corpus.shards):
                part = Moments(covariance, accurate=covariance)
                for batch in corpus.batches(index, batch_bytes=self.settings.batch_bytes):
                    self._update(part, shard, batch, through)
                    advance(len(batch.rows))
                total.merge(part)
        return total

    def fit(self, source: Corpus, target: Corpus, *, residual: bool = False) -> ReAlign:
        """A :class:`ReAlign` from two corpora; ``residual`` reads the source a third time."""
        if source.dimension != target.dimension:
            got = f"rows have {source.dimension} columns, in {target.path} {target.dimension}"
            raise ValueError(f"{source.path}: {got}; embed both with one encoder")
        source_moments = self.measure("source moments", source)
        target_moments = self.measure("target moments", target)
        for corpus, moments in ((source, source_moments), (target, target_moments)):
            if not moments.count:
                bad = f"{moments.zero_rows} zero, {moments.nonfinite_rows} non-finite"
                raise ValueError(f"{corpus.path}: no usable row ({bad}); embed it again")
        options = {"method": self.settings.method, "shrinkage": self.settings.shrinkage}
        aligner = ReAlign.from_moments(source_moments, target_moments, **options)
        aligner.record_drift(self.measure("source drift", source, aligner.row_map))
        if residual:
            aligner.record_residual(self.measure("source residual", source, aligner.row_map))
        return aligner

    def apply(self, aligner: ReAlign, source: Corpus, out: str | os.PathLike[str]) -> Moments:
        """Write ``source`` aligned, in its own dtype, with its aligner; return the moments.

        Shards go to ``out / source.subfolder`` under their own names, each whole or not at all.
        The moments are those of the result before it is rounded to the corpus's dtype.
        """
        out = Path(out)
        check_output(out, source)
        if aligner.dimension != source.dimension:
            got = f"rows have {source.dimension} columns, the aligner {aligner.dimension}"
            raise ValueError(
                f"{source.path}: {got}; align the output of the encoder it was fitted on"
            )
        folder = out / source.subfolder
        folder.mkdir(parents=True, exist_ok=True)
        (out / REPORT).unlink(missing_ok=True)
        aligner.save(out / ALIGNER)
        total = Moments()
        with self._pass("apply", source, total, writes=True) as advance:
            for index, shard in enumerate(source.shards):
                path = folder / shard.path.name
                with source.writer(shard, path) as writer:
                    total.merge(self._apply_shard(aligner, source, index, writer, advance))
            source.finish(folder)
        return total

    def _apply_shard(self, aligner, source, index, writer, advance) -> Moments:
        """Align one shard; while a batch is computed, the one before it is written.

        Leaving the pool waits for its thread, so no write is in flight when this returns or raises.
        """
        part, shard = Moments(), source.shards[index]
        size = max(1, min(self.settings.batch_bytes // shard.row_bytes, shard.rows))
        buffers = torch.empty(2, size, shard.dimension, dtype=source.dtype)
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, "realign-fast-writer") as disk:
            for number, batch in enumerate(source.batches(index, batch_rows=size)):
                rows, result = batch.rows, buffers[number % 2, : len(batch.rows)]
                # The moments of the result come from the rows in the same visit to memory.
                bad = self._update(part, shard, batch, aligner.row_map)
                aligner(rows, out=result)
                if bad and self.settings.bad_rows == "skip":
                    result[~good_rows(rows)] = 0
                if writing:
                    writing.result()
                writing = disk.submit(writer.write, result)
                advance(len(rows))
            if writing:
                writing.result()
        return part

    def _update(self, moments: Moments, shard: Shard, batch: Batch, through: RowMap | None) -> bool:
        """Add a batch to moments; says whether a bad row was in it."""
        bad = moments.zero_rows + moments.nonfinite_rows
        moments.update(
            batch.rows,
            through=through,
            bad_rows=self.settings.bad_rows,
            where=str(shard.path),
            first_row=batch.first,
        )
        return moments.zero_rows + moments.nonfinite_rows > bad

    @contextmanager
    def _pass(self, name, corpus, moments, writes=False) -> Iterator[Callable[[int], None]]:
        """Time one pass, show its progress and book it; yields what to call with rows done."""
        done, row_bytes, begin = Pass(name), corpus.shards[0].row_bytes, time.perf_counter()
        with _bar(name, corpus.nbytes, self.settings.progress) as bar:

            def advance(rows: int) -> None:
                done.rows += rows
                rate = done.rows / (time.perf_counter() - begin)
                bar.set_postfix_str(f"{rate / 1e6:.2f} M rows/s", refresh=False)
                bar.update(rows * row_bytes)

            yield advance
        done.seconds = time.perf_counter() - begin
        done.bytes_read = done.rows * row_bytes
        done.bytes_written = done.bytes_read * writes
        done.zero_rows, done.nonfinite_rows = moments.zero_rows, moments.nonfinite_rows
        self.passes.append(done)

    def report(self, aligner: ReAlign, **facts: Any) -> dict[str, Any]:
        """Everything a reader needs to judge the run, as plain numbers."""
        peak_unit = 1 if sys.platform == "darwin" else 1024
        return {
            **facts,
            "bad_rows": self.settings.bad_rows,
            "fitted": aligner.record,
            "passes": [one.summary() for one in self.passes],
            "peak_memory_bytes": peak_unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "threads": torch.get_num_threads(),
            "kernels": {op: " ".join(ops.backend_of(op, "cpu")) for op in ops.OPS},
            "versions": {"realign_fast": __version__, "torch": torch.__version__},
        }


def align(
    source: Corpus | str | os.PathLike[str],
    target: Corpus | str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Fit on two corpora, write the source aligned into ``out``, and return the report.

    ``source`` and ``target`` are corpora, directories of shards, or a clip-retrieval root, whose
    ``text_emb/`` is then the source and whose ``img_emb/`` the target. ValueError, TypeError or
    OSError says what is wrong with a file, a row or the output directory.
    """
    run, out = Run(settings or Settings()), Path(out)
    source_rows = source if isinstance(source, Corpus) else Corpus(source, "text")
    target_rows = target if isinstance(target, Corpus) else Corpus(target, "image")
    check_output(out, source_rows, target_rows)
    aligner = run.fit(source_rows, target_rows)
    aligned = run.apply(aligner, source_rows, out)
    aligner.record_residual(aligned)
    aligner.save(out / ALIGNER)
    facts = {"source": describe(source_rows), "target": describe(target_rows)}
    report = run.report(aligner, **facts, result=describe_result(aligner, aligned))
    write_json(out / REPORT, report)
    return report


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a corpus is, for a report."""
    return {
        "path": str(corpus.path),
        "shards": len(corpus.shards),
        "rows": corpus.rows,
        "dimension": corpus.dimension,
        "dtype": str(corpus.dtype).removeprefix("torch."),
        "bytes": corpus.nbytes,
    }


def describe_result(aligner: ReAlign, aligned: Moments) -> dict[str, Any]:
    """Where aligned rows came to lie, for a report; ``None`` where no row had a direction."""
    if not aligned.count:
        return {"centroid_gap": None, "trace": None}
    gap = float((aligned.mean - aligner.target_mean).norm())
    return {"centroid_gap": gap, "trace": aligned.trace}


def _bar(name: str, total: int, shown: bool) -> tqdm:
    """Progress in bytes: live on a terminal; in a log a line each half minute, none if quick."""
    log = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30, "delay": 30}
    options = {"unit": "B", "unit_scale": True, "miniters": 1, "file": sys.stderr}
    return tqdm(total=total, desc=name, disable=not shown, **options, **log)
