"""Pairs of rows of two corpora, by their places or by their ids, and samples of both sides."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor

from ..corpus.corpus import Corpus
from ..corpus.layout import metadata_of
from ..corpus.row_values import ID_COLUMNS, shard_values
from ..interface.option_values import OptionError
from ..moments import good_rows
from ..ops.reference import unit
from .align_run import check_columns

FEWEST = 22  # pairs to search among, captions to read
_IDS_A_PAIR = 100  # ids that are held for each pair that is searched for


def spread(total: int, count: int) -> Sequence[int]:
    """Return at most ``count`` numbers below ``total``, spread evenly."""
    return [number * total // min(count, total) for number in range(min(count, total))]


def unit_rows(
    sides: Sequence[Corpus], places: Sequence[Sequence[int]], skip_bad: bool = False
) -> list[Tensor]:
    """Return unit rows [n, D] float64 of each side; a ValueError for bad rows or equal sides.

    With ``skip_bad`` pairs with a bad row are left out.
    """
    check_columns(*sides)
    taken = [side.take(numbers) for side, numbers in zip(sides, places, strict=True)]
    if skip_bad:
        keep = good_rows(taken[0]) & good_rows(taken[1])
        taken = [rows[keep] for rows in taken]
        places = [torch.tensor(numbers)[keep].tolist() for numbers in places]
    for side, numbers, rows in zip(sides, places, taken, strict=True):
        if len(bad := (~good_rows(rows)).nonzero()):
            shard = bisect_right(side.starts, row := numbers[int(bad[0])]) - 1
            place = f"{side.shards[shard].path}: row {row - side.starts[shard]}"
            raise ValueError(f"{place} is zero or not finite; leave it out of the file")
    if torch.equal(*taken):
        raise ValueError(f"{sides[0].path}: holds the rows of {sides[1].path}; give two modalities")
    return [unit(rows.double()) for rows in taken]


def values_at(corpus: Corpus, places: Sequence[int], columns: Sequence[str]) -> list[str]:
    """Return the values of some rows; see :func:`all_values`."""
    chosen = set(places)
    return [value for row, value in enumerate(all_values(corpus, columns)) if row in chosen]


def all_values(corpus: Corpus, columns: Sequence[str]) -> Iterator[str]:
    """Return values of rows in the first of the columns beside them, or in `metadata/`."""
    if not metadata_of(corpus) and not all(shard.has_other_columns for shard in corpus.shards):
        raise ValueError(
            f"{corpus.path}: has no metadata/ and no other columns; give a root or files that have "
            f"{' or '.join(columns)} for each row"
        )
    return chain.from_iterable(shard_values(corpus, None, columns))


def paired_rows(
    sides: Sequence[Corpus],
    pairs: Sequence[tuple[int, int]] | None,
    sample: int,
    skip_bad: bool = False,
) -> tuple[list[Tensor], int]:
    """Return the rows of a sample of pairs by side, and how many pairs were left out.

    Those are pairs with a row of an earlier one, such as other captions of the same image: a search
    for one of them would count the others as wrong. ``pairs`` are numbers of rows, None pairs the
    rows of the same number. Too few pairs are an OptionError.
    """
    counts = [side.num_rows for side in sides]
    count = min(counts) if pairs is None else len(pairs)
    paths = f"{sides[0].path}, {sides[1].path}"
    if pairs is None and counts[0] != counts[1]:
        raise OptionError(
            f"{paths}: {counts[0]} and {counts[1]} rows, expected pairs in one order; give "
            "--pairs id where both sides have ids"
        )
    chosen = [pairs[n] if pairs else (n, n) for n in spread(count, sample)]
    if count >= FEWEST:
        rows = unit_rows(sides, list(zip(*chosen, strict=True)), skip_bad)
        is_first = _is_first(rows[0]) & _is_first(rows[1])
        if (count := int(is_first.sum())) >= FEWEST:
            return [side[is_first] for side in rows], len(chosen) - count
    raise OptionError(
        f"{paths}: {count} pairs of different rows, expected {FEWEST} or more; give more pairs"
    )


def pairs_of_ids(sides: Sequence[Corpus], sample: int) -> list[tuple[int, int]]:
    """Return the numbers of rows with the same id on both sides, of a bounded sample of ids."""
    first, second = sampled_ids(sides, _IDS_A_PAIR * sample)
    place = {number: row for row, number in second}
    return [(row, place[number]) for row, number in first if number in place]


def sampled_ids(sides: Sequence[Corpus], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield (row, hash of its id) of each side, for a sample of about ``most`` ids of the smaller.

    Ids are drawn by their hash of 8 bytes, so that the same ones are drawn on both sides. Memory is
    bounded by ``most``, and by how many rows have an id in common; other ids are read and let go.
    """
    smaller = min(sides, key=lambda side: side.num_rows)
    limit = (most << 64) // max(smaller.num_rows, most)
    drawn = {number for _, number in _hashed_ids(smaller) if number < limit}
    for side in sides:
        yield [entry for entry in _hashed_ids(side) if entry[1] in drawn]


def _hashed_ids(corpus: Corpus) -> Iterator[tuple[int, int]]:
    """Yield the row and the hash of each id; rows without one are left out."""
    for row, value in enumerate(all_values(corpus, ID_COLUMNS)):
        if value:
            name = value.encode("utf-8", "surrogatepass")
            yield row, int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def _is_first(rows: Tensor) -> Tensor:
    """Return a mask [N] of the rows [N, D] that equal none before them."""
    number, group = torch.arange(len(rows)), torch.unique(rows, dim=0, return_inverse=True)[1]
    first = number.new_full(number.shape, len(rows)).scatter_reduce(0, group, number, "amin")
    return first[group] == number
