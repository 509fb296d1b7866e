"""Pairs of rows of two corpora, by their places or by their ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..corpus.corpus import Corpus
from ..corpus.row_values import column_values
from ..moments import good_rows
from ..ops.reference import unit
from ..pipeline.align_run import check_columns

FEWEST = 22  # pairs to search among
_IDS_A_PAIR = 100  # ids that are held for each pair that is searched for


def spread(total: int, count: int) -> Sequence[int]:
    """Return at most ``count`` numbers below ``total``, spread evenly."""
    return [number * total // min(count, total) for number in range(min(count, total))]


def paired_rows(
    sides: Sequence[Corpus], pairs: Sequence[tuple[int, int]] | None, sample: int
) -> list[Tensor]:
    """Return unit rows [n, D] float64 of a sample of pairs, by side.

    Left out are pairs with a bad row or a row of an earlier one, such as other captions of an
    image, which a search would count as wrong. ``pairs`` are numbers of rows; None pairs equal
    numbers. Too few pairs, or sides with the same rows, are a ValueError.
    """
    check_columns(*sides)
    paths = f"{sides[0].path}, {sides[1].path}"
    counts = [side.num_rows for side in sides]
    if pairs is None and counts[0] != counts[1]:
        raise ValueError(f"{paths}: {counts[0]} and {counts[1]} rows, expected pairs in one order")
    count = counts[0] if pairs is None else len(pairs)
    chosen = [pairs[n] if pairs else (n, n) for n in spread(count, sample)]
    numbers: Iterable[tuple[int, ...]] = zip(*chosen, strict=True) if chosen else [(), ()]
    taken = [side.take([*own]) for side, own in zip(sides, numbers, strict=True)]
    keep = good_rows(taken[0]) & good_rows(taken[1])
    rows = [unit(side[keep].double()) for side in taken]
    if torch.equal(*rows):
        raise ValueError(f"{sides[0].path}: holds the rows of {sides[1].path}; give two modalities")
    is_first = _is_first(rows[0]) & _is_first(rows[1])
    if (count := int(is_first.sum())) < FEWEST:
        raise ValueError(
            f"{paths}: {count} pairs of different rows, expected {FEWEST} or more; give more pairs"
        )
    return [side[is_first] for side in rows]


def pairs_of_ids(sides: Sequence[Corpus], sample: int) -> list[tuple[int, int]]:
    """Return the numbers of rows with the same id on both sides, of a bounded sample of ids.

    ``100 * sample`` rows of the smaller side, spread evenly, are looked for in the other.
    """
    smaller, larger = sorted(sides, key=lambda side: side.num_rows)
    chosen = set(spread(smaller.num_rows, _IDS_A_PAIR * sample))
    row_of = {name: row for row, name in enumerate(column_values(smaller)) if row in chosen}
    row_of.pop("", None)  # of rows without an id
    ids = enumerate(column_values(larger))
    pairs = [(row_of[name], row) for row, name in ids if name in row_of]
    return pairs if smaller is sides[0] else [(row, other) for other, row in pairs]


def _is_first(rows: Tensor) -> Tensor:
    """Return a mask [N] of the rows [N, D] that equal none before them."""
    number, group = torch.arange(len(rows)), torch.unique(rows, dim=0, return_inverse=True)[1]
    first = number.new_full(number.shape, len(rows)).scatter_reduce(0, group, number, "amin")
    return first[group] == number
