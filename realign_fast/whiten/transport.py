"""Maps that carry one covariance into another, and how far apart the two are."""

from __future__ import annotations

import torch
from torch import Tensor

from .._one_thread import one_thread
from .eigen import (
    checked_covariance,
    expect_same_columns,
    floor_of,
    pair_of,
    spectrum_of,
    symmetric,
    warn_floored,
)


@one_thread
def coral(source: Tensor, target: Tensor, *, floor: float | None = None) -> Tensor:
    """``A = S_x^1/2 S_y^-1/2`` [D, D] float64, so that ``A S_y A' = S_x`` (source y, target x)."""
    y, x = pair_of(source, target, floor)
    warn_floored(y.floored, len(source), y.floor)
    return x.power(0.5) @ y.power(-0.5)


@one_thread
def optimal_transport(source: Tensor, target: Tensor, *, floor: float | None = None) -> Tensor:
    """The symmetric positive semidefinite A [D, D] float64 with ``A S_y A' = S_x``.

    ``A = S_y^-1/2 (S_y^1/2 S_x S_y^1/2)^1/2 S_y^-1/2``, the map of least mean squared displacement
    between Gaussians (Knott and Smith, 1984). From singular values, which keeps the digits that
    forming the product would lose at a large condition number.
    """
    y, x = pair_of(source, target, floor)
    warn_floored(y.floored, len(source), y.floor)
    _, singular, right = torch.linalg.svd(x.factor(0.5).T @ y.factor(0.5))
    root = (y.factor(-0.5) @ right.T) * singular.sqrt()
    return symmetric(root @ root.T)


@one_thread
def bures_distance(a: Tensor, b: Tensor) -> float:
    """Bures distance of covariances [D, D], not squared: a metric.

    ``d^2 = tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2``; with the squared distance of the
    means added it is the squared 2-Wasserstein distance of Gaussians. Taken as the least
    ``|F_a - F_b Q|_F`` over orthogonal Q, ``S = F F'``, which does not cancel where a is near b.
    """
    a, b = (spectrum.factor(0.5) for spectrum in pair_of(a, b, 0.0, ("first", "second")))
    left, _, right = torch.linalg.svd(b.T @ a)
    return float((a - b @ (left @ right)).norm())


@one_thread
def blockwise(
    source: Tensor, target: Tensor, frame: Tensor, *, floor: float | None = None
) -> Tensor:
    """``A = U A_U U' + V A_V V'`` [D, D] float64, CORAL on each block (arXiv 2602.07026, App F).

    ``A_U = coral(U' S_y U, U' S_x U)`` with U = ``frame`` [D, q], orthonormal columns; V is its
    complement. The blocks of ``A S_y A'`` on U and on V are those of ``S_x``; what couples U to V
    is left as it comes. The floor is relative to the largest eigenvalue of each block.
    """
    wide_source, wide_target = (
        checked_covariance(source, "source"),
        checked_covariance(target, "target"),
    )
    expect_same_columns(source, target, ("source", "target"))
    u, floor = _checked_frame(frame, source), floor_of(source, floor)
    v = torch.linalg.qr(u, mode="complete").Q[:, u.shape[1] :]
    result, floored = torch.zeros_like(wide_source), 0
    for basis in (u, v) if v.shape[1] else (u,):
        y = spectrum_of(basis.T @ wide_source @ basis, floor, "source", source.dtype)
        x = spectrum_of(basis.T @ wide_target @ basis, 0.0, "target", target.dtype)
        result += basis @ (x.power(0.5) @ y.power(-0.5)) @ basis.T
        floored += y.floored
    warn_floored(floored, len(source), floor)
    return result


def _checked_frame(frame: Tensor, covariance: Tensor) -> Tensor:
    """U [D, q] in float64 with orthonormal columns."""
    shape, columns = list(frame.shape), len(covariance)
    if len(shape) != 2 or shape[0] != columns or not 1 <= shape[1] <= columns:
        raise ValueError(f"whiten: the frame is {shape}, expected [{columns}, q], q from 1 to D")
    wide = frame.detach().double()
    off = float((wide.T @ wide - torch.eye(shape[1]).to(wide)).abs().max())
    if not off <= torch.finfo(frame.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: U'U of the frame is off the identity by {off:.3g}; give orthonormal columns"
        )
    return wide
