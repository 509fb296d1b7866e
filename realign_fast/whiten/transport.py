"""CORAL, optimal transport and blockwise: maps of covariances, and the Bures distance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
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


class AffineMap(NamedTuple):
    """The map ``A u + b`` of columns; rows [N, D] become ``rows @ matrix.T + offset``."""

    matrix: Tensor  # [D, D] float64, A
    offset: Tensor  # [D] float64, b


def affine_transport(
    means: tuple[Tensor, Tensor], covariances: tuple[Tensor, Tensor], *, floor: float | None = None
) -> AffineMap:
    """Return A of :func:`optimal_transport` and ``b = mu_x - A mu_y``: Gaussian to Gaussian.

    Pairs are (source, target), (y, x). A mean of another shape than [D] is a ValueError.
    """
    matrix = optimal_transport(*covariances, floor=floor)
    for name, mean in zip(("source", "target"), means, strict=True):
        expect_tensor("whiten", mean, f"the {name} mean")
        if mean.shape != matrix.shape[:1]:
            shape, columns = list(mean.shape), len(matrix)
            raise ValueError(
                f"whiten: the {name} mean is {shape}, expected [{columns}] as its covariance"
            )
    return AffineMap(matrix, means[1].to(matrix) - matrix @ means[0].to(matrix))


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


def squared_bures_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the squares of :func:`bures_distance` of [..., D, D], as [...] float64.

    The result is differentiable once. The gradient at ``S_a`` is ``I - A``, with A the optimal
    transport from a to b, so that repeated eigenvalues do no harm. At a covariance without full
    rank it is infinite, and a ValueError: add a ridge (``S + r I``) to it first.
    """
    for covariances in (a, b):
        expect_tensor("whiten", covariances, "covariances [..., D, D]")
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    pairs = (
        s.expand(*batch, *s.shape[-2:]).reshape(math.prod(batch), *s.shape[-2:]) for s in (a, b)
    )
    squares = [_squared_distance(*pair) for pair in zip(*pairs, strict=True)]
    return torch.cat([a.new_zeros(0, dtype=torch.float64), *squares]).reshape(batch)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared Bures distance of [D, D] as [1] float64, with its gradient."""
    value = a.new_tensor([bures_distance(a, b)], dtype=torch.float64).square()
    for s, other in ((a, b), (b, a)):
        if torch.is_grad_enabled() and s.requires_grad:
            if floored := floored_eigen(s, None).floored:
                raise ValueError(
                    f"whiten: {floored} of {len(s)} eigenvalues of a covariance are 0, where the "
                    "Bures distance has no gradient; add a ridge (S + r I), or use torch.no_grad()"
                )
            gradient = torch.eye(len(s)).to(s) - optimal_transport(s, other).to(s)
            value = value + (gradient * (s - s.detach())).sum()  # which is 0
    return value


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
