"""Fits on a sample of rows spread evenly over the corpus, and their standard errors.

The mean of n rows is off by ``sqrt(T / n)``, where T is the trace of their covariance. A million
rows thus fix a map to 1e-3 however large the corpus is; the paper finds 10^4 rows enough (arXiv
2602.07026). The errors here are against the fit on every row of the same corpus, hence the factor
``sqrt(1 - n / N)`` of a sample without replacement, which is 0 where all rows are taken.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..corpus.corpus import Corpus, sample_ids
from ..interface.option_values import UnfinishedShards
from ..moments import Moments, good_rows
from .checkpoints import AnyMap
from .passes import PassRunner


def measure_sample(
    run: PassRunner, name: str, corpus: Corpus, count: int, covariance: bool, row_map: AnyMap | None
) -> Moments:
    """Measure ``count`` rows, one of each of as many equal stretches, sent through ``row_map``.

    They are the same for the same ``settings.seed``; memory is one batch, whatever the count.
    """
    if not run.reading:
        raise UnfinishedShards(f"{name}: a sample leaves no checkpoints")
    settings, through = run.settings, row_map.row_map if row_map else None
    ids = sample_ids(corpus.num_rows, count, settings.seed)
    size = max(1, settings.batch_bytes // corpus.shards[0].row_bytes)
    total = Moments(covariance, accurate=covariance)
    rows_read = corpus.rows_read(ids)
    with run.timed_pass(name, corpus, len(ids), total, rows_read=rows_read) as advance:
        for first in range(0, len(ids), size):
            batch_ids = ids[first : first + size]
            rows = corpus.take(batch_ids)
            if settings.bad_rows == "error" and len(bad := batch_ids[~good_rows(rows).numpy()]):
                shard = int(np.searchsorted(corpus.starts, bad[0], side="right")) - 1
                raise ValueError(
                    f"{corpus.shards[shard].path}: row {bad[0] - corpus.starts[shard]} is zero or "
                    "not finite; mend the file, or pass bad_rows='skip' (--bad-rows skip) to leave "
                    "it out"
                )
            total.update(rows, through=through, bad_rows=settings.bad_rows)
            advance(len(rows))
    return total


def sampling_errors(
    source: Moments, target: Moments, drift: Moments, corpus_rows: tuple[int, int], seed: int
) -> dict[str, Any]:
    """Return sample sizes, seed and standard errors for the report.

    An error of a mean is its expected distance from the mean of all rows, of which there are
    ``corpus_rows`` of the source and of the target. ``residual_gap_error`` is the distance to
    expect between the mean of all aligned rows and the mean of all target rows.
    """
    rows, target_rows = corpus_rows
    samples = (source, rows), (target, target_rows), (drift, rows)
    source_error, target_error, drift_error = (
        math.sqrt(max(0.0, 1 - m.count / total) * m.trace / m.count) for m, total in samples
    )
    return {
        "seed": seed,
        "source_rows": source.count,
        "target_rows": target.count,
        "source_mean_error": source_error,
        "target_mean_error": target_error,
        "residual_gap_error": math.hypot(drift_error, target_error),
    }
