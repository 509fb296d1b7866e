"""A corpus measured, a map fitted, a corpus aligned: shards on disk in, shards on disk out.

Every pass walks the shards in order and a shard in fixed batches, and merges what it measured in
that order, so results have the same bytes whatever the machine. Reading is announced to the kernel
ahead, writing happens on a thread of its own, and memory is a few batches, never the corpus.

``align`` = ``fit`` (moments of the source, of the target, drift of the source) + ``apply``.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .align import ReAlign
from .corpus import Corpus, ShardWriter
from .moments import Moments, RowMap

BATCH_BYTES = 4 << 20
_BUFFERS = 3  # batches that may wait for the disk


@dataclass(frozen=True)
class Settings:
    """How passes run; none of it changes a result except ``bad_rows``.

    ``bad_rows``: a zero or non-finite row is an ``"error"``; ``"skip"`` leaves it out of the
    statistics and writes a zero row; ``"keep"`` counts a zero row as data (``u = 0``) and writes
    NaN for a non-finite one. Rows keep their places in every case.
    """

    bad_rows: str = "error"
    batch_bytes: int = BATCH_BYTES
    progress: bool = True


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
        seconds = max(self.seconds, 1e-9)
        moved = self.bytes_read + self.bytes_written
        rates = {"rows_per_second": self.rows / seconds, "gb_per_second": moved / seconds / 1e9}
        return vars(self) | rates


@dataclass
class Run:
    """What a command did: its passes in order, and what goes into ``report.json``."""

    settings: Settings = field(default_factory=Settings)
    passes: list[Pass] = field(default_factory=list)

    def measure(self, name: str, corpus: Corpus, through: RowMap | None = None) -> Moments:
        """Moments of a corpus, of its rows sent through a row map if one is given."""
        total = Moments()
        with _Timed(self, name, corpus, total) as progress:
            for index, shard in enumerate(corpus.shards):
                part = Moments()
                for batch in corpus.batches(index, batch_bytes=self.settings.batch_bytes):
                    part.update(
                        batch.rows,
                        through=through,
                        bad_rows=self.settings.bad_rows,
                        where=str(shard.path),
                        first_row=batch.first,
                    )
                    progress(len(batch.rows))
                total.merge(part)
        return total

    def fit(self, source: Corpus, target: Corpus, *, residual: bool = False) -> ReAlign:
        """A :class:`ReAlign` from two corpora; ``residual`` reads the source a third time."""
        if source.dimension != target.dimension:
            raise ValueError(
                f"{source.path}: rows have {source.dimension} columns, those of {target.path} have "
                f"{target.dimension}; embed both with one encoder"
            )
        source_moments = self.measure("source moments", source)
        target_moments = self.measure("target moments", target)
        half = ReAlign.from_moments(source_moments, target_moments)
        drift = self.measure("source drift", source, half.row_map)
        aligner = ReAlign.from_moments(source_moments, target_moments, drift)
        if residual:
            aligner.record_residual(self.measure("source residual", source, aligner.row_map))
        return aligner

    def apply(self, aligner: ReAlign, source: Corpus, out: Path) -> Moments:
        """Write every shard of ``source`` aligned, in its own dtype, and return their moments.

        Shards go to ``out / source.subfolder`` under their own names, each whole or not at all.
        """
        folder = out / source.subfolder
        _check_output(source, folder)
        if aligner.dimension != source.dimension:
            raise ValueError(
                f"{source.path}: rows have {source.dimension} columns, the aligner was fitted on "
                f"{aligner.dimension}; align the encoder's own output"
            )
        total = Moments()
        with (
            _Timed(self, "apply", source, total, writes=True) as progress,
            ThreadPoolExecutor(1, "realign-fast-writer") as disk,
        ):
            for index, shard in enumerate(source.shards):
                path = folder / shard.path.name
                with ShardWriter(path, shard.rows, shard.dimension, source.dtype) as writer:
                    part = self._apply_shard(aligner, source, index, writer, disk, progress)
                total.merge(part)
        return total

    def _apply_shard(self, aligner, source, index, writer, disk, progress) -> Moments:
        """Align one shard; a ring of buffers lets the disk fall a few batches behind."""
        part, policy = Moments(), self.settings.bad_rows
        ring: list[tuple[Tensor, Future[None] | None]] = []
        where = str(source.shards[index].path)
        batches = source.batches(index, batch_bytes=self.settings.batch_bytes)
        for number, (_, first, rows) in enumerate(batches):
            if number < _BUFFERS:
                ring.append((torch.empty_like(rows), None))
            buffer, written = ring[number % _BUFFERS]
            if written is not None:
                written.result()
            result = buffer[: len(rows)]
            bad = part.zero_rows + part.nonfinite_rows
            # The moments of the result come from the rows in the same visit to memory.
            part.update(
                rows, through=aligner.row_map, bad_rows=policy, where=where, first_row=first
            )
            aligner(rows, out=result)
            if policy == "skip" and part.zero_rows + part.nonfinite_rows > bad:
                result[~(torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1))] = 0
            ring[number % _BUFFERS] = (buffer, disk.submit(writer.write, result))
            progress(len(rows))
        for _, written in ring:
            if written is not None:
                written.result()
        return part

    def report(self, aligner: ReAlign, **facts: Any) -> dict[str, Any]:
        """Everything a reader needs to judge the run, as plain numbers."""
        return {
            **facts,
            "bad_rows": self.settings.bad_rows,
            "fitted": aligner.record,
            "passes": [one.summary() for one in self.passes],
            "peak_memory_bytes": _peak_memory(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def align(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Fit on two corpora and write the source aligned, with ``aligner.safetensors`` and a report.

    Args:
        source, target: directories of ``.npy`` shards, or a clip-retrieval root, whose
            ``text_emb/`` is then the source and whose ``img_emb/`` the target.
        out: directory for the aligned shards, ``aligner.safetensors`` and ``report.json``.

    Returns:
        The report.

    Raises:
        ValueError, TypeError, OSError: what is wrong with a file, a row or the output directory.
    """
    run, out = Run(settings or Settings()), Path(out)
    source_rows, target_rows = Corpus(source, "text"), Corpus(target, "image")
    _check_output(source_rows, out / source_rows.subfolder)
    aligner = run.fit(source_rows, target_rows)
    aligned = run.apply(aligner, source_rows, out)
    aligner.record_residual(aligned)
    aligner.save(out / "aligner.safetensors")
    report = run.report(
        aligner,
        source=describe(source_rows),
        target=describe(target_rows),
        result={"centroid_gap": float(aligner.residual_gap), "trace": aligned.trace},
    )
    write_json(out / "report.json", report)
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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a json file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


class _Timed:
    """Times one pass, shows its progress (bytes, GB/s, ETA, rows/s) and books it in the run."""

    def __init__(
        self, run: Run, name: str, corpus: Corpus, moments: Moments, writes: bool = False
    ) -> None:
        self.run, self.moments, self.passed = run, moments, Pass(name)
        self.row_bytes = corpus.shards[0].row_bytes
        self.writes = writes
        self.bar = tqdm(
            total=corpus.nbytes,
            desc=name,
            unit="B",
            unit_scale=True,
            disable=not run.settings.progress,
            file=sys.stderr,
        )

    def __enter__(self):
        self.begin = time.perf_counter()
        return self

    def __call__(self, rows: int) -> None:
        self.passed.rows += rows
        self.passed.bytes_read += rows * self.row_bytes
        if self.bar.update(rows * self.row_bytes):
            rate = self.passed.rows / (time.perf_counter() - self.begin)
            self.bar.set_postfix_str(f"{rate / 1e6:.2f} M rows/s", refresh=False)

    def __exit__(self, *error: object) -> None:
        self.passed.seconds = time.perf_counter() - self.begin
        self.passed.bytes_written = self.passed.bytes_read if self.writes else 0
        self.passed.zero_rows = self.moments.zero_rows
        self.passed.nonfinite_rows = self.moments.nonfinite_rows
        self.run.passes.append(self.passed)
        self.bar.close()


def _check_output(source: Corpus, folder: Path) -> None:
    """Refuse an output directory that would lose or mix rows, before anything is read."""
    names = {shard.path.name for shard in source.shards}
    if folder.resolve() in {shard.path.resolve().parent for shard in source.shards}:
        raise ValueError(f"{folder}: is the source itself; give another --out")
    strangers = sorted(path.name for path in folder.glob("*.npy") if path.name not in names)
    if strangers:
        raise ValueError(
            f"{folder}: holds {strangers[0]}, which is no shard of {source.path}; "
            "give an empty directory, or the one of an earlier run on the same corpus"
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    replaced = sum(path.stat().st_size for path in folder.glob("*.npy"))
    if source.nbytes > free + replaced:
        raise OSError(
            f"{folder}: the result takes {source.nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free; make room or give another --out"
        )


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
