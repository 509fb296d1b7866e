"""Retrieval from a gallery that holds several modalities: recall, NDCG, shares and rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_matrix, expect_one_width, tensor_of
from .estimate import Estimate
from .neighbours import search_blocks

_Tensors = Mapping[str, Tensor]  # by modality
_TIE = 1e-12  # float64 scores that differ by less of their size are one number, rounded apart


class MixedGallery(NamedTuple):
    """Figures of :func:`mixed_gallery`; the last k of the argument ``ks`` is the largest."""

    recall: dict[int, Estimate]  # R@k in the union of the galleries
    ndcg: Estimate  # NDCG@k of the largest k in the union
    pure_recall: dict[int, Estimate]  # R@k in the gallery of the relevant row alone
    pure_ndcg: Estimate
    shares: dict[str, Estimate]  # of each modality among the first k of the union
    within: Estimate  # the share of the rows of the relevant row's modality, and of the other
    between: Estimate  # modalities, that score above it


def mixed_gallery(
    queries: Tensor | np.ndarray[Any, Any],
    galleries: Mapping[str, Tensor | np.ndarray[Any, Any]],
    relevant: Mapping[str, Tensor | np.ndarray[Any, Any]],
    *,
    own: Mapping[str, Tensor | np.ndarray[Any, Any]] | None = None,
    ks: Sequence[int] = (1, 10),
    block: int = 4096,
) -> MixedGallery:
    """Measure retrieval by inner product from the union of galleries, and from each one alone.

    A tie counts for the relevant row. R@k is the share of queries with their relevant row among
    the first k, NDCG@k has gain 1 for it (Jarvelin and Kekalainen, 2002). The rates
    ``within`` and ``between`` modalities are 1 - AUC of a relevant row against either kind of row;
    without a gap both are alike, and ``between`` far above ``within`` is the "intra-modal ranking
    bias" of Li et al. (arXiv 2507.19054). Scores are float64; memory is bounded by ``block``
    squared. Standard errors are over queries; :func:`over_splits` has those over splits.

    Args:
        queries: [N, D] tensor or array, as they search the index; rows are not normalised.
        galleries: [M, D] rows of the index by modality.
        relevant: by the one modality that answers, [N] int64 numbers of the gallery row that
            answers each query.
        own: by modality, [N] int64 numbers of the gallery rows that are the queries themselves and
            are left out.
        ks: the numbers k, ascending.
        block: number of queries and of gallery rows that are compared at a time.

    Raises:
        ValueError: shapes that do not fit, rows that are not finite, unknown modalities, or k
            beyond the gallery.
    """
    expect_counts("mixed_gallery", block=block)
    queries = tensor_of("mixed_gallery, queries", queries)
    documents = {name: tensor_of(f"mixed_gallery, {name}", galleries[name]) for name in galleries}
    right, own = (
        {name: torch.as_tensor(numbers) for name, numbers in (argument or {}).items()}
        for argument in (relevant, own)
    )
    _check(queries, documents, right, own, ks)
    ((answering, answers),) = right.items()
    parts = []
    for numbers in torch.split(torch.arange(len(queries), device=queries.device), block):
        part = queries[numbers].double()
        limits = (part * documents[answering][answers[numbers]].double()).sum(dim=1)
        if not bool(torch.isfinite(limits).all()):
            raise ValueError("mixed_gallery: a score overflows float64; scale the rows down")
        limits += _TIE * (1 + limits.abs())
        blocks, offset = [], 0
        for name, gallery in documents.items():
            own_rows = own[name][numbers] if name in own else None
            best = search_blocks(part, gallery, ks[-1], own_rows, Tensor.double, limits, block)
            blocks.append((best[0], best[1] + offset, best[2]))
            offset += len(gallery)
        scores, places, counts = zip(*blocks, strict=True)
        order = torch.cat(scores, dim=1).topk(ks[-1], dim=1).indices
        parts.append((torch.cat(places, dim=1).gather(1, order), torch.stack(counts, dim=1)))
    nearest, above = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # above [N, G]
    sizes = {name: len(rows) - (name in own) for name, rows in documents.items()}
    bounds = torch.tensor([len(rows) for rows in documents.values()]).cumsum(0)
    modality = torch.bucketize(nearest, bounds.to(nearest.device), right=True)
    same = above[:, [*documents].index(answering)]
    elsewhere = above.sum(dim=1) - same
    others = sum(sizes.values()) - sizes[answering]
    return MixedGallery(
        *_recall_and_ndcg(1 + same + elsewhere, ks),
        *_recall_and_ndcg(1 + same, ks),
        shares={
            name: Estimate.of_mean((modality == number).double().mean(dim=1))
            for number, name in enumerate(documents)
        },
        within=Estimate.of_mean(same / (sizes[answering] - 1)),
        between=Estimate.of_mean(elsewhere / others),
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
    if {len(side) for side in pairs.values()} != {count} or not callable(fit):
        raise ValueError(
            f"search_pairs: sides of {[len(side) for side in pairs.values()]} rows and "
            f"{type(fit).__name__}, expected as many rows of each side, row i of all being one "
            "pair, and a function that returns a space: lambda rows, role: SharedSpace.fit(...)"
        )
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


def _recall_and_ndcg(ranks: Tensor, ks: Sequence[int]) -> tuple[dict[int, Estimate], Estimate]:
    """Return R@k of ranks [N] from 1, one for each query, and NDCG@k of the last k."""
    recall = {k: Estimate.of_mean((ranks <= k).double()) for k in ks}
    return recall, Estimate.of_mean((ranks <= ks[-1]) / torch.log2(ranks.double() + 1))


def _check(
    queries: Tensor, galleries: _Tensors, relevant: _Tensors, own: _Tensors, ks: Sequence[int]
) -> None:
    for name, rows in {"queries": queries, **galleries}.items():
        expect_matrix(f"mixed_gallery, {name}", rows, min_rows=1)
        sides = (f"a row of {name}", rows.shape[1]), ("a query", queries.shape[1])
        advice = "send queries and documents through one space"
        expect_one_width("mixed_gallery", *sides, advice)
    if len(relevant) != 1 or not {*relevant, *own} <= set(galleries):
        raise ValueError(
            f"mixed_gallery: `relevant` names {sorted(relevant)} and `own` {sorted(own)}, expected "
            f"galleries, {sorted(galleries)}, and one of them as `relevant`"
        )
    for argument, numbers in (("relevant", relevant), ("own", own)):
        for name, rows in numbers.items():
            fits = rows.shape == queries.shape[:1] and rows.dtype == torch.int64
            if not fits or int(rows.min()) < 0 or int(rows.max()) >= len(galleries[name]):
                raise ValueError(
                    f"mixed_gallery: {argument}[{name!r}] must be [{len(queries)}] int64 numbers "
                    f"of the {len(galleries[name])} gallery rows"
                )
    candidates = sum(map(len, galleries.values())) - len(own)
    are_numbers = isinstance(ks, Sequence) and all(isinstance(k, int) for k in ks)
    if not are_numbers or not ks or sorted(set(ks)) != list(ks) or ks[0] < 1 or ks[-1] > candidates:
        raise ValueError(
            f"mixed_gallery: ks is {ks!r}, expected ascending numbers from 1 to {candidates}"
        )
