"""Symmetric roots of a covariance, and matrices that whiten with it."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._one_thread import one_thread
from .eigen import floored_eigen, warn_floored

WhiteningKind = Literal["zca", "pca", "cholesky"]


class Whitening(NamedTuple):
    """A whitening matrix W and its inverse: ``W S W'`` is the identity above the floor."""

    matrix: Tensor  # [D, D] float64, W
    inverse: Tensor  # [D, D] float64; W^-1 W projects on the directions above the floor: I if all


@one_thread
def symmetric_root(covariance: Tensor) -> Tensor:
    """Return ``S^1/2``, the symmetric positive semidefinite root [D, D] float64 of S [D, D]."""
    return floored_eigen(covariance, 0.0).power(0.5)


@one_thread
def inverse_root(covariance: Tensor, *, floor: float | None = None) -> Tensor:
    """Return ``S^-1/2``, [D, D] float64 and symmetric; directions under the floor are left out."""
    eigen = floored_eigen(covariance, floor)
    warn_floored(eigen.floored, len(covariance), eigen.floor)
    return eigen.power(-0.5)


@one_thread
def whitening(
    covariance: Tensor, kind: WhiteningKind = "zca", *, floor: float | None = None
) -> Whitening:
    """Return a whitening matrix of S [D, D] and its inverse; with ``S = V L V'``, L descending:

    - ``"zca"``: ``W = V L^-1/2 V'``, symmetric, the one that moves rows least
    - ``"pca"``: ``W = L^-1/2 V'``, principal axes in order; W has zero rows under the floor
    - ``"cholesky"``: ``W = C^-1`` with ``S = C C'``, both lower triangular if nothing is left out

    (Kessy, Lewin and Strimmer, arXiv 1512.00809; they take the triangular factor of ``S^-1``.)
    """
    if kind not in get_args(WhiteningKind):
        raise ValueError(f"whiten: kind={kind!r} is none of {', '.join(get_args(WhiteningKind))}")
    eigen = floored_eigen(covariance, floor)
    warn_floored(eigen.floored, len(covariance), eigen.floor)
    if kind == "zca":
        return Whitening(eigen.power(-0.5), eigen.power(0.5))
    factor = eigen.factor(0.5)  # F [D, D], S = F F'
    if kind == "pca":
        return Whitening(eigen.factor(-0.5).T.contiguous(), factor)
    # F' = Q R makes C = R' and W = Q' W_pca, so that nothing small is inverted.
    q, r = torch.linalg.qr(factor.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    matrix, inverse = (q * sign).T @ eigen.factor(-0.5).T, r.T * sign
    return Whitening(matrix.tril() if eigen.floored == 0 else matrix, inverse)
