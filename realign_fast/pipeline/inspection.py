"""What a corpus holds: its shape, read from headers, and its rows, from a sample of them."""

from __future__ import annotations

from typing import Any

from ..corpus.corpus import Corpus, sample_rows
from ..moments import Moments, good_rows


def inspect(corpus: Corpus, sample: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Facts of a corpus as plain numbers; those of rows are of ``sample`` rows spread over it.

    ``norms`` (min, mean, max), ``mean_norm`` (of the mean of the rows' directions) and ``trace``
    leave out zero and non-finite rows, and are None where no other row is left.
    """
    rows = sample_rows(corpus, sample, seed)
    good = rows[good_rows(rows)].double()
    moments = Moments().update(rows, bad_rows="skip") if len(rows) else None
    norms = good.norm(dim=1)
    return {
        "path": str(corpus.path),
        "format": corpus.format,
        "layout": corpus.layout,
        "rows": corpus.num_rows,
        "dimension": corpus.dimension,
        "dtype": str(corpus.dtype).removeprefix("torch."),
        "shards": len(corpus.shards),
        "bytes": corpus.nbytes,
        "sample": {
            "rows": len(rows),
            "seed": seed,
            "zero_rows": moments.zero_rows if moments else 0,
            "nonfinite_rows": moments.nonfinite_rows if moments else 0,
            "norms": [float(one) for one in (norms.min(), norms.mean(), norms.max())]
            if len(good)
            else None,
            "mean_norm": float(moments.mean.norm()) if len(good) else None,
            "trace": moments.trace if len(good) else None,
        },
    }


def as_lines(found: dict[str, Any]) -> str:
    """The same for a reader."""
    sample = found["sample"]
    norms = (
        "n/a" if sample["norms"] is None else "{:.4g} .. {:.4g} .. {:.4g}".format(*sample["norms"])
    )
    number = {
        key: "n/a" if sample[key] is None else f"{sample[key]:.6f}"
        for key in ("mean_norm", "trace")
    }
    lines = {
        "path": found["path"],
        "format": f"{found['format']}, {found['layout']}",
        "rows": f"{found['rows']:,} x {found['dimension']} {found['dtype']}",
        "shards": f"{found['shards']:,}, {found['bytes'] / 1e9:.3f} GB of rows",
        "sample": f"{sample['rows']:,} rows, seed {sample['seed']}",
        "bad rows": f"{sample['zero_rows']} zero, {sample['nonfinite_rows']} non-finite",
        "norms": f"{norms} (least, mean, greatest)",
        "mean": f"of norm {number['mean_norm']}, trace {number['trace']} (of unit rows)",
    }
    return "\n".join(f"{name:9} {text}" for name, text in lines.items())
