"""Checks of arguments that several packages take: rows and counts."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")  # rows go out as the kind that came in


def expect_tensor(name: str, rows: object, argument: str = "rows", floating: bool = True) -> None:
    """Raise a TypeError unless rows are a dense tensor (``floating``: of floating-point numbers).

    The error begins with ``name`` and says how to convert the rows.
    """
    kind, advice = type(rows).__name__, "give the rows themselves"
    if isinstance(rows, Tensor):
        is_dense = rows.layout == torch.strided and not rows.is_nested
        if is_dense and (rows.is_floating_point() or not floating):
            return
        kind = f"{rows.dtype if is_dense else 'nested' if rows.is_nested else rows.layout}"
        advice = "convert with rows.to_dense().float()"
        if rows.is_nested:
            advice = "convert with torch.cat(rows.unbind()).float()"
        elif rows.is_complex():  # both parts are kept
            advice = "convert with torch.view_as_real(rows.to_dense()).flatten(-2).float()"
    elif hasattr(rows, "to_numpy"):  # a table of pandas or polars
        advice = "use torch.tensor(rows.to_numpy()) of its embedding columns"
    elif isinstance(rows, np.ndarray):
        kind, filled = f"ndarray of {rows.dtype}", "filled(numpy.nan)." * np.ma.isMA(rows)
        bits = 64 if rows.dtype.kind == "f" and rows.itemsize >= 8 else 32
        advice = f"use torch.from_numpy(rows.{filled}astype('float{bits}'))"  # of any strides
        if rows.dtype.kind == "c":
            advice = "use torch.view_as_real(torch.from_numpy(rows)).flatten(-2).float()"
    elif isinstance(rows, (list, tuple)):
        advice = "use torch.tensor(rows)"
    numbers = " of floating-point numbers" if floating else ""
    raise TypeError(f"{name}: expected {argument} as a tensor{numbers}, got {kind}; {advice}")


def expect_numbers(name: str, tensor: Tensor, argument: str = "rows") -> None:
    """Raise a TypeError if a tensor is on the device meta, where it holds no numbers."""
    if tensor.is_meta:
        raise TypeError(f"{name}: {argument} is on the device meta; give a tensor with numbers")


def expect_pairs(name: str, a: Tensor, b: Tensor, same_columns: bool = True) -> None:
    """Raise an error if rows do not match one by one, or :func:`expect_matrix` refuses them."""
    for rows in (a, b):
        expect_matrix(name, rows)
    if len(a) != len(b) or (same_columns and a.shape != b.shape):
        raise ValueError(
            f"{name}: expected rows that match one by one, got shapes {list(a.shape)} and "
            f"{list(b.shape)}; give both sides of the same pairs"
        )


def expect_matrix(name: str, rows: Tensor, min_rows: int = 2) -> None:
    """Raise an error if rows are no tensor [N, D], too few, or not finite; ``name`` begins it."""
    expect_tensor(name, rows)
    expect_numbers(name, rows)
    if rows.dim() != 2 or len(rows) < min_rows or not rows.shape[1]:
        raise ValueError(
            f"{name}: expected {min_rows} or more rows [N, D], got shape {list(rows.shape)}"
        )
    if not bool(torch.isfinite(rows).all()):
        bad_row = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(
            f"{name}: row {bad_row} holds a NaN or an infinity, expected finite rows; leave it out"
        )


def tensor_of(name: str, rows: object, argument: str = "rows") -> Tensor:
    """Return the rows of a tensor or an array of any byte order and strides as a tensor.

    What :func:`expect_tensor` refuses is a TypeError, a masked entry a ValueError.
    """
    if isinstance(rows, np.ndarray) and rows.dtype.kind == "f" and rows.itemsize <= 8:
        if np.ma.is_masked(rows):
            raise ValueError(
                f"{name}: the masked array has masked entries, expected none; leave those rows out"
            )
        with warnings.catch_warnings():  # of arrays that are read-only, as rows are not written to
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            rows = torch.from_numpy(np.ascontiguousarray(rows, rows.dtype.newbyteorder("=")))
    expect_tensor(name, rows, argument)
    assert isinstance(rows, Tensor)
    return rows


def expect_one_width(
    name: str, first: tuple[str, int], second: tuple[str, int], advice: str = ""
) -> None:
    """Raise a ValueError if two sides, each with its number of columns, differ in that."""
    if first[1] != second[1]:
        fault = "{} has {} columns, {} {}".format(*first, *second)
        raise ValueError(f"{name}: {fault}; {advice or 'embed both with one encoder'}")


def expect_counts(name: str, **counts: int) -> None:
    """Raise a ValueError for an option that is no whole number from 1; ``name`` begins it."""
    for option, count in counts.items():
        if not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name}: {option} is {count!r}, expected a whole number from 1")
