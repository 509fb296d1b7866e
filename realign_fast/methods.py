"""The family of maps ``unit(unit(A u + b) + h)``: which A, from the moments of both sides.

With ``b = mu_x - A mu_y`` every member sends mean to mean (y source, x target; arXiv 2602.07026,
section 4 and its appendix F for the block-wise one):

| method | A | shape | from |
|---|---|---|---|
| ``mean-shift`` | I | number | means |
| ``realign`` | ``sqrt(T_x / T_y)`` I | number | means and traces |
| ``diagonal`` | ratio of standard deviations | [D] | variances |
| ``coral`` | ``S_x^1/2 S_y^-1/2`` | [D, D] | covariances |
| ``optimal-transport`` | ``S_y^-1/2 (S_y^1/2 S_x S_y^1/2)^1/2 S_y^-1/2`` | [D, D] | covariances |
| ``blockwise`` | CORAL on U and on its complement V | [D, D] | covariances |
| ``noise`` | I, and Gaussian noise is added to ``u + b`` (C3) | number | means and traces |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import whiten
from .frame import FixedFrame
from .moments import Moments
from .ops.reference import unit

METHODS = (
    "realign",
    "mean-shift",
    "diagonal",
    "coral",
    "optimal-transport",
    "blockwise",
    "noise",
)
NEED_COVARIANCE = METHODS[2:6]
Shrinkage = float | str | None  # None, a number in [0, 1], "oas" or "ledoit-wolf"


def linear_part(
    method: str,
    source: Moments,
    target: Moments,
    *,
    shrinkage: Shrinkage = None,
    floor: float | None = None,
    energy: float = 0.9,
) -> Tensor:
    """A in float64: a number [], a diagonal [D] or a matrix [D, D].

    Args:
        shrinkage: of both covariances towards a multiple of I (:func:`whiten.shrinkage`).
        floor: eigenvalues below this share of the largest count as 0 (:mod:`whiten`).
        energy: share of the trace of ``S_x + S_y`` that U of the block-wise map holds.

    Raises:
        ValueError: an unknown method, or one that needs covariances of moments without them.
    """
    if method not in METHODS:
        raise ValueError(f"ReAlign: method={method!r} is none of {', '.join(METHODS)}")
    if method not in NEED_COVARIANCE:
        if shrinkage is not None or floor is not None:
            raise ValueError(
                f"ReAlign: shrinkage and floor are of covariances, and method={method!r} has "
                f"none; leave them out, or choose one of {', '.join(NEED_COVARIANCE)}"
            )
        scale = math.sqrt(target.trace / source.trace) if method == "realign" else 1.0
        return torch.tensor(scale, dtype=torch.float64)
    for name, moments in (("source", source), ("target", target)):
        if not moments.with_covariance:
            raise ValueError(
                f"ReAlign: method={method!r} needs covariances, the {name} moments have none; "
                "measure with Moments(covariance=True)"
            )
    s_y, s_x = (_shrunk(side, shrinkage) for side in (source, target))
    if method == "diagonal":
        variance = s_y.diagonal().double()
        least = (whiten.default_floor(s_y) if floor is None else floor) * variance.max()
        ratio = s_x.diagonal().double() / torch.where(variance > least, variance, torch.inf)
        return ratio.clamp(min=0).sqrt()
    if method == "blockwise":
        frame = FixedFrame.fit(source, target, energy=energy)
        return whiten.blockwise(s_y, s_x, frame.principal.cpu(), floor=floor)
    make = whiten.coral if method == "coral" else whiten.optimal_transport
    return make(s_y, s_x, floor=floor)


def _shrunk(side: Moments, shrinkage: Shrinkage) -> Tensor:
    """A covariance on the CPU, in the dtype of its precision unless shrinkage gave it a floor."""
    covariance = side.rounded_covariance.cpu()
    if shrinkage is None or shrinkage == 0:
        return covariance
    return whiten.shrink(covariance, shrinkage, count=side.count, mean=side.mean.cpu())


def noisy_rows(rows: Tensor, shift: Tensor, recentre: Tensor, sigma: float, seed: int) -> Tensor:
    """``unit(unit(u + b + sigma e) + h)`` of rows [N, D], float32 or (float64 rows) float64.

    C3, the baseline of the paper's section 5. The noise e is a function of the row and the seed:
    the same row gets the same noise in any batch, shard or process.
    """
    if torch.compiler.is_compiling():  # 64-bit integer hashing in a compiled loop takes minutes
        return torch.compiler.disable(_noisy_rows)(rows, shift, recentre, sigma, seed)
    return _noisy_rows(rows, shift, recentre, sigma, seed)


def _noisy_rows(rows: Tensor, shift: Tensor, recentre: Tensor, sigma: float, seed: int) -> Tensor:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    x, finite = rows.to(wide), torch.isfinite(rows).all(dim=1, keepdim=True)
    noise = seeded_noise(rows, seed).to(wide)
    out = unit(unit(torch.where(finite, x, 0)) + shift.to(wide) + sigma * noise)
    return torch.where(finite, unit(out + recentre.to(wide)), torch.nan)


def seeded_noise(rows: Tensor, seed: int) -> Tensor:
    """Standard normal numbers [N, D] float64 that depend on each row's bits and the seed alone.

    A counter-based generator: the row's bits are hashed to a key, key and column to two 64-bit
    words (SplitMix64's finaliser), and those to a normal number by Box and Muller.
    """
    columns = rows.shape[1]
    bits = rows.double().contiguous().view(torch.int64)  # exact for every dtype
    column = torch.arange(1, columns + 1, device=rows.device) * _GOLDEN
    key = _mixed(_mixed(bits + column).sum(dim=1) + _mixed(column.new_tensor(seed) + column[0]))
    words = _mixed(key[:, None] + column), _mixed(key[:, None] - column)
    first, second = (((word >> 11) & _MASK_53).double() for word in words)
    radius = torch.sqrt(-2 * torch.log((first + 1) / 2**53))
    return radius * torch.cos(2 * math.pi * second / 2**53)


_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
_MASK_53 = (1 << 53) - 1


def _mixed(word: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap and whose shifts are made unsigned."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return word ^ ((word >> 31) & ((1 << 33) - 1))
