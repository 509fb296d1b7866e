"""Passes over a corpus: map a task over the shards, merge the results, keep times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..corpus.corpus import Corpus
from ..interface.option_values import OptionError, UnfinishedShards
from ..interface.progress import Progress
from ..moments import Moments
from ..ops import chosen_backends
from ..storage.errors import memory_explained
from ..storage.lock import locked
from ..storage.paths import AnyPath, StoragePath, output_path, records_of
from .checkpoints import STATS, AnyMap, Checkpoints, Entry, code_version, identities, map_hash
from .engines.local import Engine, engine_of
from .manifest import Passes, check_arithmetic
from .settings import Settings
from .shard_tasks import ShardTask, map_overlapping_sync

LOGGER = logging.getLogger("realign_fast.passes")  # a message when a pass ends
Part = tuple[int, int]  # (i, n): job i, from 0, of an array of n


@dataclass
class Pass:
    """Rows, bytes and seconds of one pass over a corpus."""

    name: str
    rows: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    zero_rows: int = 0
    nonfinite_rows: int = 0
    finished_before: int = 0  # rows of shards that an earlier run had finished

    def summary(self) -> dict[str, Any]:
        """Return the fields with rows/s and GB/s (bytes read and written, 1 GB = 10^9 bytes)."""
        seconds = max(self.seconds, 1e-9)
        moved = self.bytes_read + self.bytes_written
        rates = {"rows_per_second": self.rows / seconds, "gb_per_second": moved / seconds / 1e9}
        return vars(self) | rates

    def describe(self) -> str:
        """Return the summary as one line of text."""
        rates = self.summary()
        before = f", {self.finished_before:,} rows were finished before"
        bad = f", {self.zero_rows} zero and {self.nonfinite_rows} non-finite rows"
        return (
            f"{self.name:16} {self.rows:>12,} rows  {self.seconds:8.2f} s  "
            f"{rates['rows_per_second'] / 1e6:6.2f} M rows/s  {rates['gb_per_second']:6.2f} GB/s"
            + (bad if self.zero_rows + self.nonfinite_rows else "")
            + (before if self.finished_before else "")
        )


@dataclass
class PassRunner:
    """The passes of one command, in order, and their checkpoints in an output directory.

    Args:
        settings: the options of the run.
        part: ``(i, n)`` takes the shards i, i + n, ... (i from 0), as one job of an array.
        reading: ``False`` reads no rows and takes only shards that are finished.
        engine: maps tasks over shards; None is the one of ``settings.workers``.
    """

    settings: Settings = field(default_factory=Settings)
    part: Part = (0, 1)
    reading: bool = True
    engine: Engine | None = None
    passes: list[Pass] = field(default_factory=list, init=False)
    manifest_passes: Passes = field(default_factory=dict, init=False)
    out: StoragePath | None = field(default=None, init=False)
    records: StoragePath | None = field(default=None, init=False)  # None: no checkpoints are kept
    _identities: dict[Corpus, tuple[Entry, ...]] = field(default_factory=dict, init=False)

    @contextmanager
    def output_directory(self, out: AnyPath) -> Iterator[None]:
        """Keep checkpoints in ``out`` and lock it, so that no other process works on it."""
        out = output_path(out)
        (index, parts), records = self.part, records_of(out)
        has_workers = self.settings.workers > 1 or self.engine not in (None, map)
        if has_workers and str(out).startswith("memory:"):
            raise OptionError(
                f"{out}: memory:// is of one process, and workers would write into their own; give "
                "one worker, or another --out"
            )
        with locked(records / STATS, f"{index + 1}-of-{parts}" if parts > 1 else ""):
            check_arithmetic(records, code_version(self.settings.device))
            self.out, self.records = out, records
            try:
                yield
            finally:
                self.out = self.records = None

    def task(
        self,
        name: str,
        corpus: Corpus,
        row_map: AnyMap | None = None,
        *,
        covariance: bool = False,
        result: tuple[str, StoragePath] | None = None,
    ) -> ShardTask:
        """Return the task of pass ``name``; ``result`` is the name of a folder, and its path."""
        key_facts = {
            "pass": name,
            "bad_rows": self.settings.bad_rows,
            "batch_bytes": self.settings.batch_bytes,
            "column": corpus.column,
            "allow_pickle": corpus.allow_pickle,
            "covariance": covariance,
            "map": map_hash(row_map),
            **({"folder": result[0]} if result else {}),
            "code": code_version(self.settings.device),
        }
        if corpus not in self._identities:
            self._identities[corpus] = identities(corpus.shards)
        checkpoints = Checkpoints(self.records, key_facts) if self.records else None
        shared = name, corpus, self._identities[corpus], checkpoints, self.settings, self.reading
        kernels = chosen_backends(self.settings.device)
        return ShardTask(*shared, row_map, covariance, result[1] if result else None, kernels)

    @memory_explained()
    def run_pass(self, task: ShardTask) -> Moments:
        """Map a task over the shards and return the merged moments, in the order of the shards.

        A shard that is not finished is an error (``UnfinishedShards``) if the task reads none.
        """
        corpus, name, entries = task.corpus, task.name, list[Entry]()
        total, unfinished = Moments(task.covariance, accurate=task.covariance), []
        shards = range(self.part[0], len(corpus.shards), self.part[1])
        rows = sum(corpus.shards[i].num_rows for i in shards)
        self.engine = self.engine or engine_of(self.settings.workers)
        batchwise = self.engine is map  # another process reports its progress shard by shard
        written = task.columns * corpus.dtype.itemsize if task.folder is not None else 0
        with self.timed_pass(name, corpus, rows, total, written) as advance:
            if batchwise:
                task = replace(task, advance=advance)
            overlaps = batchwise and task.folder is not None and not task.folder.is_remote
            engine: Engine = map_overlapping_sync if overlaps else self.engine
            for result in engine(task, shards):
                shard = corpus.shards[result.index]
                if result.moments is None:
                    unfinished.append(str(shard.path))
                    continue
                if not batchwise:
                    advance(result.rows_read)
                advance(shard.num_rows - result.rows_read, finished_before=True)
                total.merge(result.moments)
                entries.append(task.identities[result.index] | result.entry)
        if unfinished:
            raise UnfinishedShards(
                f"{name}: {len(unfinished)} of {len(shards)} shards are not finished with these "
                f"options, first {unfinished[0]}; run their part of the job array with them"
            )
        if task.checkpoints and self.out and self.part[1] == 1:
            self.manifest_passes[name] = {"facts": task.checkpoints.facts, "shards": entries}
            task.checkpoints.remove_stale(corpus.shards, task.identities)
        return total

    @contextmanager
    def timed_pass(
        self,
        name: str,
        corpus: Corpus,
        rows: int,
        moments: Moments,
        written_row_bytes: int = 0,
        rows_read: int | None = None,
    ) -> Iterator[Callable[..., None]]:
        """Time a pass over ``rows`` rows; yield a function to call with the number of rows done.

        ``rows_read`` are those that a sample of ``rows`` has to read.
        """
        done, row_bytes = Pass(name), corpus.shards[0].row_bytes
        start = time.time()
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "miniters": 1}
        options["shown"] = self.settings.progress
        with Progress(rows * row_bytes, name, **options) as bar:

            def advance(rows: int, finished_before: bool = False) -> None:
                """Count ``rows`` rows, and move the bar."""
                done.rows += rows * (not finished_before)
                done.finished_before += rows * finished_before
                rate = done.rows / max(time.time() - start, 1e-9)
                bar.set_postfix_str(f"{rate / 1e6:.2f} M rows/s", refresh=False)
                bar.update(rows * row_bytes)

            yield advance
        done.seconds = time.time() - start
        done.bytes_read = (done.rows if rows_read is None else rows_read) * row_bytes
        done.bytes_written = done.rows * written_row_bytes
        done.zero_rows, done.nonfinite_rows = moments.zero_rows, moments.nonfinite_rows
        self.passes.append(done)
        if self.reading:
            LOGGER.info(done.describe(), extra={"event": {"event": "pass", **done.summary()}})
