"""Reference implementation: every op in plain torch and float64, on any device and for any dtype.

The kernels are tested against these functions, which also run where no kernel is compiled. They are
written to be read: each follows its formula term by term. One convention covers all special cases:
``unit(0) = 0``, and a row that holds a NaN or an infinity is *non-finite*: it maps to a row of NaN
and takes no part in a sum. The argument ``variant`` selects a compiled kernel and is ignored here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """Return ``x / |x|`` along the last axis, without overflow or underflow; zero stays zero."""
    return _unit_and_norm(rows)[0]


def _unit_and_norm(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the direction and two factors of the norm, whose product may overflow.

    For a zero row the factors are 1 and infinity, so that its derivatives are 0 as well.
    """
    peak = rows.abs().amax(dim=-1, keepdim=True).detach()
    peak = torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(rows / peak, dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, torch.inf)
    return rows / peak / norm, peak, norm


def _affine_on_sphere(
    scaled: Tensor, shift: Tensor, recentre: Tensor | None, length: float | None = 1.0
) -> Tensor:
    """Return ``c unit(unit(s u + b) + h)`` of ``s u``: the map of arXiv 2602.07026, section 4."""
    mapped = scaled + shift
    if recentre is not None:
        mapped = unit(mapped) + recentre
    return mapped if length is None else length * unit(mapped)


def map_rows(
    rows: Tensor,  # [N, D] any floating dtype
    linear: Tensor,  # A, float64: a matrix [D, D], a diagonal [D] or a number []
    shift: Tensor,  # [D] float64, b
    recentre: Tensor | None,  # [D] float64, h; None leaves the last step out
    dtype: torch.dtype,
    length: float | None = 1.0,  # c; None leaves the last normalisation out
    variant: int = 0,
) -> Tensor:
    """Return ``c unit(unit(A u + b) + h)`` with ``u = x / |x|``, as [N, D] of ``dtype``."""
    x, finite, _ = _finite_rows(rows)
    out = _affine_on_sphere(_linear(unit(x), linear), shift, recentre, length)
    return torch.where(finite, out, torch.nan).to(dtype)


def map_rows_(
    out: Tensor,
    rows: Tensor,
    linear: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    length: float | None = 1.0,
    variant: int = 0,
) -> None:
    """Write :func:`map_rows` into ``out`` [N, D], whose dtype decides the rounding."""
    out.copy_(map_rows(rows, linear, shift, recentre, out.dtype, length))


align_rows, align_rows_ = map_rows, map_rows_  # the ops of a number, s [], in place of A


def _linear(u: Tensor, linear: Tensor) -> Tensor:
    """Return A u for each row; A is a number, a diagonal [D] or a matrix [D, D]."""
    return linear * u if linear.dim() < 2 else u @ linear.T


def _finite_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows in float64, 0 where a row is non-finite; the mask of the others; the counts.

    The mask is [N, 1]. The counts [3] are those of finite rows (zero rows among them), of zero rows
    and of non-finite rows.
    """
    x = rows.double()
    finite = torch.isfinite(x).all(dim=-1, keepdim=True)
    zero = (x == 0).all(dim=-1)
    counts = torch.stack([finite.sum(), zero.sum(), (~finite).sum()])
    return torch.where(finite, x, 0), finite, counts


def align_rows_backward(
    rows: Tensor,  # [N, D] any floating dtype
    grad: Tensor,  # [N, D] gradient of the result, any floating dtype
    linear: Tensor,  # float64: s []; this function also takes A, [D] or [D, D]
    shift: Tensor,  # [D] float64, b
    recentre: Tensor | None,  # [D] float64, h
    length: float | None = 1.0,
    normalize: bool = True,  # False differentiates the map of u = x
    variant: int = 0,
) -> Tensor:
    """Return the gradient of `align_rows` and `map_rows` with respect to the rows, [N, D].

    It applies ``d unit(v) = (I - unit(v) unit(v)^T) / |v|`` from the last step to the first. It is
    0 for non-finite rows and where a vector that is normalised is zero, whatever ``grad`` is there,
    so that a bad row does not spoil the gradients upstream of it. It has the dtype of the rows.
    """
    x, finite, _ = _finite_rows(rows)
    half = _linear(unit(x) if normalize else x, linear) + shift
    g = grad.double()
    if length is not None:
        g = _unit_backward(length * g, half if recentre is None else unit(half) + recentre)
    if recentre is not None:
        g = _unit_backward(g, half)
    g = g * linear if linear.dim() < 2 else g @ linear
    if normalize:
        g = _unit_backward(g, x)
    return torch.where(finite, g, 0).to(rows.dtype)


def _unit_backward(grad: Tensor, v: Tensor) -> Tensor:
    direction, peak, norm = _unit_and_norm(v)
    tangent = grad - direction * (direction * grad).sum(dim=-1, keepdim=True)
    return torch.where(norm == torch.inf, 0, tangent / peak / norm)


def sum_rows(
    rows: Tensor,  # [N, D] any floating dtype
    scale: Tensor | None,  # [] float64
    shift: Tensor | None,  # [D] float64; None sums the rows themselves
    recentre: Tensor | None,  # [D] float64
    normalize: bool,
    variant: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum [D], the energy [] (sum of squared norms) and the counts [3] of the rows.

    The terms of the sum are the rows (``normalize=False``), their directions ``u``, or, with
    ``scale`` and ``shift``, their images ``unit(s u + b)`` and, with ``recentre``,
    ``unit(unit(s u + b) + h)``.
    """
    x, finite, counts = _finite_rows(rows)
    if normalize:
        x = unit(x)
    if scale is not None and shift is not None:
        x = _affine_on_sphere(scale * x, shift, recentre)
    x = torch.where(finite, x, 0)
    return x.sum(dim=0), (x * x).sum(), counts


def add_scatter_(
    scatter: Tensor,  # [D, D] float64; only its upper triangle is read and written
    total: Tensor,  # [D] float64
    rows: Tensor,  # [N, D] any floating dtype
    centre: Tensor,  # [D] float64, c
    weights: Tensor | None,  # [N] float64, not negative; None is 1
    normalize: bool,
    accurate: bool,
    variant: int = 0,
) -> Tensor:
    """Add ``sum w (u - c)(u - c)^T`` to ``scatter`` and ``sum w (u - c)`` to ``total``, in float64.

    This is the covariance sum about a provisional centre (Chan, Golub and LeVeque, "Algorithms for
    computing the sample variance", 1983). It returns the counts of `sum_rows`.
    """
    x, finite, counts = _finite_rows(rows)
    x = torch.where(finite, (unit(x) if normalize else x) - centre, 0)
    weighted = x if weights is None else weights[:, None] * x
    scatter += torch.triu(weighted.T @ x)
    total += weighted.sum(dim=0)
    return counts
