"""A covariance approximated by its leading eigenpairs and one number, for D in the thousands."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._one_thread import one_thread
from . import eigen

_BLOCKS = 32  # of rank/8 columns: the Krylov space has 4 directions for each requested one
_MIN_BLOCK_COLUMNS = 4  # for few directions of a flat spectrum
_EIGH_COLUMNS = 1024  # up to this D eigh takes less than a second


class LowRank(NamedTuple):
    """The approximation ``S ~ U diag(l) U' + rest (I - U U')`` by the leading eigenpairs.

    Rows are mapped by two products with U and no [D, D] matrix. ``rest`` is the mean of the
    remaining eigenvalues, as in probabilistic PCA (Tipping and Bishop, 1999).
    """

    values: Tensor  # [rank] float64, descending; 0 at or under the floor
    vectors: Tensor  # [D, rank] float64, orthonormal columns
    rest: float  # 0 at or under the floor, or where rank = D

    @classmethod
    @one_thread
    def of(
        cls, covariance: Tensor, rank: int, *, floor: float | None = None, seed: int = 0
    ) -> LowRank:
        """Return the leading ``rank`` eigenpairs of S [D, D].

        For a small D or a large rank they come from eigh, otherwise from a block Krylov space
        (Golub and Underwood, 1977) that starts from ``seed``: 4 rank products of S with a vector.
        Where the spectrum falls as ``i^-1/2`` or faster the eigenvalues are exact to 1e-6; in a
        bulk of noise the last come out low by up to a tenth, which ``rest`` makes up for.
        """
        checked, floor = eigen.checked_covariance(covariance), eigen.floor_of(covariance, floor)
        columns = len(checked)
        if not 1 <= rank <= columns:
            raise ValueError(f"whiten: rank={rank}, expected 1 to D = {columns}")
        if columns <= _EIGH_COLUMNS or rank > columns / 8:
            values, vectors, *_ = eigen.floored_eigen(covariance, 0.0)
            values, vectors = values[:rank], vectors[:, :rank]
        else:
            values, vectors = _leading_pairs(checked, rank, seed)
        tail = float(checked.trace() - values.sum()) / (columns - rank) if rank < columns else 0.0
        cut = floor * float(values[0])
        floored = int((values <= cut).sum()) + (columns - rank) * (tail <= cut)
        eigen.warn_floored(floored, columns, floor)
        return cls(values.where(values > cut, 0.0), vectors, tail if tail > cut else 0.0)

    def root(self, rows: Tensor) -> Tensor:
        """Send rows [N, D] through ``S^1/2``, in their dtype."""
        return self._power(rows, 0.5)

    def inverse_root(self, rows: Tensor) -> Tensor:
        """Send rows [N, D] through ``S^-1/2``, in their dtype, leaving zero directions out."""
        return self._power(rows, -0.5)

    def coral(self, rows: Tensor, target: LowRank) -> Tensor:
        """Send rows [N, D] of this covariance through ``S_x^1/2 S_y^-1/2``, S_x the target's."""
        return target.root(self.inverse_root(rows))

    def _power(self, rows: Tensor, exponent: float) -> Tensor:
        if rows.dim() != 2 or rows.shape[1] != len(self.vectors):
            raise ValueError(
                f"whiten: rows are {list(rows.shape)}, expected [N, {len(self.vectors)}], the "
                "columns of the covariance; use rows of the same encoder"
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        vectors = self.vectors.to(dtype)
        tail = self.rest**exponent if self.rest > 0 else 0.0
        inside = eigen.power_of(self.values, exponent) - tail
        wide = rows.to(dtype)
        mapped = torch.addmm(wide, (wide @ vectors) * inside.to(dtype), vectors.T, beta=tail)
        return mapped.to(rows.dtype)


def _leading_pairs(covariance: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return Ritz values [rank], descending, and vectors [D, rank] of a block Krylov space."""
    shape = len(covariance), max(math.ceil(rank / 8), _MIN_BLOCK_COLUMNS)
    generator = torch.Generator().manual_seed(seed)
    scale = float(covariance.diagonal().max())
    new = torch.zeros(shape, dtype=torch.float64, device=covariance.device)
    basis = new[:, :0]
    products = []
    for _ in range(_BLOCKS):
        # A little noise, from which the space grows on where it closes early (equal eigenvalues).
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(new.device)
        new = new + eigen.EPSILON * scale * noise
        for _ in range(2):  # one projection leaves rounding where the columns nearly vanish
            new = torch.linalg.qr(new - basis @ (basis.T @ new)).Q
        basis = torch.cat([basis, new], dim=1)
        products.append(new := (new.T @ covariance).T)  # the order in which GEMM is fastest
    values, rotation = torch.linalg.eigh(eigen.symmetric(basis.T @ torch.cat(products, dim=1)))
    return values[-rank:].flip(0), basis @ rotation[:, -rank:].flip(1)
