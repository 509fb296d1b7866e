"""The check that an argument holds rows as a tensor, with the way to make one of what it holds."""

from __future__ import annotations

from torch import Tensor


def expect_tensor(name: str, rows: object, argument: str = "rows") -> None:
    """Raise a TypeError that says how to convert rows which are no tensor; ``name`` begins it."""
    if isinstance(rows, Tensor):
        return
    kind = type(rows).__name__
    if hasattr(rows, "to_numpy"):  # a table of pandas or polars
        advice = "use torch.from_numpy(rows.to_numpy(dtype)) of its numeric columns"
    elif isinstance(rows, (str, dict)) or rows is None:
        advice = "give the rows themselves"
    else:
        advice = "use torch.as_tensor(rows)"
    raise TypeError(f"{name}: expected {argument} as a tensor, got {kind}; {advice}")
