"""Symmetric roots of a covariance: the one whitens, the other colours."""

from __future__ import annotations

from torch import Tensor

from .._one_thread import one_thread
from .eigen import floored_eigen, warn_floored


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
