"""Nearest rows by cosine: mixing of two modalities, kept neighbourhoods, retrieval."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.reference import unit
from .cosines import checked_pairs
from .estimate import Estimate

ENGINES = ("auto", "faiss", "torch")
_TIE = 1e-12  # two float64 cosines nearer than this are the same number, rounded differently


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
    engine: str = "auto",
) -> Neighbours:
    """The k rows of gallery [M, D] with the largest cosine, for each of queries [N, D].

    Args:
        own: the gallery row that is ``queries[0]``, ``queries[1]`` being the next and so on; a
            query is then no neighbour of itself. ``None``: the queries are no rows of the gallery.
        block: queries and gallery rows taken at a time; a tile of block x block is held.
        engine: ``"faiss"`` (exact search, float32, on the CPU), ``"torch"``, or ``"auto"``: faiss
            where it is installed and the queries are on the CPU and not float64, else torch.

    Of rows with equal cosines (up to rounding) any may be taken.

    Raises:
        ValueError: columns that differ, or fewer gallery rows than k.
        ImportError: ``engine="faiss"`` without faiss.
    """
    _check_search(queries, gallery, k, own, engine)
    faiss = _faiss(engine, queries)
    if faiss is not None:
        return _faiss_nearest(faiss, queries, gallery, k, own, block)
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    found = []
    for first in range(0, len(queries), block):
        part = unit(queries[first : first + block].double()).to(dtype)
        found.append(_torch_nearest(part, gallery, k, None if own is None else own + first, block))
    return Neighbours(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))


def knn_mixing(
    a: Tensor, b: Tensor, k: int = 20, *, block: int = 4096, engine: str = "auto"
) -> Estimate:
    """Mean share of rows of b among the k nearest of a row of a, in the union of both.

    a [N, D], b [M, D], unpaired; a row is no neighbour of itself. Two samples of one distribution
    mix at ``M / (N + M - 1)``. For the other way round swap the arguments. The paper (arXiv
    2602.07026) gives no formula; this is the usual one. The standard error takes the rows of a as
    independent queries of a given union.
    """
    if len(a) < 2 or not 1 <= k < len(a) + len(b):
        raise ValueError(
            f"knn_mixing: got k = {k} with {len(a)} and {len(b)} rows, expected 2 or more rows and "
            "k below their sum; give more rows or a smaller k"
        )
    options = {"block": block, "engine": engine}
    same = nearest_rows(a, a, min(k, len(a) - 1), own=0, **options).cosines
    other = nearest_rows(a, b, min(k, len(b)), **options).cosines
    nearest = torch.cat([same, other], dim=1).topk(k, dim=1).indices
    return Estimate.of_mean((nearest >= same.shape[1]).double().mean(dim=1))


def knn_overlap(
    a: Tensor, b: Tensor, k: int = 10, *, block: int = 4096, engine: str = "auto"
) -> Estimate:
    """Mean share of the k nearest rows within a that are the k nearest within b too.

    a, b [N, D] match row by row (source and aligned, say; their D may differ). 1 where every
    neighbourhood is kept, ``k / (N - 1)`` for unrelated rows. The standard error takes rows as
    independent.
    """
    checked_pairs("knn_overlap", a, b, columns=False)
    found = [
        nearest_rows(rows, rows, k, own=0, block=block, engine=engine).indices for rows in (a, b)
    ]
    shared = [
        (one[:, :, None] == two[:, None, :]).sum(dim=(1, 2))
        for one, two in zip(*(indices.split(block) for indices in found), strict=True)
    ]
    return Estimate.of_mean(torch.cat(shared).double() / k)


def match_ranks(queries: Tensor, gallery: Tensor, block: int = 4096) -> Tensor:
    """Rank [N] int64, from 1, of each query's own row of the gallery; both [N, D], float64 inside.

    A tie counts for the row: rank = 1 + number of gallery rows that are strictly nearer.
    """
    checked_pairs("match_ranks", queries, gallery, least=1)
    ranks = torch.ones(len(queries), dtype=torch.int64, device=queries.device)
    for first in range(0, len(queries), block):
        part = unit(queries[first : first + block].double())
        own = (part * unit(gallery[first : first + block].double())).sum(dim=1, keepdim=True)
        for some in gallery.split(block):
            nearer = part @ unit(some.double()).T > own + _TIE
            ranks[first : first + block] += nearer.sum(dim=1)
    return ranks


def recall_at_k(queries: Tensor, gallery: Tensor, k: int, block: int = 4096) -> Estimate:
    """R@k: share of queries [N, D] whose own row of gallery [N, D] is among the k nearest (cosine).

    Ties count for the row (:func:`match_ranks`). The standard error is the binomial one,
    ``sqrt(p (1 - p) / N)``, over queries, the gallery being given.
    """
    return recall_of(match_ranks(queries, gallery, block), k)


def recall_of(ranks: Tensor, k: int) -> Estimate:
    """R@k from the :func:`match_ranks` [N]."""
    if k < 1:
        raise ValueError(f"recall_at_k: k={k}, expected 1 or more")
    share = float((ranks <= k).double().mean())
    return Estimate(share, (share * (1 - share) / len(ranks)) ** 0.5)


def _check_search(queries: Tensor, gallery: Tensor, k: int, own: int | None, engine: str) -> None:
    if engine not in ENGINES:
        raise ValueError(f"nearest_rows: engine={engine!r} is none of {', '.join(ENGINES)}")
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"nearest_rows: expected rows [N, D] and [M, D], got shapes {list(queries.shape)} and "
            f"{list(gallery.shape)}; embed both with one encoder"
        )
    most = len(gallery) - (own is not None)
    if not 1 <= k <= most:
        raise ValueError(
            f"nearest_rows: k is {k}, expected 1..{most}, the gallery rows a query may have as "
            "neighbours; give more rows or a smaller k"
        )
    if not bool(torch.isfinite(queries).all()) or not bool(torch.isfinite(gallery).all()):
        raise ValueError("nearest_rows: a row holds a NaN or an infinity; leave such rows out")


def _torch_nearest(
    part: Tensor, gallery: Tensor, k: int, own: int | None, block: int
) -> tuple[Tensor, Tensor]:
    """The k nearest of unit queries [n, D], a block of the gallery at a time."""
    cosines = part.new_empty(len(part), 0)
    indices = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
    rows = torch.arange(len(part), device=part.device)
    for first in range(0, len(gallery), block):
        some = unit(gallery[first : first + block].double()).to(part.dtype)
        tile = part @ some.T
        if own is not None:
            column = rows + own - first
            inside = (column >= 0) & (column < len(some))
            tile[rows[inside], column[inside]] = -torch.inf
        values, places = tile.topk(min(k, len(some)), dim=1)
        cosines = torch.cat([cosines, values], dim=1)
        indices = torch.cat([indices, places + first], dim=1)
        cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return cosines, indices


def _faiss_nearest(
    faiss: ModuleType, queries: Tensor, gallery: Tensor, k: int, own: int | None, block: int
) -> Neighbours:
    """:func:`nearest_rows` by a flat inner-product index."""
    index = faiss.IndexFlatIP(gallery.shape[1])
    for some in gallery.split(block):
        index.add(unit(some.double()).float().cpu().numpy())
    found = []
    for part in queries.split(block):
        rows = unit(part.double()).float().cpu().numpy()
        found.append([torch.from_numpy(got) for got in index.search(rows, k + (own is not None))])
    cosines, indices = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    if own is not None:
        itself = indices == torch.arange(own, own + len(queries))[:, None]
        itself[:, -1] |= ~itself.any(dim=1)  # more than k rows tie with the query
        cosines, indices = (tensor[~itself].view(-1, k) for tensor in (cosines, indices))
    return Neighbours(cosines.to(queries.device), indices.to(queries.device))


def _faiss(engine: str, queries: Tensor) -> ModuleType | None:
    """The faiss module where the search is to use it."""
    if engine == "torch":
        return None
    if engine == "auto" and (queries.dtype == torch.float64 or queries.device.type != "cpu"):
        return None
    try:
        import faiss
    except ImportError as error:
        if engine == "auto":
            return None
        raise ImportError(
            "nearest_rows: engine='faiss' needs faiss; run `pip install faiss-cpu`, or take "
            "engine='torch'"
        ) from error
    return faiss
