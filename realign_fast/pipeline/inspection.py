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
    norms = rows[good_rows(rows)].double().norm(dim=1)
    of_usable: dict[str, Any] = {"norms": None, "mean_norm": None, "trace": None}
    if moments.count:
        of_usable["norms"] = [float(f(norms)) for f in (torch.min, torch.mean, torch.max)]
        of_usable |= {"mean_norm": float(moments.mean.norm()), "trace": moments.trace}
    return shape_of(corpus) | {
        "format": corpus.format,
        "layout": corpus.layout,
        "sample": {
            "rows": len(rows),
            "seed": seed,
            "zero_rows": moments.zero_rows,
            "nonfinite_rows": moments.nonfinite_rows,
            **of_usable,
        },
    }


def format_facts(facts: dict[str, Any]) -> str:
    """Format what :func:`inspect` returns as lines of text."""
    sample = facts["sample"]
    norms, mean_norm, trace = (sample[name] for name in ("norms", "mean_norm", "trace"))
    lines = {
        "path": facts["path"],
        "format": f"{facts['format']}, {facts['layout']}",
        "rows": f"{facts['rows']:,} x {facts['dimension']} {facts['dtype']}",
        "shards": f"{facts['shards']:,}, {facts['bytes'] / 1e9:.3f} GB of rows",
        "sample": f"{sample['rows']:,} rows, seed {sample['seed']}",
        "bad rows": f"{sample['zero_rows']} zero, {sample['nonfinite_rows']} non-finite",
        "norms": "n/a (least, mean, greatest)",
        "mean": "of norm n/a, trace n/a (of unit rows)",
    }
    if norms is not None:
        least, mean, greatest = norms
        lines["norms"] = f"{least:.4g} .. {mean:.4g} .. {greatest:.4g} (least, mean, greatest)"
        lines["mean"] = f"of norm {mean_norm:.6f}, trace {trace:.6f} (of unit rows)"
    return "\n".join(f"{name:9} {text}" for name, text in lines.items())
