"""Nearest rows by cosine: mixing of two modalities, and preserved neighbourhoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_matrix, expect_one_width, expect_pairs
from ..ops import working_dtype
from ..ops.reference import unit
from .cosines import row_blocks
from .estimate import Estimate


class Neighbours(NamedTuple):
    """The k nearest rows of a gallery, nearest first."""

    cosines: Tensor  # [N, k] float32, or float64 where the queries are
    indices: Tensor  # [N, k] int64, rows of the gallery


@torch.no_grad()
def nearest_rows(
    queries: Tensor, gallery: Tensor, k: int, *, own: int | None = None, block: int = 4096
) -> Neighbours:
    """Find the k rows of gallery [M, D] with the largest cosine, for each of queries [N, D].

    Args:
        own: the gallery row that is ``queries[0]``, ``queries[1]`` being the next and so on; a
            query is then no neighbour of itself. ``None``: the queries are no rows of the gallery.
        block: number of queries and of gallery rows that are compared at a time.

    Of rows with equal cosines (up to rounding) any may be taken.
    """
    for rows in (queries, gallery):
        expect_matrix("nearest_rows", rows, min_rows=0)
    expect_counts("nearest_rows", k=k, block=block)
    sides = ("a query", queries.shape[1]), ("a row of the gallery", gallery.shape[1])
    expect_one_width("nearest_rows", *sides)
    candidates = len(gallery) - (own is not None)
    if not 1 <= k <= candidates:
        raise ValueError(
            f"nearest_rows: k is {k}, expected 1..{candidates}, the gallery rows that a query may "
            "have as neighbours; give more rows or a smaller k"
        )

    def prepare(rows: Tensor) -> Tensor:
        """Return unit rows, computed in float64, of the dtype in which cosines are compared."""
        return unit(rows.double()).to(working_dtype(queries))

    blocks = []
    for first in range(0, len(queries), block):
        part = prepare(queries[first : first + block])
        numbers = torch.arange(first, first + len(part), device=part.device)
        skipped = None if own is None else numbers + own
        nearest = search_blocks(part, gallery, k, skipped, prepare, block=block)
        blocks.append(nearest[:2])
    return Neighbours(*(torch.cat(tensors) for tensors in zip(*blocks, strict=True)))


def knn_mixing(a: Tensor, b: Tensor, k: int = 20, *, block: int = 4096) -> Estimate:
    """Return the mean share of rows of b among the k nearest of a row of a, in the union of both.

    a [N, D], b [M, D], unpaired; a row is no neighbour of itself. Two samples of one distribution
    mix at ``M / (N + M - 1)``. Swap the arguments for the other direction. The paper (arXiv
    2602.07026) gives no formula; this is the usual one. The standard error takes the rows of a as
    independent queries of a given union.
    """
    for rows in (a, b):
        expect_matrix("knn_mixing", rows, min_rows=1)
    if len(a) < 2 or not 1 <= k < len(a) + len(b):
        raise ValueError(
            f"knn_mixing: got k = {k} with {len(a)} and {len(b)} rows, expected 2 or more rows and "
            "k below their sum; give more rows or a smaller k"
        )
    within = nearest_rows(a, a, min(k, len(a) - 1), own=0, block=block).cosines
    across = nearest_rows(a, b, min(k, len(b)), block=block).cosines
    nearest = torch.cat([within, across], dim=1).topk(k, dim=1).indices
    return Estimate.of_mean((nearest >= within.shape[1]).double().mean(dim=1))


def knn_overlap(a: Tensor, b: Tensor, k: int = 10, *, block: int = 4096) -> Estimate:
    """Return the mean share of the k nearest rows within a that are the k nearest within b too.

    a, b [N, D] match row by row (their D may differ). Unrelated rows have ``k / (N - 1)``. The
    standard error takes rows as independent.
    """
    expect_pairs("knn_overlap", a, b, same_columns=False)
    nearest_a, nearest_b = (
        nearest_rows(rows, rows, k, own=0, block=block).indices for rows in (a, b)
    )
    shared = [
        (indices_a[:, :, None] == indices_b[:, None, :]).sum(dim=(1, 2))
        for indices_a, indices_b in row_blocks(nearest_a, nearest_b, block)
    ]
    return Estimate.of_mean(torch.cat(shared).double() / k)


def search_blocks(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    skipped: Tensor | None,
    prepare: Callable[[Tensor], Tensor],
    limits: Tensor | None = None,
    block: int = 4096,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search a gallery [M, D] by inner product for queries [n, D], a block of it at a time.

    ``prepare`` maps a block to the rows that are compared; a query leaves out its row in
    ``skipped`` [n]. Return the k largest scores [n, k], descending, the numbers [n, k] of their
    rows, and how many rows [n] score above ``limits`` [n].
    """
    rows = torch.arange(len(queries), device=queries.device)
    scores, numbers = queries.new_empty(len(queries), 0), rows[:, None][:, :0]
    above = torch.zeros_like(rows)
    for first in range(0, len(gallery), block):
        tile = queries @ prepare(gallery[first : first + block]).T
        if skipped is not None:
            columns = skipped - first
            inside = (columns >= 0) & (columns < tile.shape[1])
            tile[rows[inside], columns[inside]] = -torch.inf
        if limits is not None:
            above += (tile > limits[:, None]).sum(dim=1)
        values, places = tile.topk(min(k, tile.shape[1]), dim=1)
        candidates = torch.cat([scores, values], dim=1)
        scores, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        numbers = torch.cat([numbers, places + first], dim=1).gather(1, order)
    return scores, numbers, above
