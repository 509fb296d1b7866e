"""Checks of arguments that several packages take: a device's name, and rows as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def check_device(name: str | None) -> torch.device:
    """Return the device that ``name`` ("cpu", "cuda" or "cuda:N") stands for.

    ``None`` chooses CUDA where torch finds a GPU, and the CPU elsewhere.

    Raises:
        ValueError: the name is none of these, or torch finds no such GPU.
    """
    if name is None:
        return torch.device("cuda" if _gpu_count() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= (count := _gpu_count()):
        build = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise ValueError(
            f"--device: got {name!r}, but torch {torch.__version__} sees {count} CUDA devices"
            f"{build}; give cpu or one of those"
        )
    return device


def expect_tensor(name: str, rows: object, argument: str = "rows") -> None:
    """Raise a TypeError that says how to convert rows which are no tensor; ``name`` begins it."""
    if isinstance(rows, Tensor):
        return
    kind = type(rows).__name__
    if hasattr(rows, "to_numpy"):  # a table of pandas or polars
        advice = "use torch.tensor(rows.to_numpy()) of its numeric columns"
    elif isinstance(rows, (str, dict)) or rows is None:
        advice = "give the rows themselves"
    else:
        advice = "use torch.as_tensor(rows)"
    raise TypeError(f"{name}: expected {argument} as a tensor, got {kind}; {advice}")


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
