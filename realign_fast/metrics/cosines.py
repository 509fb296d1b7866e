"""Cosines of matching rows, and of pairs of rows within a modality.

Rows are [N, D] of any floating dtype; cosines are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.reference import unit
from .estimate import Estimate


def matched_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of matching rows: a, b [N, D] -> [N] float64."""
    return (unit(a.double()) * unit(b.double())).sum(dim=1)


def mean_cosine(a: Tensor, b: Tensor, block: int = 4096) -> Estimate:
    """Mean cosine of matching rows a, b [N, D]: Phi, where b is a aligned.

    Raises:
        ValueError: rows that do not match, fewer than two, or not finite.
    """
    checked_pairs("mean_cosine", a, b)
    parts = zip(a.split(block), b.split(block), strict=True)
    return Estimate.of_mean(torch.cat([matched_cosine(*part) for part in parts]))


def pairwise_cosines(rows: Tensor, pairs: int = 1 << 17, seed: int = 0, block: int = 512) -> Tensor:
    """Cosines [pairs] of pairs of different rows [N, D], drawn uniformly with replacement.

    The draw depends on N, ``pairs`` and ``seed`` alone: corpora with as many rows give the pairs of
    the same places.

    Raises:
        ValueError: fewer than two rows, or rows that are not finite.
    """
    _check_rows("pairwise_cosines", rows)
    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(len(rows), (pairs,), generator=generator)
    two = torch.randint(len(rows) - 1, (pairs,), generator=generator)
    two += two >= one
    parts = zip(one.to(rows.device).split(block), two.to(rows.device).split(block), strict=True)
    return torch.cat([matched_cosine(rows[i], rows[j]) for i, j in parts])


def cosine_divergence(
    a: Tensor,
    b: Tensor,
    *,
    pairs: int = 1 << 17,
    bins: int = 100,
    seed: int = 0,
    block: int = 512,
) -> Estimate:
    """Jensen-Shannon divergence, in nats (0 to log 2), of two densities of pairwise cosines.

    Each density is a histogram of :func:`pairwise_cosines` within a [N, D] or within b [M, D], in
    ``bins`` equal bins over [-1, 1]. The standard error is that of drawing the pairs, the rows
    being given (delta method); of two equal densities the divergence is about
    ``(occupied bins - 1) / (4 pairs)``, not 0, unless the same pairs are drawn from the same rows.
    """
    shares = []
    for rows in (a, b):
        cosines = pairwise_cosines(rows, pairs, seed, block).clamp(-1, 1)
        shares.append(torch.histc(cosines.cpu(), bins, -1, 1) / pairs)
    middle = (shares[0] + shares[1]) / 2
    value = variance = 0.0
    for share in shares:
        half_log = torch.where(share > 0, (share / middle).log() / 2, 0)  # the slope in the share
        mean = (share * half_log).sum()
        value += float(mean)
        variance += float((share * (half_log - mean).square()).sum()) / pairs
    return Estimate(max(value, 0.0), variance**0.5)


def cosine_correlation(a: Tensor, b: Tensor, block: int = 2048) -> Estimate:
    """Psi: Pearson correlation, over all pairs i < j, of ``cos(a_i, a_j)`` and ``cos(b_i, b_j)``.

    a, b [N, D] match row by row (their D may differ). Every pair is used, a tile of block x block
    at a time, so the cost is N^2 D / 2 products. The standard error is the jackknife's over rows:
    the same sums, kept by row, give the correlation without each row in turn.

    Raises:
        ValueError: other than as many rows on both sides, fewer than four, or not finite.
    """
    checked_pairs("cosine_correlation", a, b, least=4, columns=False)
    count = len(a)
    sums = _cosine_sums(a, b, block)
    total = sums.sum(dim=1) / 2  # each pair stands in the sums of two rows
    value = _correlation(total, count * (count - 1) // 2)
    without = _correlation(total[:, None] - sums, (count - 1) * (count - 2) // 2)
    spread = (without - without.mean()).square().sum()
    return Estimate(float(value), float((spread * (count - 1) / count).sqrt()))


def _cosine_sums(a: Tensor, b: Tensor, block: int) -> Tensor:
    """[5, N] sums of p, q, pp, qq, pq over each row's pairs; p, q cosines less a common number."""
    sums = torch.zeros(5, len(a), dtype=torch.float64, device=a.device)
    shifts = [_mean_pair_cosine(rows, block) for rows in (a, b)]
    starts = range(0, len(a), block)
    for first in starts:
        left = [unit(rows[first : first + block].double()) for rows in (a, b)]
        for second in starts[first // block :]:
            right = [unit(rows[second : second + block].double()) for rows in (a, b)]
            p, q = (u @ v.T - m for u, v, m in zip(left, right, shifts, strict=True))
            if first == second:
                p.fill_diagonal_(0)
                q.fill_diagonal_(0)
            for index, tile in enumerate((p, q, p * p, q * q, p * q)):
                sums[index, first : first + block] += tile.sum(dim=1)
                if first != second:
                    sums[index, second : second + block] += tile.sum(dim=0)
    return sums


def _mean_pair_cosine(rows: Tensor, block: int) -> float:
    total = sum(unit(part.double()).sum(dim=0) for part in rows.split(block))
    return float(total.square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))


def _correlation(sums: Tensor, count: int) -> Tensor:
    p, q, pp, qq, pq = sums
    spread = (pp - p * p / count) * (qq - q * q / count)
    return ((pq - p * q / count) / spread.sqrt()).clamp(-1, 1)


def checked_pairs(name: str, a: Tensor, b: Tensor, least: int = 2, columns: bool = True) -> None:
    """Refuse rows that cannot be matched one by one."""
    for rows in (a, b):
        _check_rows(name, rows, least)
    if len(a) != len(b) or (columns and a.shape != b.shape):
        raise ValueError(
            f"{name}: expected rows that match one by one, got shapes {list(a.shape)} and "
            f"{list(b.shape)}; give both sides of the same pairs"
        )


def _check_rows(name: str, rows: Tensor, least: int = 2) -> None:
    if rows.dim() != 2 or len(rows) < least:
        raise ValueError(
            f"{name}: expected {least} or more rows [N, D], got shape {list(rows.shape)}"
        )
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(
            f"{name}: row {bad} holds a NaN or an infinity, expected finite rows; leave it out"
        )
