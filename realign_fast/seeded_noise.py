"""The noise of C3, a baseline of arXiv 2602.07026, section 5: a function of the row and the seed.

The same row gets the same noise in any batch, shard or process. The generator is counter-based: a
row's bits are hashed to a key, the key and the column to two 64-bit words (SplitMix64's finaliser,
Steele, Lea and Flood, OOPSLA 2014), and those to a normal number by Box and Muller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ops import working_dtype
from .ops.reference import unit

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
_MASK_53 = (1 << 53) - 1


def noisy_rows(
    rows: Tensor, shift: Tensor, recentre: Tensor, sigma: Tensor, seed: Tensor
) -> Tensor:
    """Return ``unit(unit(u + b + sigma e) + h)`` of rows [N, D], with the noise e of C3.

    The result is float32, or float64 of float64 rows; a row that is not finite becomes NaN. It is
    differentiable in the rows, with e held fixed.
    """
    # Compiled loops of 64-bit hashing take minutes, so that a compiler sees one opaque op.
    noise_of = _noise_op if torch.compiler.is_compiling() else seeded_noise
    dtype = working_dtype(rows)
    x, finite = rows.to(dtype), torch.isfinite(rows).all(dim=1, keepdim=True)
    noise = noise_of(rows.detach(), seed).to(dtype)
    mapped = unit(unit(torch.where(finite, x, 0)) + shift.to(dtype) + sigma * noise)
    return torch.where(finite, unit(mapped + recentre.to(dtype)), torch.nan)


def seeded_noise(rows: Tensor, seed: Tensor | int) -> Tensor:
    """Return standard normal numbers [N, D] float64 that each row's bits and the seed determine."""
    columns = rows.shape[1]
    bits = rows.double().contiguous().view(torch.int64)  # exact for every dtype
    column = torch.arange(1, columns + 1, device=rows.device) * _GOLDEN
    key = _mixed(_mixed(bits + column).sum(dim=1) + _mixed(column[0] + seed))
    hashes = _mixed(key[:, None] + column), _mixed(key[:, None] - column)
    first, second = (((word >> 11) & _MASK_53).double() for word in hashes)
    radius = torch.sqrt(-2 * torch.log((first + 1) / 2**53))
    return radius * torch.cos(2 * math.pi * second / 2**53)


@torch.library.custom_op("realign_fast::seeded_noise", mutates_args=())
def _noise_op(rows: Tensor, seed: Tensor) -> Tensor:
    return seeded_noise(rows, seed)


@_noise_op.register_fake
def _empty_noise(rows: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(rows, dtype=torch.float64, memory_format=torch.contiguous_format)


def _mixed(word: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser to int64, whose products wrap, with unsigned shifts."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return word ^ ((word >> 31) & ((1 << 33) - 1))
