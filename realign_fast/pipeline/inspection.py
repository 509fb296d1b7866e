"""``realign-fast inspect``: the shape of a corpus, from headers, and statistics of a row sample."""

from __future__ import annotations

from typing import Any

import torch

from ..corpus.corpus import Corpus, sample_rows
from ..moments import Moments, good_rows
from ..storage.errors import memory_explained


def shape_of(corpus: Corpus) -> dict[str, Any]:
    """Return where a corpus is and how much it holds, as plain values."""
    return {
        "path": str(corpus.path),
        "shards": len(corpus.shards),
        "rows": corpus.num_rows,
        "dimension": corpus.dimension,
        "dtype": str(corpus.dtype).removeprefix("torch."),
        "bytes": corpus.nbytes,
    }


@memory_explained()
def inspect(corpus: Corpus, sample: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Return facts of a corpus as plain numbers; those of rows are of ``sample`` rows.

    ``norms`` (min, mean, max), ``mean_norm`` (of the mean of the rows' directions) and ``trace``
    leave out zero and non-finite rows, and are None if no other row is in the sample.
    """
    rows = sample_rows(corpus, sample, seed)
    moments = Moments().update(rows, bad_rows="skip")
    norms, is_usable = rows[good_rows(rows)].double().norm(dim=1), moments.count > 0
    spread = [float(f(norms)) for f in (torch.min, torch.mean, torch.max)] if is_usable else None
    return shape_of(corpus) | {
        "format": corpus.format,
        "layout": corpus.layout,
        "sample": {
            "rows": len(rows),
            "seed": seed,
            "zero_rows": moments.zero_rows,
            "nonfinite_rows": moments.nonfinite_rows,
            "norms": spread,
            "mean_norm": float(moments.mean.norm()) if is_usable else None,
            "trace": moments.trace if is_usable else None,
        },
    }


def format_facts(facts: dict[str, Any]) -> str:
    """Format what :func:`inspect` returns as lines of text."""
    sample = {f"sample {name}": value for name, value in facts["sample"].items()}
    values = {name: value for name, value in (facts | sample).items() if name != "sample"}
    return "\n".join(f"{name.replace('_', ' '):22} {_text(v)}" for name, v in values.items())


def _text(value: Any) -> str:
    if isinstance(value, list):  # least, mean, greatest
        return " .. ".join(map(_text, value))
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return "n/a" if value is None else str(value)
