"""Symmetric roots of a covariance, and matrices that whiten with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._one_thread import one_thread
from .eigen import spectrum_of, warn_floored


class Whitening(NamedTuple):
    """``matrix @ S @ matrix.T`` is the identity on the directions that were kept."""

    matrix: Tensor  # [D, D] float64, W
    inverse: Tensor  # [D, D] float64, W^-1; W^-1 W projects on what was kept: I if all were


@one_thread
def symmetric_root(covariance: Tensor) -> Tensor:
    """``S^1/2``, the symmetric positive semidefinite root [D, D] float64 of S [D, D]."""
    return spectrum_of(covariance, 0.0).power(0.5)


@one_thread
def inverse_root(covariance: Tensor, *, floor: float | None = None) -> Tensor:
    """``S^-1/2``, [D, D] float64 and symmetric; directions under the floor are left out."""
    spectrum = spectrum_of(covariance, floor)
    warn_floored(spectrum.floored, len(covariance), spectrum.floor)
    return spectrum.power(-0.5)


@one_thread
def whitening(covariance: Tensor, kind: str = "zca", *, floor: float | None = None) -> Whitening:
    """A whitening matrix of S [D, D] and its inverse; with ``S = V L V'``, L descending:

    - ``"zca"``: ``W = V L^-1/2 V'``, symmetric, the one that moves rows least
    - ``"pca"``: ``W = L^-1/2 V'``, principal axes in order; rows of W that were left out are zero
    - ``"cholesky"``: ``W = C^-1`` with ``S = C C'``, both lower triangular if nothing is left out

    (Kessy, Lewin and Strimmer, arXiv 1512.00809; they take the triangular factor of ``S^-1``.)
    """
    if kind not in ("zca", "pca", "cholesky"):
        raise ValueError(f"whiten: kind={kind!r} is none of zca, pca, cholesky")
    spectrum = spectrum_of(covariance, floor)
    warn_floored(spectrum.floored, len(covariance), spectrum.floor)
    if kind == "zca":
        return Whitening(spectrum.power(-0.5), spectrum.power(0.5))
    factor = spectrum.factor(0.5)  # F [D, D], S = F F'
    if kind == "pca":
        return Whitening(spectrum.factor(-0.5).T.contiguous(), factor)
    # F' = Q R makes C = R' and W = Q' W_pca, with no inverse taken of anything small.
    q, r = torch.linalg.qr(factor.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    matrix, inverse = (q * sign).T @ spectrum.factor(-0.5).T, r.T * sign
    full = spectrum.floored == 0
    return Whitening(matrix.tril() if full else matrix, inverse)
