"""Passes over a corpus: which shards, on which engine, what is kept of them, and how fast."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from ..corpus.corpus import Corpus
from ..moments import Moments
from ..storage.lock import locked
from ..storage.paths import AnyPath, StoragePath, output_path
from .checkpoints import Checkpoints, Entry, code_version, identities, map_hash
from .engines.local import Engine, engine_of
from .manifest import Passes
from .output import MANIFEST, STATS
from .settings import Settings
from .shard_tasks import AlignWork, ShardWork, in_turn


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
    finished_before: int = 0  # rows of shards that an earlier run had finished

    def summary(self) -> dict[str, Any]:
        """The fields with rows/s and GB/s (bytes read and written, 1 GB = 10^9)."""
        seconds, moved = max(self.seconds, 1e-9), self.bytes_read + self.bytes_written
        rates = {"rows_per_second": self.rows / seconds, "gb_per_second": moved / seconds / 1e9}
        return vars(self) | rates


class Missing(ValueError):
    """A pass that was not to be read lacks shards."""


@dataclass
class PassRunner:
    """The passes of one command in order, and what it keeps of them in an output directory.

    ``part``: ``(i, n)`` to do shards i, i + n, ... of a job array (from 0); ``reading=False`` to
    take only what is finished.
    """

    settings: Settings = field(default_factory=Settings)
    passes: list[Pass] = field(default_factory=list)
    part: tuple[int, int] = (0, 1)
    reading: bool = True
    engine: Engine | None = None  # None: that of settings.workers
    out: StoragePath | None = None  # where what is finished is kept; None: nowhere
    made: Passes = field(default_factory=dict)  # for the manifest
    extended: dict[str, int] = field(default_factory=dict)  # by pass: rows of shards that are gone
    identities: dict[Corpus, tuple[Entry, ...]] = field(default_factory=dict)

    @contextmanager
    def keeping(self, out: AnyPath) -> Iterator[None]:
        """Keep what is finished in ``out``, which no other process works on meanwhile."""
        out = output_path(out)
        if self.out == out:
            yield
            return
        index, parts = self.part
        if out.protocol == "memory" and self.has_workers:
            what = "memory:// is of one process, workers would write into their own"
            raise ValueError(f"{out}: {what}; give one worker, or another --out")
        if self.settings.mode == "overwrite" and parts > 1:
            raise ValueError(
                f"{out}: a part of a job array cannot overwrite what others share; remove "
                f"{out / STATS} before the jobs start, or give another --out"
            )
        with locked(out / STATS, f"{index + 1}-of-{parts}" if parts > 1 else ""):
            if self.settings.mode == "overwrite":
                (out / MANIFEST).unlink(missing_ok=True)
                _remove_folders(out / STATS)
            self.out = out
            try:
                yield
            finally:
                self.out = None

    @property
    def has_workers(self) -> bool:
        """Whether other processes do the shards."""
        return self.settings.workers > 1 or self.engine not in (None, map)

    def work(self, kind: type, name: str, corpus: Corpus, **options: Any) -> ShardWork:
        """A work of this kind for pass ``name``, with the settings of this run."""
        settings, aligner = self.settings, options.get("aligner")
        if corpus not in self.identities:
            self.identities[corpus] = identities(corpus.shards)
        facts = {"pass": name, "bad_rows": settings.bad_rows, "batch_bytes": settings.batch_bytes}
        facts |= {"column": corpus.column, "allow_pickle": corpus.allow_pickle}
        facts |= {"covariance": options.get("covariance", False), "map": map_hash(aligner)}
        facts |= {"folder": corpus.subfolder} if kind is AlignWork else {}
        code = code_version(settings.device)
        checkpoints = Checkpoints(self.out, facts | {"code": code}) if self.out else None
        options |= {"bad_rows": settings.bad_rows, "batch_bytes": settings.batch_bytes}
        options |= {"device": settings.device}
        return kind(
            name, corpus, self.identities[corpus], checkpoints, reading=self.reading, **options
        )

    def walk(self, work: ShardWork, total: Moments, entries: list[Entry]) -> Moments:
        """Map a work over the shards and merge what it gives into ``total``, in their order."""
        corpus, name, missing = work.corpus, work.name, []
        shards = range(self.part[0], len(corpus.shards), self.part[1])
        self.engine = self.engine or engine_of(self.settings.workers)
        live = self.engine is map  # else progress is seen shard by shard
        rows, writes = sum(corpus.shards[i].num_rows for i in shards), isinstance(work, AlignWork)
        with self.timed(name, corpus, rows, total, writes) as advance:
            local = self.out is not None and not self.out.is_remote
            engine = in_turn if live and writes and local else self.engine
            for part in engine(replace(work, advance=advance) if live else work, shards):
                if part.moments is None:
                    missing.append(str(corpus.shards[part.shard].path))
                    continue
                if not live:
                    advance(part.rows)
                advance(corpus.shards[part.shard].num_rows - part.rows, finished_before=True)
                total.merge(part.moments)
                entries.append(work.identities[part.shard] | part.entry)
        if missing:
            raise Missing(
                f"{name}: {len(missing)} of {len(shards)} shards are not finished with these "
                f"options, first {missing[0]}; run their part of the job array with them"
            )
        if work.checkpoints and self.part[1] == 1:
            self.made[name] = {"facts": work.checkpoints.facts, "shards": entries}
            work.checkpoints.forget_others(list(zip(corpus.shards, work.identities, strict=True)))
        return total

    @contextmanager
    def timed(
        self, name: str, corpus: Corpus, rows: int, moments: Moments, writes: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Time one pass, show its progress and book it; yields what to call with rows done."""
        done, row_bytes, begin = Pass(name), corpus.shards[0].row_bytes, time.perf_counter()
        in_memory = getattr(corpus, "rows_from_memory", 0)
        with _bar(name, rows * row_bytes, self.settings.progress) as bar:

            def advance(rows: int, finished_before: bool = False) -> None:
                done.rows += rows * (not finished_before)
                done.finished_before += rows * finished_before
                rate = done.rows / (time.perf_counter() - begin)
                bar.set_postfix_str(f"{rate / 1e6:.2f} M rows/s", refresh=False)
                bar.update(rows * row_bytes)

            yield advance
        done.seconds = time.perf_counter() - begin
        in_memory = getattr(corpus, "rows_from_memory", 0) - in_memory
        done.bytes_read = (done.rows - in_memory) * row_bytes
        done.bytes_written = done.rows * row_bytes * writes
        done.zero_rows, done.nonfinite_rows = moments.zero_rows, moments.nonfinite_rows
        self.passes.append(done)


def _remove_folders(place: StoragePath) -> None:
    for name in [name for name, is_directory in place.listed() if is_directory]:
        (place / name).remove_tree()


def _bar(name: str, total: int, shown: bool) -> tqdm:
    """Progress in bytes: live on a terminal; in a log a line each half minute, none if quick."""
    log = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30, "delay": 30}
    options = {"unit": "B", "unit_scale": True, "miniters": 1, "file": sys.stderr}
    return tqdm(total=total, desc=name, disable=not shown, **options, **log)
