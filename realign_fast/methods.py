"""The linear part A of every map ``unit(unit(A u + b) + h)``, from the moments of both sides.

With ``b = mu_x - A mu_y`` every map sends mean to mean (y source, x target; arXiv 2602.07026,
section 4, and its appendix F for the block-wise map). docs/method.md has the formula of each A.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from . import whiten
from .frame import FixedFrame
from .interface.option_values import Method
from .moments import Moments
from .whiten import Shrinkage

__all__ = ["METHODS", "NEED_COVARIANCE", "Method", "Shrinkage", "linear_part"]

METHODS: tuple[Method, ...] = get_args(Method)
NEED_COVARIANCE = METHODS[2:6]
_ROWS_A_COLUMN = 10  # eigenvalues of a covariance of n rows are off by about sqrt(D / n)


def expect_method(method: Method) -> Method:
    """Return the method; a ValueError if there is none of this name."""
    if method not in METHODS:
        raise ValueError(f"ReAlign: method={method!r} is none of {', '.join(METHODS)}")
    return method


def few_rows(method: Method, shrinkage: Shrinkage, rows: int, columns: int) -> str:
    """Say that the smaller side has few rows for its covariance, and what to do; else "".

    A shrunk covariance needs a row for each column (docs/text_instead_of_pairs.md measures it),
    another one ten.
    """
    needed = columns if shrinkage else _ROWS_A_COLUMN * columns
    if method not in NEED_COVARIANCE or method == "diagonal" or rows >= needed:
        return ""
    advice = "give --shrinkage oas" if rows >= columns else "leave out --method and --shrinkage"
    fault = f"{rows:,} rows for a covariance of {columns} columns, expected {needed:,}"
    return f"{method}: {fault} ({needed // columns} for each column); {advice}, or fit on more rows"


def linear_part(
    method: Method,
    source: Moments,
    target: Moments,
    shrinkage: Shrinkage = None,
    floor: float | None = None,
    energy: float = 0.9,
) -> Tensor:
    """Return A in float64: a number [], a diagonal [D] or a matrix [D, D].

    ``ReAlign.fit`` describes the options. A ValueError names an unknown method, and moments
    without the covariances that the method needs.
    """
    if expect_method(method) not in NEED_COVARIANCE:
        if shrinkage is not None or floor is not None:
            raise ValueError(
                f"ReAlign: shrinkage and floor are of covariances, and method={method!r} has "
                f"none; leave them out, or choose one of {', '.join(NEED_COVARIANCE)}"
            )
        scale = math.sqrt(target.trace / source.trace) if method == "realign" else 1.0
        return torch.tensor(scale, dtype=torch.float64)
    s_y, s_x = (_shrunk_covariance(moments, shrinkage) for moments in (source, target))
    if method == "diagonal":
        return _deviation_ratios(s_y, s_x, floor)
    if method == "blockwise":
        frame = FixedFrame.fit(source, target, energy=energy)
        return whiten.blockwise(s_y, s_x, frame.principal.cpu(), floor=floor)
    matrix_of = whiten.coral if method == "coral" else whiten.optimal_transport
    return matrix_of(s_y, s_x, floor=floor)


def _deviation_ratios(s_y: Tensor, s_x: Tensor, floor: float | None) -> Tensor:
    """Return the ratios [D] of standard deviations, 0 where the source has no variance."""
    variances = s_y.diagonal().double()
    smallest = (whiten.default_floor(s_y) if floor is None else floor) * variances.max()
    ratios = s_x.diagonal().double() / torch.where(variances > smallest, variances, torch.inf)
    return ratios.clamp(min=0).sqrt()


def _shrunk_covariance(moments: Moments, shrinkage: Shrinkage) -> Tensor:
    """Return a covariance [D, D] on the CPU, float64 if shrunk, else as ``rounded_covariance``."""
    covariance = moments.rounded_covariance.cpu()
    if shrinkage is None or shrinkage == 0:
        return covariance
    return whiten.shrink(covariance, shrinkage, count=moments.count, mean=moments.mean.cpu())
