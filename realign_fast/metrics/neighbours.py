"""Nearest rows by cosine: mixing of two modalities, preserved neighbourhoods, retrieval."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._argument_checks import expect_tensor
from ..ops import working_dtype
from ..ops.reference import unit
from .cosines import check_pairs, check_rows, row_blocks
from .estimate import Estimate

SearchBackend = Literal["auto", "faiss", "torch"]
_TIE = 1e-12  # two float64 cosines that differ by less are one number, rounded differently


class Neighbours(NamedTuple):
    """The k nearest rows of a gallery, nearest first."""

    cosines: Tensor  # [N, k] float32, or float64 where the queries are
    indices: Tensor  # [N, k] int64, rows of the gallery


def nearest_rows(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    own: int | None = None,
    block: int = 4096,
    backend: SearchBackend = "auto",
) -> Neighbours:
    """Find the k rows of gallery [M, D] with the largest cosine, for each of queries [N, D].

    Args:
        own: the gallery row that is ``queries[0]``, ``queries[1]`` being the next and so on; a
            query is then no neighbour of itself. ``None``: the queries are no rows of the gallery.
        block: number of queries and of gallery rows that are compared at a time.
        backend: ``"faiss"`` (exact search, float32, on the CPU), ``"torch"``, or ``"auto"``: faiss
            where it is installed and the queries are on the CPU and not float64, else torch.

    Of rows with equal cosines (up to rounding) any may be taken.
    """
    _check_search(queries, gallery, k, own, backend)
    faiss = _faiss(backend, queries)
    if faiss is not None:
        return _faiss_nearest(faiss, queries, gallery, k, own, block)
    dtype = working_dtype(queries)
    blocks = []
    for first in range(0, len(queries), block):
        unit_queries = unit(queries[first : first + block].double()).to(dtype)
        own_row = None if own is None else own + first
        blocks.append(_torch_nearest(unit_queries, gallery, k, own_row, block))
    return Neighbours(*(torch.cat(tensors) for tensors in zip(*blocks, strict=True)))


def knn_mixing(
    a: Tensor, b: Tensor, k: int = 20, *, block: int = 4096, backend: SearchBackend = "auto"
) -> Estimate:
    """Return the mean share of rows of b among the k nearest of a row of a, in the union of both.

    a [N, D], b [M, D], unpaired; a row is no neighbour of itself. Two samples of one distribution
    mix at ``M / (N + M - 1)``. Swap the arguments for the other direction. The paper (arXiv
    2602.07026) gives no formula; this is the usual one. The standard error takes the rows of a as
    independent queries of a given union.
    """
    for rows in (a, b):
        expect_tensor("knn_mixing", rows)
    if len(a) < 2 or not 1 <= k < len(a) + len(b):
        raise ValueError(
            f"knn_mixing: got k = {k} with {len(a)} and {len(b)} rows, expected 2 or more rows and "
            "k below their sum; give more rows or a smaller k"
        )
    within = nearest_rows(a, a, min(k, len(a) - 1), own=0, block=block, backend=backend).cosines
    across = nearest_rows(a, b, min(k, len(b)), block=block, backend=backend).cosines
    nearest = torch.cat([within, across], dim=1).topk(k, dim=1).indices
    return Estimate.of_mean((nearest >= within.shape[1]).double().mean(dim=1))


def knn_overlap(
    a: Tensor, b: Tensor, k: int = 10, *, block: int = 4096, backend: SearchBackend = "auto"
) -> Estimate:
    """Return the mean share of the k nearest rows within a that are the k nearest within b too.

    a, b [N, D] match row by row (their D may differ). Unrelated rows have ``k / (N - 1)``. The
    standard error takes rows as independent.
    """
    check_pairs("knn_overlap", a, b, same_columns=False)
    nearest_a, nearest_b = (
        nearest_rows(rows, rows, k, own=0, block=block, backend=backend).indices for rows in (a, b)
    )
    shared = [
        (indices_a[:, :, None] == indices_b[:, None, :]).sum(dim=(1, 2))
        for indices_a, indices_b in row_blocks(nearest_a, nearest_b, block)
    ]
    return Estimate.of_mean(torch.cat(shared).double() / k)


def match_ranks(queries: Tensor, gallery: Tensor, block: int = 4096) -> Tensor:
    """Return the rank [N] int64, from 1, of each query's own row of the gallery; both are [N, D].

    Cosines are float64. A tie counts for the row: rank = 1 + number of strictly nearer rows.
    """
    check_pairs("match_ranks", queries, gallery, min_rows=1)
    ranks = torch.ones(len(queries), dtype=torch.int64, device=queries.device)
    for first in range(0, len(queries), block):
        unit_queries = unit(queries[first : first + block].double())
        own_rows = unit(gallery[first : first + block].double())
        own_cosines = (unit_queries * own_rows).sum(dim=1, keepdim=True)
        for gallery_block in torch.split(gallery, block):
            nearer = unit_queries @ unit(gallery_block.double()).T > own_cosines + _TIE
            ranks[first : first + block] += nearer.sum(dim=1)
    return ranks


def recall_at_k(queries: Tensor, gallery: Tensor, k: int, block: int = 4096) -> Estimate:
    """Return R@k, the share of queries [N, D] with their own gallery row among the k nearest.

    Ties count for the row (:func:`match_ranks`). The standard error is the binomial one,
    ``sqrt(p (1 - p) / N)``, over queries of a given gallery.
    """
    return recall_of(match_ranks(queries, gallery, block), k)


def recall_of(ranks: Tensor, k: int) -> Estimate:
    """Return R@k from the :func:`match_ranks` [N]."""
    if k < 1:
        raise ValueError(f"recall_at_k: k={k}, expected 1 or more")
    share = float((ranks <= k).double().mean())
    return Estimate(share, (share * (1 - share) / len(ranks)) ** 0.5)


def _check_search(
    queries: Tensor, gallery: Tensor, k: int, own: int | None, backend: SearchBackend
) -> None:
    """Raise an error if :func:`nearest_rows` cannot search with these arguments."""
    if backend not in (known := get_args(SearchBackend)):
        raise ValueError(f"nearest_rows: backend={backend!r} is none of {', '.join(known)}")
    for rows in (queries, gallery):
        check_rows("nearest_rows", rows, min_rows=0)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"nearest_rows: expected rows [N, D] and [M, D], got shapes {list(queries.shape)} and "
            f"{list(gallery.shape)}; embed both with one encoder"
        )
    candidates = len(gallery) - (own is not None)
    if not 1 <= k <= candidates:
        raise ValueError(
            f"nearest_rows: k is {k}, expected 1..{candidates}, the gallery rows that a query may "
            "have as neighbours; give more rows or a smaller k"
        )


def _torch_nearest(
    unit_queries: Tensor, gallery: Tensor, k: int, own: int | None, block: int
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of unit queries [n, D], a block of the gallery at a time."""
    count, device = len(unit_queries), unit_queries.device
    rows = torch.arange(count, device=device)
    cosines, indices = unit_queries.new_empty(count, 0), rows.new_empty(count, 0)
    for first in range(0, len(gallery), block):
        unit_gallery = unit(gallery[first : first + block].double()).to(unit_queries.dtype)
        tile = unit_queries @ unit_gallery.T
        if own is not None:
            column = rows + own - first
            inside = (column >= 0) & (column < len(unit_gallery))
            tile[rows[inside], column[inside]] = -torch.inf
        values, places = tile.topk(min(k, len(unit_gallery)), dim=1)
        candidates = torch.cat([cosines, values], dim=1)
        cosines, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        indices = torch.cat([indices, places + first], dim=1).gather(1, order)
    return cosines, indices


def _faiss_nearest(
    faiss: Any, queries: Tensor, gallery: Tensor, k: int, own: int | None, block: int
) -> Neighbours:
    """Find the k nearest rows with a flat inner-product index of faiss."""
    index = faiss.IndexFlatIP(gallery.shape[1])
    for gallery_block in torch.split(gallery, block):
        index.add(unit(gallery_block.double()).float().cpu().numpy())
    blocks = []
    for query_block in torch.split(queries, block):
        unit_queries = unit(query_block.double()).float().cpu().numpy()
        arrays = index.search(unit_queries, k + (own is not None))
        blocks.append([torch.from_numpy(array) for array in arrays])
    cosines, indices = (torch.cat(tensors) for tensors in zip(*blocks, strict=True))
    if own is not None:
        own_column = indices == torch.arange(own, own + len(queries))[:, None]
        own_column[:, -1] |= ~own_column.any(dim=1)  # more than k rows tie with the query
        cosines, indices = (tensor[~own_column].view(-1, k) for tensor in (cosines, indices))
    return Neighbours(cosines.to(queries.device), indices.to(queries.device))


def _faiss(backend: SearchBackend, queries: Tensor) -> Any:
    """Import faiss if the search is to use it; None if torch is."""
    if backend == "torch":
        return None
    if backend == "auto" and (queries.dtype == torch.float64 or queries.device.type != "cpu"):
        return None
    try:
        import faiss
    except ImportError as error:
        if backend == "auto":
            return None
        raise ImportError(
            "nearest_rows: backend='faiss' needs faiss; run `pip install faiss-cpu`, or take "
            "backend='torch'"
        ) from error
    return faiss
