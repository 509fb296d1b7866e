"""Roots of covariances, and maps made of them: CORAL, optimal transport and blockwise."""

from __future__ import annotations

import torch
from torch import Tensor

from .._argument_checks import expect_tensor
from .._one_thread import one_thread, product
from .eigen import (
    checked_covariance,
    floor_of,
    floored_eigen,
    floored_eigen_pair,
    symmetric,
    warn_floored,
)


@one_thread
def symmetric_root(covariance: Tensor) -> Tensor:
    """Return ``S^1/2``, the symmetric positive semidefinite root [D, D] float64 of S [D, D]."""
    return floored_eigen(covariance, 0.0).power(0.5)


@one_thread
def inverse_root(covariance: Tensor, *, floor: float | None = None) -> Tensor:
    """Return ``W = S^-1/2``, [D, D] float64 and symmetric; directions under the floor are left out.

    W is the whitening matrix that moves rows least (ZCA; Kessy, Lewin and Strimmer, arXiv
    1512.00809): ``W S W'`` is the identity above the floor.
    """
    eigen = floored_eigen(covariance, floor)
    warn_floored(eigen.floored, len(covariance), eigen.floor)
    return eigen.power(-0.5)


@one_thread
def coral(source: Tensor, target: Tensor, *, floor: float | None = None) -> Tensor:
    """Return ``A = S_x^1/2 S_y^-1/2`` [D, D], so that ``A S_y A' = S_x`` (source y, target x)."""
    y, x = floored_eigen_pair(source, target, floor)
    warn_floored(y.floored, len(source), y.floor)
    return product(x.power(0.5), y.power(-0.5))


@one_thread
def optimal_transport(source: Tensor, target: Tensor, *, floor: float | None = None) -> Tensor:
    """Return the symmetric positive semidefinite A [D, D] float64 with ``A S_y A' = S_x``.

    ``A = S_y^-1/2 (S_y^1/2 S_x S_y^1/2)^1/2 S_y^-1/2``, the map of least mean squared displacement
    between Gaussians (Knott and Smith, 1984). It is computed from singular values, which keep the
    digits that forming the product would lose at a large condition number.
    """
    y, x = floored_eigen_pair(source, target, floor)
    warn_floored(y.floored, len(source), y.floor)
    _, singular, right = torch.linalg.svd(product(x.factor(0.5).T, y.factor(0.5)))
    root = product(y.factor(-0.5), right.T) * singular.sqrt()
    return symmetric(product(root, root.T))


@one_thread
def bures_distance(a: Tensor, b: Tensor) -> float:
    """Return the Bures distance of covariances [D, D], not squared: a metric.

    ``d^2 = tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2``; with the squared distance of the
    means added it is the squared 2-Wasserstein distance of Gaussians. It is computed as the least
    ``|F_a - F_b Q|_F`` over orthogonal Q, ``S = F F'``, which does not cancel where a is near b.
    """
    f_a, f_b = (eigen.factor(0.5) for eigen in floored_eigen_pair(a, b, 0.0, ("first", "second")))
    left_vectors, _, right_vectors = torch.linalg.svd(product(f_b.T, f_a))
    return float((f_a - product(f_b, product(left_vectors, right_vectors))).norm())


@one_thread
def blockwise(
    source: Tensor, target: Tensor, frame: Tensor, *, floor: float | None = None
) -> Tensor:
    """Return ``A = U A_U U' + V A_V V'``, CORAL on each block (arXiv 2602.07026, App F).

    ``A_U = coral(U' S_y U, U' S_x U)`` with U = ``frame`` [D, q], orthonormal columns; V is its
    complement. The blocks of ``A S_y A'`` on U and on V are those of ``S_x``; the block that
    couples U to V is not matched. The floor is a share of the largest eigenvalue of each block; a
    block that is rounding of the whole covariance counts as zero.
    """
    columns = len(checked_covariance(source, "source"))
    expect_tensor("whiten", frame, "the frame")
    shape = list(frame.shape)
    if len(shape) != 2 or shape[0] != columns or not 1 <= shape[1] <= columns:
        raise ValueError(f"whiten: the frame is {shape}, expected [{columns}, q], q from 1 to D")
    u = frame.detach().double()
    deviation = float((u.T @ u - torch.eye(shape[1]).to(u)).abs().max())
    if not deviation <= torch.finfo(frame.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: U'U of the frame is off the identity by {deviation:.3g}; give orthonormal "
            "columns"
        )
    v = torch.linalg.qr(u, mode="complete").Q[:, u.shape[1] :]
    result, floored = torch.zeros_like(u @ u.T), 0
    for basis in (u, v) if v.shape[1] else (u,):
        y, x = floored_eigen_pair(source, target, floor, basis=basis)
        result += basis @ (x.power(0.5) @ y.power(-0.5)) @ basis.T
        floored += y.floored
    warn_floored(floored, columns, floor_of(source, floor))
    return result
