"""The truth: every op in plain torch and float64, on any device and for rows of any dtype.

The kernels are tested against these functions, and these functions run where no kernel is
compiled. They are written to be read: each follows the formula term by term. One convention
carries all corner cases: ``unit(0) = 0``, and a row that holds a NaN or an infinity is
*non-finite*: it maps to a row of NaN and takes no part in a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """``x / |x|`` along the last axis; zero stays zero, and no norm overflows or underflows."""
    return _unit_and_norm(rows)[0]


def _unit_and_norm(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The direction and two factors of the norm (its product may overflow), zeros replaced by 1."""
    peak = rows.abs().amax(dim=-1, keepdim=True).detach()
    peak = torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(rows / peak, dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1)
    return rows / peak / norm, peak, norm


def _affine_on_sphere(scaled: Tensor, shift: Tensor, recentre: Tensor | None) -> Tensor:
    """``unit(unit(s u + b) + h)`` of ``s u``: ReAlign's row map (arXiv 2602.07026, section 4)."""
    mapped = unit(scaled + shift)
    return mapped if recentre is None else unit(mapped + recentre)


def align_rows(
    rows: Tensor,  # [N, D] any floating dtype
    scale: Tensor,  # [] float64, s
    shift: Tensor,  # [D] float64, b
    recentre: Tensor | None,  # [D] float64, h; None leaves the last step out
    dtype: torch.dtype,
    isa: int = 0,
) -> Tensor:
    """``unit(unit(s u + b) + h)`` with ``u = x / |x|``, as [N, D] of ``dtype``."""
    x = rows.double()
    out = _affine_on_sphere(scale * unit(x), shift, recentre)
    finite = torch.isfinite(x).all(dim=-1, keepdim=True)
    return torch.where(finite, out, torch.nan).to(dtype)


def map_rows(
    rows: Tensor,  # [N, D] any floating dtype
    matrix: Tensor,  # [D, D] float64, A; or [D], its diagonal
    shift: Tensor,  # [D] float64, b
    recentre: Tensor | None,  # [D] float64, h
    dtype: torch.dtype,
    isa: int = 0,
) -> Tensor:
    """``unit(unit(A u + b) + h)`` with ``u = x / |x|``, as [N, D] of ``dtype``."""
    x = rows.double()
    finite = torch.isfinite(x).all(dim=-1, keepdim=True)
    u = unit(torch.where(finite, x, 0))
    out = _affine_on_sphere(_linear(u, matrix), shift, recentre)
    return torch.where(finite, out, torch.nan).to(dtype)


def _linear(u: Tensor, linear: Tensor) -> Tensor:
    """A u for each row, A a number, a diagonal [D] or a matrix [D, D]."""
    return linear * u if linear.dim() < 2 else u @ linear.T


def map_rows_(
    out: Tensor,
    rows: Tensor,
    matrix: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    isa: int = 0,
) -> None:
    """:func:`map_rows` into ``out`` [N, D], whose dtype decides the rounding."""
    out.copy_(map_rows(rows, matrix, shift, recentre, out.dtype))


def align_rows_(
    out: Tensor,
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    isa: int = 0,
) -> None:
    """:func:`align_rows` into ``out`` [N, D], whose dtype decides the rounding."""
    out.copy_(align_rows(rows, scale, shift, recentre, out.dtype))


def align_rows_backward(
    grad: Tensor,  # [N, D] gradient of the result
    rows: Tensor,
    linear: Tensor,  # [] the scale, [D] or [D, D]
    shift: Tensor,
    recentre: Tensor | None,
) -> Tensor:
    """Gradient of `align_rows` and `map_rows` in the rows: three projections off a unit vector.

    ``d unit(v) = (I - unit(v) unit(v)^T) / |v|``, applied from the last step to the first. It is 0
    for zero and non-finite rows, so that a bad row does not poison what lies behind it.
    """
    x = rows.double()
    x = torch.where(torch.isfinite(x).all(dim=-1, keepdim=True), x, 0)
    half = _linear(unit(x), linear) + shift
    g = grad.double()
    if recentre is not None:
        g = _unit_backward(g, unit(half) + recentre)
    g = _unit_backward(g, half)
    g = g * linear if linear.dim() < 2 else g @ linear
    return _unit_backward(g, x).to(rows.dtype)


def _unit_backward(grad: Tensor, v: Tensor) -> Tensor:
    direction, peak, norm = _unit_and_norm(v)
    tangent = grad - direction * (direction * grad).sum(dim=-1, keepdim=True)
    return torch.where((v != 0).any(dim=-1, keepdim=True), tangent / peak / norm, 0)


def sum_rows(
    rows: Tensor,  # [N, D] any floating dtype
    scale: Tensor | None,  # [] float64
    shift: Tensor | None,  # [D] float64; None sums the rows themselves
    recentre: Tensor | None,  # [D] float64
    normalize: bool,
    isa: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum [D], energy [] (sum of squared norms), counts [3] (rows, zero rows, non-finite rows).

    What is summed: the rows (``normalize=False``), their directions ``u``, or, with ``scale`` and
    ``shift``, their images ``unit(s u + b)`` and, with ``recentre``, ``unit(unit(s u + b) + h)``.
    Zero rows count among the rows; non-finite rows do not.
    """
    x = rows.double()
    finite = torch.isfinite(x).all(dim=-1, keepdim=True)
    zero = (x == 0).all(dim=-1)
    x = torch.where(finite, x, 0)
    if normalize:
        x = unit(x)
    if scale is not None and shift is not None:
        x = _affine_on_sphere(scale * x, shift, recentre)
    x = torch.where(finite, x, 0)
    counts = torch.stack([finite.sum(), zero.sum(), (~finite).sum()])
    return x.sum(dim=0), (x * x).sum(), counts


def add_scatter_(
    scatter: Tensor,  # [D, D] float64; only its upper triangle is read and written
    total: Tensor,  # [D] float64
    rows: Tensor,  # [N, D] any floating dtype
    centre: Tensor,  # [D] float64, c
    weights: Tensor | None,  # [N] float64, not negative; None is 1
    normalize: bool,
    accurate: bool,
    isa: int = 0,
) -> Tensor:
    """``scatter += sum w (u - c)(u - c)^T``, ``total += sum w (u - c)``; counts as `sum_rows`.

    The plain two-operand form of the covariance sum about a provisional centre (Chan, Golub and
    LeVeque, "Algorithms for computing the sample variance", 1983). Always in float64.
    """
    x = rows.double()
    finite = torch.isfinite(x).all(dim=-1, keepdim=True)
    zero = (x == 0).all(dim=-1)
    x = torch.where(finite, x, 0)
    x = torch.where(finite, (unit(x) if normalize else x) - centre, 0)
    weighted = x if weights is None else weights[:, None] * x
    scatter += torch.triu(weighted.T @ x)
    total += weighted.sum(dim=0)
    return torch.stack([finite.sum(), zero.sum(), (~finite).sum()])
