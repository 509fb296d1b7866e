"""Fits on a sample of rows spread evenly over the corpus, and their standard errors.

The mean of n rows is off by ``sqrt(T / n)``, where T is the trace of their covariance. A million
rows thus fix a map to 1e-3 however large the corpus is; the paper finds 10^4 rows enough (arXiv
2602.07026). The errors here are against the fit on every row of the same corpus, hence the factor
``sqrt(1 - n / N)`` of a sample without replacement, which is 0 where all rows are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..corpus.corpus import Corpus, sample_ids
from ..interface.option_values import DEFAULT_ROWS, EXACT_BYTES
from ..moments import Moments, good_rows
from .checkpoints import AnyMap
from .passes import PassRunner
from .settings import Settings

_BLOCKS = 20  # blocks of the delete-one jackknife


@dataclass
class Sample:
    """The moments of a sample of a corpus of ``corpus_rows`` rows, or of all its rows.

    ``blocks`` holds count, sum [D] float64 and sum of squared norms of each block of the sample,
    for a jackknife of means and traces.
    """

    moments: Moments
    corpus_rows: int
    blocks: list[tuple[int, torch.Tensor, float]] = field(default_factory=list)

    @property
    def finite_correction(self) -> float:
        """``sqrt(1 - n / N)``, the factor of a sample without replacement."""
        return math.sqrt(max(0.0, 1 - self.moments.count / max(self.corpus_rows, 1)))

    @property
    def mean_error(self) -> float:
        """Expected distance between the mean of the sample and the mean of the corpus."""
        return math.sqrt(self.moments.trace / self.moments.count) * self.finite_correction

    def log_trace_error(self) -> float:
        """Return the standard error of ``log T``, by leaving out one block at a time."""
        counts, sums, energies = zip(*self.blocks, strict=True)
        count, total, energy = sum(counts), sum(sums, torch.tensor(0.0)), sum(energies)
        logs = []
        for n, block_sum, squares in self.blocks:
            remaining = count - n
            mean = (total - block_sum) / remaining
            logs.append(math.log(float((energy - squares) / remaining - mean @ mean)))
        return self.finite_correction * math.sqrt((len(logs) - 1) * float(np.var(logs)))


def rows_to_fit(settings: Settings, source: Corpus, target: Corpus) -> tuple[int | None, str]:
    """Return how many rows of each side to fit on (None: every row), and a description of it."""
    count, reason = settings.fit_rows, ""
    if count is None and source.nbytes + target.nbytes > EXACT_BYTES:
        count, reason = DEFAULT_ROWS, f", as both sides take more than {EXACT_BYTES / 1e12:g} TB"
    if not count:
        return None, "every row"
    sides = [
        f"{min(count, corpus.num_rows):,} of {corpus.num_rows:,} {side} rows"
        for side, corpus in (("source", source), ("target", target))
    ]
    return count, f"a sample of {' and '.join(sides)}{reason}"


def measure_sample(
    run: PassRunner,
    name: str,
    corpus: Corpus,
    count: int,
    covariance: bool,
    row_map: AnyMap | None,
) -> Sample:
    """Measure ``count`` rows of a corpus, one of each of as many equal stretches, in pass ``name``.

    They are sent through ``row_map``. The rows are the same for the same ``settings.seed``; memory
    is one batch, whatever the count.
    """
    settings, through = run.settings, row_map.row_map if row_map else None
    ids = sample_ids(corpus.num_rows, count, settings.seed)
    size = max(1, settings.batch_bytes // corpus.shards[0].row_bytes)
    total, blocks = Moments(covariance, accurate=covariance), []
    num_blocks = min(_BLOCKS, max(1, len(ids) // 2))
    with run.timed_pass(name, corpus, len(ids), total) as advance:
        for block in range(num_blocks):
            moments = Moments(covariance, accurate=covariance)
            block_ids = ids[block::num_blocks]
            for first in range(0, len(block_ids), size):
                batch_ids = block_ids[first : first + size]
                rows = corpus.take(batch_ids)
                if settings.bad_rows == "error":
                    _check_rows(corpus, batch_ids, rows)
                moments.update(rows, through=through, bad_rows=settings.bad_rows)
                advance(len(rows))
            total.merge(moments)
            if n := moments.count:
                blocks.append((n, moments.mean * n, moments.energy * n))
    return Sample(total, corpus.num_rows, blocks)


def sampling_errors(source: Sample, target: Sample, drift: Sample, seed: int) -> dict[str, Any]:
    """Return sample sizes, seed and standard errors for the report.

    ``scale_error`` is the error of ``sqrt(T_x / T_y)``. ``residual_gap_error`` is the distance to
    expect between the mean of all aligned rows and the mean of all target rows.
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


def _check_rows(corpus: Corpus, ids: np.ndarray, rows: torch.Tensor) -> None:
    """Raise ValueError for the first row that is zero or not finite."""
    good = good_rows(rows)
    if not bool(good.all()):
        row = int(ids[int((~good).nonzero()[0])])
        shard = int(np.searchsorted(corpus.starts, row, side="right")) - 1
        raise ValueError(
            f"{corpus.shards[shard].path}: row {row - int(corpus.starts[shard])} is zero or not "
            "finite; mend the file, or pass bad_rows='skip' (--bad-rows skip) to leave it out"
        )
