"""Fitting on a sample: rows spread evenly over the corpus, and how far off that can be.

The means of n rows are off by ``sqrt(T / n)``, T the trace of their covariance, so that a million
rows fix a map to 1e-3 however large the corpus is; the paper finds 10^4 enough (arXiv 2602.07026).
Errors here are against the fit on every row of the same corpus, hence the factor
``sqrt(1 - n / N)`` of a sample without replacement: 0 where all rows are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..corpus.corpus import Corpus
from ..moments import Moments, RowMap, good_rows
from .checkpoints import Entry
from .passes import PassRunner
from .settings import Settings

EXACT_BYTES = 10**12  # of source and target together, up to which every row is used by default
DEFAULT_ROWS = 1_000_000  # of each side above that
_BLOCKS = 20  # of the delete-one jackknife


@dataclass
class Sampled:
    """Moments of a sample, and of its blocks what a jackknife of means and traces needs."""

    moments: Moments
    rows: int  # of the whole corpus
    blocks: list[tuple[int, torch.Tensor, float]]  # count, sum [D] float64, sum of squared norms

    @property
    def share_left(self) -> float:
        """``sqrt(1 - n / N)``."""
        return math.sqrt(max(0.0, 1 - self.moments.count / max(self.rows, 1)))

    @property
    def mean_error(self) -> float:
        """Expected distance between the mean of the sample and that of the corpus."""
        return math.sqrt(self.moments.trace / self.moments.count) * self.share_left

    def log_trace_error(self) -> float:
        """Standard error of ``log T``, by leaving out one block at a time."""
        count, total, energy = (sum(column) for column in zip(*self.blocks, strict=True))
        logs = []
        for n, part, squares in self.blocks:
            left = count - n
            mean = (total - part) / left
            logs.append(math.log(float((energy - squares) / left - mean @ mean)))
        return self.share_left * math.sqrt((len(logs) - 1) * float(np.var(logs)))


def rows_to_fit(settings: Settings, source: Corpus, target: Corpus) -> tuple[int | None, str]:
    """How many rows of each side to fit on (None: every row), and that in words.

    Raises:
        ValueError: a sample of a corpus that is to be extended.
    """
    count, size = settings.fit_rows, source.nbytes + target.nbytes
    if count is None and size > EXACT_BYTES and settings.mode != "extend":
        count, why = DEFAULT_ROWS, f", as both sides take more than {EXACT_BYTES / 1e12:g} TB"
    else:
        why = ""
    if not count:
        return None, "every row"
    if settings.mode == "extend":
        raise ValueError("fit-rows: statistics of every row are extended, not samples; drop one")
    parts = [
        f"{min(count, corpus.num_rows):,} of {corpus.num_rows:,} {side} rows"
        for side, corpus in (("source", source), ("target", target))
    ]
    return count, f"a sample of {' and '.join(parts)}{why}"


def measure_sample(
    run: PassRunner, name: str, corpus: Corpus, count: int, covariance: bool, through: RowMap | None
) -> Sampled:
    """Moments of ``count`` rows of a corpus, one of each of as many equal stretches.

    The same rows for the same ``settings.seed``; memory is a batch, whatever the count.
    """
    settings, ids = run.settings, sample_ids(corpus.num_rows, count, run.settings.seed)
    size = max(1, settings.batch_bytes // corpus.shards[0].row_bytes)
    total, blocks = Moments(covariance, accurate=covariance), []
    number = min(_BLOCKS, max(1, len(ids) // 2))
    with run.timed(name, corpus, len(ids), total) as advance:
        for block in range(number):
            part = Moments(covariance, accurate=covariance)
            for where, rows in _taken(corpus, ids[block::number], size):
                if settings.bad_rows == "error":
                    _check(corpus, where, rows)
                part.update(rows, through=through, bad_rows=settings.bad_rows)
                advance(len(rows))
            total.merge(part)
            if part.count:
                blocks.append((part.count, part.mean * part.count, part.energy * part.count))
    return Sampled(total, corpus.num_rows, blocks)


def errors(source: Sampled, target: Sampled, drift: Sampled, seed: int) -> Entry:
    """What goes into the report: sizes, the seed and one standard error of each number.

    ``scale``: relative error of ``sqrt(T_x / T_y)`` times it. ``residual_gap``: the distance to
    expect between the mean of all aligned rows and that of all target rows.
    """
    logs = math.hypot(source.log_trace_error(), target.log_trace_error()) / 2
    scale = math.sqrt(target.moments.trace / source.moments.trace)
    return {
        "seed": seed,
        "source_rows": source.moments.count,
        "target_rows": target.moments.count,
        "source_mean_error": source.mean_error,
        "target_mean_error": target.mean_error,
        "scale_error": scale * logs,
        "residual_gap_error": math.hypot(drift.mean_error, target.mean_error),
    }


def sample_ids(rows: int, count: int, seed: int) -> np.ndarray:
    """``[min(count, rows)]`` int64, ascending: a random row of each of as many equal stretches."""
    count = min(count, rows)
    edges = np.arange(count + 1) * rows // max(count, 1)
    offsets = np.random.default_rng(seed).random(count) * np.diff(edges)
    return edges[:-1] + offsets.astype(np.int64)


def _taken(corpus: Corpus, ids: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    for first in range(0, len(ids), size):
        some = ids[first : first + size]
        yield some, corpus.take(some)


def _check(corpus: Corpus, ids: np.ndarray, rows: torch.Tensor) -> None:
    good = good_rows(rows)
    if not bool(good.all()):
        row = int(ids[int((~good).nonzero()[0])])
        shard = int(np.searchsorted(corpus.starts, row, side="right")) - 1
        raise ValueError(
            f"{corpus.shards[shard].path}: row {row - int(corpus.starts[shard])} is zero or not "
            "finite; mend the file, or pass bad_rows='skip' (--bad-rows skip) to leave it out"
        )
