"""Retrieval from a gallery that holds several modalities: recall, NDCG, shares, rates and hubs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_tensor, tensor_of
from .cosines import check_rows
from .estimate import Estimate
from .neighbours import TIE, search_blocks

_DRAWS = 100  # of queries, for the standard error of the Gini coefficient


class MixedGallery(NamedTuple):
    """Figures of :func:`mixed_gallery`; the last k of the argument ``ks`` is the largest."""

    recall: dict[int, Estimate]  # R@k in the union of the galleries
    ndcg: Estimate  # NDCG@k of the largest k in the union
    pure_recall: dict[str, dict[int, Estimate]]  # R@k in the gallery of one modality alone
    pure_ndcg: dict[str, Estimate]
    shares: dict[str, Estimate]  # of each modality among the first k of the union
    within: dict[str, Estimate]  # by modality of the relevant row: the share of the rows of this
    between: dict[str, Estimate]  # modality, and of the others, that score above it
    hub_gini: Estimate  # 0: each row is found equally often; 1: one row is found by all queries

    def figures(self, modality: str) -> dict[str, Estimate]:
        """Return the figures of relevant rows of one modality under flat names."""
        pure = {f"recall_at_{k}": value for k, value in self.pure_recall[modality].items()}
        mixed = {f"mixed_recall_at_{k}": value for k, value in self.recall.items()}
        return {
            **mixed,
            "mixed_ndcg": self.ndcg,
            **pure,
            "ndcg": self.pure_ndcg[modality],
            **{f"share_of_{name}": value for name, value in self.shares.items()},
            "within_rate": self.within[modality],
            "between_rate": self.between[modality],
            "hub_gini": self.hub_gini,
        }


def mixed_gallery(
    queries: Tensor | np.ndarray[Any, Any],
    galleries: Mapping[str, Tensor | np.ndarray[Any, Any]],
    relevant: Mapping[str, Tensor],
    *,
    own: Mapping[str, Tensor] | None = None,
    ks: Sequence[int] = (1, 10),
    block: int = 4096,
) -> MixedGallery:
    """Measure retrieval by inner product from the union of galleries, and from each one alone.

    A tie counts for the relevant row. R@k is the share of queries with a relevant row among the
    first k, NDCG@k has gain 1 for each relevant row (Jarvelin and Kekalainen, 2002). The rates
    ``within`` and ``between`` modalities are 1 - AUC of a relevant row against either kind of row;
    without a gap both are alike, and ``between`` far above ``within`` is the "intra-modal ranking
    bias" of Li et al. (arXiv 2507.19054). Hubs (Radovanovic et al., 2010) are counted among the
    first k. Scores are float64; memory is bounded by ``block`` squared. Standard errors are over
    queries, those of the bootstrap: drawn for the Gini coefficient, and its closed form,
    ``std / sqrt(N)``, for means. :func:`over_splits` has those over splits.

    Args:
        queries: [N, D] tensor or array, as they search the index; rows are not normalised.
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
    expect_counts("mixed_gallery", block=block)
    queries = tensor_of("mixed_gallery, queries", queries)
    documents = {name: tensor_of(f"mixed_gallery, {name}", galleries[name]) for name in galleries}
    _check(queries, documents, relevant, own or {}, ks)
    nobody = torch.full((len(queries),), -1, device=queries.device)
    left_out = {name: (own or {}).get(name, nobody) for name in documents}
    parts = []
    for numbers in torch.split(torch.arange(len(queries), device=queries.device), block):
        part, answers = queries[numbers].double(), {}
        for name, rows in relevant.items():
            answers[name] = documents[name][rows[numbers].clamp(min=0)].double()
        limits = torch.stack([(part * rows).sum(dim=1) for rows in answers.values()], dim=1)
        if not bool(torch.isfinite(limits).all()):
            raise ValueError("mixed_gallery: a score overflows float64; scale the rows down")
        limits += TIE * (1 + limits.abs())
        blocks, offset = [], 0
        for name, gallery in documents.items():
            own_rows = left_out[name][numbers]
            best = search_blocks(part, gallery, ks[-1], own_rows, Tensor.double, limits, block)
            blocks.append((best[0], best[1] + offset, best[2]))
            offset += len(gallery)
        scores, places, counts = zip(*blocks, strict=True)
        order = torch.cat(scores, dim=1).topk(ks[-1], dim=1).indices
        parts.append((torch.cat(places, dim=1).gather(1, order), torch.stack(counts, dim=1)))
    nearest, above = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # above [N, G, R]
    sizes = {name: len(rows) - (left_out[name] >= 0).long() for name, rows in documents.items()}
    bounds = torch.tensor([len(rows) for rows in documents.values()]).cumsum(0)
    modality = torch.bucketize(nearest, bounds.to(nearest.device), right=True)
    has_answer = torch.stack([rows >= 0 for rows in relevant.values()], dim=1)
    ranks = (1 + above.sum(dim=1)) * has_answer  # [N, R] from 1, 0 where there is no relevant row
    pure, within, between = {}, {}, {}
    for column, (name, answered) in enumerate(zip(relevant, has_answer.T, strict=True)):
        same = above[:, [*sizes].index(name), column]
        elsewhere = above[:, :, column].sum(dim=1) - same
        pure[name] = ((1 + same) * answered)[:, None]
        within[name] = Estimate.of_mean((same / (sizes[name] - 1))[answered])
        others = sum(sizes.values()) - sizes[name]
        between[name] = Estimate.of_mean((elsewhere / others)[answered])
    return MixedGallery(
        recall={k: _recall(ranks, k) for k in ks},
        ndcg=_ndcg(ranks, ks[-1]),
        pure_recall={
            name: {k: _recall(own_ranks, k) for k in ks} for name, own_ranks in pure.items()
        },
        pure_ndcg={name: _ndcg(own_ranks, ks[-1]) for name, own_ranks in pure.items()},
        shares={
            name: Estimate.of_mean((modality == number).double().mean(dim=1))
            for number, name in enumerate(documents)
        },
        within=within,
        between=between,
        hub_gini=_hub_gini(nearest, int(bounds[-1])),
    )


def over_splits(results: Sequence[MixedGallery]) -> MixedGallery:
    """Return the mean of each figure over splits, with ``std / sqrt(splits)`` as standard error.

    A single split keeps its standard errors over queries.
    """
    if len(results) == 1:
        return results[0]

    def _mean(figures: Sequence[Any]) -> Any:
        if not isinstance(figures[0], dict):
            return Estimate.of_mean(torch.tensor(figures))
        return {name: _mean([figure[name] for figure in figures]) for name in figures[0]}

    return MixedGallery(*map(_mean, zip(*results, strict=True)))


def search_pairs(
    pairs: Mapping[str, Tensor],
    fit: Callable[[dict[str, Tensor], str], Any],
    *,
    roles: Sequence[str],
    splits: int = 10,
    fitted_share: float = 0.5,
    on_search: Callable[[], object] | None = None,
) -> dict[str, dict[str, MixedGallery]]:
    """Search for the other row of pairs among the rows of both sides, over random splits.

    Args:
        pairs: [N, D] rows of two modalities by name; row i of both is one pair.
        fit: takes rows to fit on and the role of the queries, and returns a
            :class:`realign_fast.SharedSpace`.
        roles: the modalities of the queries.
        splits: number of splits, with the seeds 0, 1, ...
        fitted_share: share of the pairs that each split fits on; it searches for the others.
        on_search: called after each of ``splits * len(roles)`` searches.

    Returns:
        By role, the figures of the rows as they are (``"encoder"``) and of those in the space
        (``"space"``).
    """
    count = len(next(iter(pairs.values())))
    half = int(count * fitted_share)
    number = torch.arange(count - half)
    galleries: dict[str, dict[str, list[MixedGallery]]] = {
        role: {"encoder": [], "space": []} for role in roles
    }
    for split in range(splits):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(split))
        fitted = {name: side[order[:half]] for name, side in pairs.items()}
        raw = {name: side[order[half:]] for name, side in pairs.items()}
        for role, ways in galleries.items():
            space, target = fit(fitted, role), next(name for name in pairs if name != role)
            placed = {name: space.documents(name, side) for name, side in raw.items()}
            searches = (raw[role], raw), (space.query(raw[role], role), placed)
            for results, (queries, documents) in zip(ways.values(), searches, strict=True):
                relevant, own = {target: number}, {role: number}
                results.append(mixed_gallery(queries, documents, relevant, own=own))
            if on_search:
                on_search()
    return {
        role: {way: over_splits(results) for way, results in ways.items()}
        for role, ways in galleries.items()
    }


def gini(counts: Tensor) -> float:
    """Return the Gini coefficient of counts [M], 0 where all are equal; none is negative."""
    if not isinstance(counts, Tensor) or counts.dim() != 1 or not bool((counts >= 0).all()):
        raise ValueError(f"gini: expected a tensor of counts [M] from 0, got {counts!r:.200}")
    ordered = counts.double().sort().values
    number = len(ordered)
    places = torch.arange(1, number + 1, dtype=torch.float64, device=ordered.device)
    total = float(ordered.sum())
    return float((2 * places - number - 1) @ ordered) / (number * total) if total else 0.0


def _hub_gini(nearest: Tensor, count: int) -> Estimate:
    """Return the Gini coefficient of how often each of ``count`` rows is in ``nearest`` [N, k]."""
    generator, size = torch.Generator().manual_seed(0), (len(nearest),)
    draws = (torch.randint(len(nearest), size, generator=generator) for _ in range(_DRAWS))
    samples = chain([nearest], (nearest[queries.to(nearest.device)] for queries in draws))
    value, *drawn = (gini(torch.bincount(rows.flatten(), minlength=count)) for rows in samples)
    return Estimate(value, float(torch.tensor(drawn).double().std()))


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
    for name, rows in {"queries": queries, **galleries}.items():
        check_rows(f"mixed_gallery, {name}", rows, min_rows=1)
        if rows.shape[1] != queries.shape[1]:
            raise ValueError(
                f"mixed_gallery: {name} have {rows.shape[1]} columns, the queries "
                f"{queries.shape[1]}; send queries and documents through one space"
            )
    if not relevant or not {*relevant, *own} <= set(galleries):
        raise ValueError(
            f"mixed_gallery: `relevant` and `own` name {sorted({*relevant, *own})}, expected one "
            f"or more of the galleries {sorted(galleries)}"
        )
    for argument, numbers in (("relevant", relevant), ("own", own)):
        for name, rows in numbers.items():
            expect_tensor("mixed_gallery", rows, f"{argument}[{name!r}]", floating=False)
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
