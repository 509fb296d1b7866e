"""Cosines of matching rows, and of pairs of rows within one modality.

Rows are [N, D] of any floating dtype; cosines are float64. Rows that are too few, do not match or
are not finite are a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_numbers, expect_tensor
from ..ops.reference import unit
from .estimate import Estimate


def mean_cosine(a: Tensor, b: Tensor, block: int = 4096) -> Estimate:
    """Return the mean cosine of matching rows a, b [N, D]; it is Phi where b is a aligned."""
    check_pairs("mean_cosine", a, b)
    return Estimate.of_mean(torch.cat([_cosines(*pair) for pair in row_blocks(a, b, block)]))


def pairwise_cosines(rows: Tensor, pairs: int = 1 << 17, seed: int = 0, block: int = 512) -> Tensor:
    """Return the cosines [pairs] of pairs of different rows [N, D], drawn with replacement.

    The draw is uniform and depends on N, ``pairs`` and ``seed`` alone.
    """
    check_rows("pairwise_cosines", rows)
    expect_counts("pairwise_cosines", pairs=pairs)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(rows), (pairs,), generator=generator)
    second = torch.randint(len(rows) - 1, (pairs,), generator=generator)
    second += second >= first
    blocks = row_blocks(first.to(rows.device), second.to(rows.device), block)
    return torch.cat([_cosines(rows[i], rows[j]) for i, j in blocks])


def cosine_divergence(
    a: Tensor, b: Tensor, *, pairs: int = 1 << 17, bins: int = 100, seed: int = 0, block: int = 512
) -> Estimate:
    """Return the Jensen-Shannon divergence, in nats (0 to log 2), of densities of pairwise cosines.

    Each density is a histogram of :func:`pairwise_cosines` within a [N, D] or within b [M, D], in
    ``bins`` equal bins over [-1, 1]. The standard error is that of drawing the pairs from given
    rows (delta method). The divergence of two equal densities is about
    ``(occupied bins - 1) / (4 pairs)``, not 0, unless the same pairs are drawn from the same rows.
    """
    expect_counts("cosine_divergence", bins=bins)
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
    """Return Psi, the correlation of ``cos(a_i, a_j)`` and ``cos(b_i, b_j)`` over all i < j.

    It is Pearson's correlation. a, b [N, D] match row by row (their D may differ). Every pair is
    used, a tile of block x block at a time, so the cost is N^2 D / 2 products. The standard error
    is the jackknife's over rows: sums by row give the correlation without each row in turn.
    """
    check_pairs("cosine_correlation", a, b, min_rows=4, same_columns=False)
    expect_counts("cosine_correlation", block=block)
    count = len(a)
    sums = _cosine_sums(a, b, block)
    total = sums.sum(dim=1) / 2  # each pair stands in the sums of two rows
    value = _correlation(total, count * (count - 1) // 2)
    without = _correlation(total[:, None] - sums, (count - 1) * (count - 2) // 2)
    spread = (without - without.mean()).square().sum()
    return Estimate(float(value), float((spread * (count - 1) / count).sqrt()))


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines [N] of matching rows that were checked."""
    return (unit(a.double()) * unit(b.double())).sum(dim=1)


def _cosine_sums(a: Tensor, b: Tensor, block: int) -> Tensor:
    """Return [5, N], sums of p, q, pp, qq, pq over each row's pairs.

    p and q are cosines less the mean cosine of the first block, so that the sums do not cancel.
    """

    def _units(first: int) -> list[Tensor]:
        return [unit(rows[first : first + block].double()) for rows in (a, b)]

    sums = torch.zeros(5, len(a), dtype=torch.float64, device=a.device)
    shifts = [rows.mean(dim=0).square().sum() for rows in _units(0)]
    starts = range(0, len(a), block)
    for first in starts:
        first_units = _units(first)
        for second in starts[first // block :]:
            second_units = _units(second)
            p, q = (u @ v.T - m for u, v, m in zip(first_units, second_units, shifts, strict=True))
            if first == second:
                p.fill_diagonal_(0)
                q.fill_diagonal_(0)
            for index, tile in enumerate((p, q, p * p, q * q, p * q)):
                sums[index, first : first + block] += tile.sum(dim=1)
                if first != second:
                    sums[index, second : second + block] += tile.sum(dim=0)
    return sums


def _correlation(sums: Tensor, count: int) -> Tensor:
    """Return Pearson's correlation from the five sums over ``count`` pairs."""
    p, q, pp, qq, pq = sums.unbind()
    spread = (pp - p * p / count) * (qq - q * q / count)
    return ((pq - p * q / count) / spread.sqrt()).clamp(-1, 1)


def row_blocks(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over matching blocks of at most ``block`` rows of two tensors of equal length."""
    expect_counts("metrics", block=block)
    return zip(torch.split(a, block), torch.split(b, block), strict=True)


def check_pairs(
    name: str, a: Tensor, b: Tensor, min_rows: int = 2, same_columns: bool = True
) -> None:
    """Raise an error if rows cannot be matched one by one, or :func:`check_rows` refuses them."""
    for rows in (a, b):
        check_rows(name, rows, min_rows)
    if len(a) != len(b) or (same_columns and a.shape != b.shape):
        raise ValueError(
            f"{name}: expected rows that match one by one, got shapes {list(a.shape)} and "
            f"{list(b.shape)}; give both sides of the same pairs"
        )


def check_rows(name: str, rows: Tensor, min_rows: int = 2) -> None:
    """Raise an error if rows are no tensor [N, D], too few, or not finite; ``name`` begins it."""
    expect_tensor(name, rows)
    expect_numbers(name, rows)
    if rows.dim() != 2 or len(rows) < min_rows or not rows.shape[1]:
        raise ValueError(
            f"{name}: expected {min_rows} or more rows [N, D], got shape {list(rows.shape)}"
        )
    if not bool(torch.isfinite(rows).all()):
        bad_row = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise ValueError(
            f"{name}: row {bad_row} holds a NaN or an infinity, expected finite rows; leave it out"
        )
