"""Retrieval from a gallery that holds several modalities: recall, NDCG, shares and hubs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._argument_checks import expect_tensor
from .estimate import Estimate

_TIE = 1e-12  # scores that differ by less of their size are one number, rounded differently


class MixedGallery(NamedTuple):
    """Figures of :func:`mixed_gallery`; the last k of the argument ``ks`` is the largest."""

    recall: dict[int, Estimate]  # R@k in the union of the galleries
    ndcg: Estimate  # NDCG@k of the largest k in the union
    pure_recall: dict[str, dict[int, Estimate]]  # R@k in the gallery of one modality alone
    pure_ndcg: dict[str, Estimate]
    shares: dict[str, Estimate]  # of each modality among the first k of the union
    hub_gini: float  # 0: each row is found equally often; 1: one row is found by all queries


def mixed_gallery(
    queries: Tensor,
    galleries: Mapping[str, Tensor],
    relevant: Mapping[str, Tensor],
    *,
    own: Mapping[str, Tensor] | None = None,
    ks: Sequence[int] = (1, 10),
    block: int = 4096,
) -> MixedGallery:
    """Measure retrieval by inner product from the union of galleries, and from each one alone.

    A tie counts for the relevant row. R@k is the share of queries with a relevant row among the
    first k, NDCG@k has gain 1 for each relevant row (Jarvelin and Kekalainen, 2002). Scores are
    float64; memory is bounded by ``block`` squared. Standard errors take queries as independent.

    Args:
        queries: [N, D], as they search the index; rows are not normalised.
        galleries: [M, D] rows of the index by modality.
        relevant: by modality, [N] int64 numbers of the gallery rows that answer the queries, -1
            where there is none.
        own: by modality, [N] int64 numbers of the gallery rows that are the queries themselves and
            are left out, -1 where there is none.
        ks: the numbers k, ascending.
        block: number of queries and of gallery rows that are compared at a time.

    Raises:
        ValueError: shapes that do not fit, rows that are not finite, unknown modalities, a query
            without a relevant row, or k beyond the gallery.
    """
    own = own or {}
    if block < 1:
        raise ValueError(f"mixed_gallery: block is {block}, expected 1 or more")
    _check(queries, galleries, relevant, own, ks)
    union: list[Tensor] = []
    pure: dict[str, list[Tensor]] = {name: [] for name in relevant}
    first: list[Tensor] = []
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        search = _Search(
            queries[part].double(),
            {name: rows[part] for name, rows in relevant.items()},
            {name: rows[part] for name, rows in own.items()},
        )
        search.run(galleries, ks[-1], block)
        union.append(search.ranks)
        first.append(search.first)
        for column, name in enumerate(relevant):
            pure[name].append(search.pure_ranks[:, column])
    ranks, nearest = torch.cat(union), torch.cat(first)
    alone = {name: torch.cat(parts)[:, None] for name, parts in pure.items()}
    bounds = torch.tensor([len(rows) for rows in galleries.values()]).cumsum(0)
    modality = torch.bucketize(nearest, bounds.to(nearest.device), right=True)
    return MixedGallery(
        {k: _recall(ranks, k) for k in ks},
        _ndcg(ranks, ks[-1]),
        {name: {k: _recall(own_ranks, k) for k in ks} for name, own_ranks in alone.items()},
        {name: _ndcg(own_ranks, ks[-1]) for name, own_ranks in alone.items()},
        {
            name: Estimate.of_mean((modality == number).double().mean(dim=1))
            for number, name in enumerate(galleries)
        },
        gini(torch.bincount(nearest.flatten(), minlength=int(bounds[-1]))),
    )


def gini(counts: Tensor) -> float:
    """Return the Gini coefficient of counts [M], 0 where all are equal."""
    ordered = counts.double().sort().values
    number = len(ordered)
    places = torch.arange(1, number + 1, dtype=torch.float64, device=ordered.device)
    total = float(ordered.sum())
    return float((2 * places - number - 1) @ ordered) / (number * total) if total else 0.0


class _Search:
    """A block of queries [n, D] against all galleries, block by block."""

    def __init__(
        self, queries: Tensor, relevant: dict[str, Tensor], own: dict[str, Tensor]
    ) -> None:
        self.queries, self.relevant, self.own = queries, relevant, own
        # Ranks from 1 of the relevant row of each modality; 0 where there is none.
        missing = torch.stack([rows < 0 for rows in relevant.values()], dim=1)
        self.ranks = (~missing).long()
        self.pure_ranks = self.ranks.clone()
        self.scores = queries.new_empty(len(queries), 0)
        self.first = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def run(self, galleries: Mapping[str, Tensor], k: int, block: int) -> None:
        """Count the rows that score above each relevant row, and collect the first k rows."""
        relevant_scores = [
            (self.queries * galleries[name][rows.clamp(min=0)].double()).sum(dim=1)
            for name, rows in self.relevant.items()
        ]
        if not all(bool(torch.isfinite(scores).all()) for scores in relevant_scores):
            raise ValueError("mixed_gallery: a score overflows float64; scale the rows down")
        thresholds = [scores + _TIE * (1 + scores.abs()) for scores in relevant_scores]
        offset = 0
        for name, gallery in galleries.items():
            for start in range(0, len(gallery), block):
                rows = gallery[start : start + block].double()
                tile = self.queries @ rows.T
                self._leave_out_own(name, tile, start)
                for column, (modality, limit) in enumerate(
                    zip(self.relevant, thresholds, strict=True)
                ):
                    above = (tile > limit[:, None]).sum(dim=1)
                    above *= self.relevant[modality] >= 0
                    self.ranks[:, column] += above
                    if modality == name:
                        self.pure_ranks[:, column] += above
                self._keep_first(tile, offset + start, k)
            offset += len(gallery)

    def _leave_out_own(self, name: str, tile: Tensor, start: int) -> None:
        if name in self.own:
            columns = self.own[name] - start
            inside = ((columns >= 0) & (columns < tile.shape[1])).nonzero()[:, 0]
            tile[inside, columns[inside]] = -torch.inf

    def _keep_first(self, tile: Tensor, first_number: int, k: int) -> None:
        scores, places = tile.topk(min(k, tile.shape[1]), dim=1)
        scores = torch.cat([self.scores, scores], dim=1)
        numbers = torch.cat([self.first, places + first_number], dim=1)
        self.scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        self.first = numbers.gather(1, order)


def _recall(ranks: Tensor, k: int) -> Estimate:
    """Return the share of queries with a rank [N, R] from 1 to k."""
    return Estimate.of_mean(((ranks > 0) & (ranks <= k)).any(dim=1).double())


def _ndcg(ranks: Tensor, k: int) -> Estimate:
    """Return the mean NDCG@k of ranks [N, R] from 1; 0 is no relevant row."""
    places = torch.arange(1, max(k, ranks.shape[1]) + 1, device=ranks.device)
    gains = 1 / torch.log2(places.double() + 1)
    inside = (ranks > 0) & (ranks <= k)
    gained = (gains[ranks.clamp(1, k) - 1] * inside).sum(dim=1)
    ideal = gains[:k].cumsum(0)[(ranks > 0).sum(dim=1).clamp(1, k) - 1]
    return Estimate.of_mean(gained / ideal)


def _check(
    queries: Tensor,
    galleries: Mapping[str, Tensor],
    relevant: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    ks: Sequence[int],
) -> None:
    """Raise a ValueError if :func:`mixed_gallery` cannot search with these arguments."""
    for name, rows in {"the queries": queries, **galleries}.items():
        expect_tensor("mixed_gallery", rows, name)
        if rows.dim() != 2 or rows.shape[1:] != queries.shape[1:] or not len(rows):
            raise ValueError(
                f"mixed_gallery: expected rows [N, {queries.shape[-1]}], got {list(rows.shape)} "
                f"for {name}; send queries and documents through one space"
            )
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"mixed_gallery: {name} hold a NaN or an infinity; leave them out")
    if not relevant or not {*relevant, *own} <= set(galleries):
        raise ValueError(
            f"mixed_gallery: `relevant` and `own` name {sorted({*relevant, *own})}, expected one "
            f"or more of the galleries {sorted(galleries)}"
        )
    for argument, numbers in (("relevant", relevant), ("own", own)):
        for name, rows in numbers.items():
            expect_tensor("mixed_gallery", rows, f"{argument}[{name!r}]")
            fits = rows.shape == queries.shape[:1] and rows.dtype == torch.int64
            if not fits or int(rows.min()) < -1 or int(rows.max()) >= len(galleries[name]):
                raise ValueError(
                    f"mixed_gallery: {argument}[{name!r}] must be [{len(queries)}] int64 "
                    f"numbers of the {len(galleries[name])} gallery rows, or -1"
                )
    none = (torch.stack([rows < 0 for rows in relevant.values()])).all(dim=0)
    if bool(none.any()):
        raise ValueError(f"mixed_gallery: query {int(none.nonzero()[0])} has no relevant row")
    candidates = sum(map(len, galleries.values())) - len(own)
    are_numbers = isinstance(ks, Sequence) and all(isinstance(k, int) for k in ks)
    if not are_numbers or not ks or sorted(set(ks)) != list(ks) or ks[0] < 1 or ks[-1] > candidates:
        raise ValueError(
            f"mixed_gallery: ks is {ks!r}, expected ascending numbers from 1 to {candidates}"
        )
