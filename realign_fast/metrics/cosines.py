"""Cosines of matching rows, and of pairs of rows within one modality.

Rows are [N, D] of any floating dtype; cosines are float64. Rows that are too few, do not match or
are not finite are a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_matrix, expect_pairs
from ..ops.reference import unit
from .estimate import Estimate


def mean_cosine(a: Tensor, b: Tensor, block: int = 4096) -> Estimate:
    """Return the mean cosine of matching rows a, b [N, D]; it is Phi where b is a aligned."""
    expect_pairs("mean_cosine", a, b)
    return Estimate.of_mean(torch.cat([_cosines(*pair) for pair in row_blocks(a, b, block)]))


def pairwise_cosines(rows: Tensor, pairs: int = 1 << 17, seed: int = 0, block: int = 512) -> Tensor:
    """Return the cosines [pairs] of pairs of different rows [N, D], drawn with replacement.

    The draw is uniform and depends on N, ``pairs`` and ``seed`` alone.
    """
    expect_matrix("pairwise_cosines", rows)
    expect_counts("pairwise_cosines", pairs=pairs)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(rows), (pairs,), generator=generator)
    second = torch.randint(len(rows) - 1, (pairs,), generator=generator)
    second += second >= first
    blocks = row_blocks(first.to(rows.device), second.to(rows.device), block)
    return torch.cat([_cosines(rows[i], rows[j]) for i, j in blocks])


def cosine_divergence(
    a: Tensor, b: Tensor, *, pairs: int = 1 << 17, bins: int = 100, seed: int = 0
) -> float:
    """Return the Jensen-Shannon divergence, in nats (0 to log 2), of densities of pairwise cosines.

    Each density is a histogram of :func:`pairwise_cosines` within a [N, D] or within b [M, D], in
    ``bins`` equal bins over [-1, 1]. For two equal densities it is about
    ``(occupied bins - 1) / (4 pairs)``, not 0.
    """
    expect_counts("cosine_divergence", bins=bins)
    drawn = (pairwise_cosines(rows, pairs, seed).clamp(-1, 1).cpu() for rows in (a, b))
    p, q = (torch.histc(cosines, bins, -1, 1) / pairs for cosines in drawn)
    middle, *ends = (torch.special.entr(share).sum() for share in ((p + q) / 2, p, q))
    return max(float(middle - sum(ends) / 2), 0.0)


def cosine_correlation(a: Tensor, b: Tensor, block: int = 2048) -> float:
    """Return Psi, Pearson's correlation of ``cos(a_i, a_j)`` and ``cos(b_i, b_j)`` over all i < j.

    a, b [N, D] match row by row (their D may differ). It takes N^2 D products and ``N block``
    cosines of memory.
    """
    expect_pairs("cosine_correlation", a, b, same_columns=False)
    expect_counts("cosine_correlation", block=block)
    sides = [unit(rows.double()) for rows in (a, b)]
    shifts = [rows.mean(dim=0).square().sum() for rows in sides]  # so that the sums do not cancel
    sums = torch.zeros(5, dtype=torch.float64, device=a.device)
    for i in range(0, len(a), block):
        tiles = (rows[i : i + block] @ rows[i:].T for rows in sides)
        p, q = ((tile - shift).triu(1) for tile, shift in zip(tiles, shifts, strict=True))
        sums += torch.stack([tile.sum() for tile in (p, q, p * p, q * q, p * q)])
    p, q, pp, qq, pq = sums
    pairs = len(a) * (len(a) - 1) // 2
    spread = (pp - p * p / pairs) * (qq - q * q / pairs)
    return float(((pq - p * q / pairs) / spread.sqrt()).clamp(-1, 1))


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines [N] of matching rows that were checked."""
    return (unit(a.double()) * unit(b.double())).sum(dim=1)


def row_blocks(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over matching blocks of at most ``block`` rows of two tensors of equal length."""
    expect_counts("metrics", block=block)
    return zip(torch.split(a, block), torch.split(b, block), strict=True)
