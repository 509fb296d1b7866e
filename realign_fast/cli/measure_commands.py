"""The commands `evaluate-search` and `substitution`, which measure two sides and maps of them."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..interface.option_values import OptionError
from . import options as opts
from .app import Result, command
from .corpus_commands import open_corpus, open_space, shows_progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.corpus import Corpus
    from ..metrics import Captioned, Substitution

_SIDES = "--text TEXT --image IMAGE"
_FEWEST = 22  # pairs to search among, captions to read
_IDS_A_PAIR = 100  # ids that are held for each pair that is searched for
_OTHER: dict[Any, Any] = {"text": "image", "image": "text"}


@command("Results", _SIDES, f"{_SIDES} --space space.safetensors --json", f"{_SIDES} --pairs id")
def evaluate_search(options: opts.SearchOptions) -> Result:
    """Measure the search for pairs in one index of both sides, by the encoder and in a space."""
    from ..interface.progress import Progress
    from ..metrics import search_pairs
    from ..metrics.estimate import plain
    from ..shared_space import SharedSpace

    fitted = open_space(options, "fit", "splits")
    rows, repeated = _paired_rows(options)
    splits, count = 1 if fitted else options.splits or 10, len(rows["text"])
    roles = [options.queries] if options.queries else list(_OTHER)
    if fitted and fitted.layout == "single" and not options.queries:
        roles = [fitted.query_role]

    def fit(side_rows: dict[str, Any], role: str) -> SharedSpace:
        """Return the space of a split."""
        method = options.fit or "auto"
        return fitted or SharedSpace.fit(**side_rows, query_role=role, method=method)

    total, shown = splits * len(roles), shows_progress(options)
    with Progress(total, "search", unit="search", shown=shown) as bar:
        share: dict[str, Any] = {"fitted_share": 0.0 if fitted else 0.5}
        galleries = search_pairs(
            rows, fit, roles=roles, splits=splits, on_search=bar.update, **share
        )
    searched = count if fitted else count - count // 2
    facts: dict[str, Any] = {"pairs": count, "searched": searched, "splits": splits}
    facts["repeated"] = repeated
    lines = [f"{searched:,} of {count:,} pairs searched, splits: {splits}"]
    if repeated:
        lines.append(f"left out: {repeated:,} pairs with a row of an earlier pair")
    for role, ways in galleries.items():
        columns = {way: figures.figures(_OTHER[role]) for way, figures in ways.items()}
        facts[f"{role}_queries"] = {way: plain(column) for way, column in columns.items()}
        lines += ["", *_table(f"{role} queries", columns)]
    return Result(facts, "\n".join(lines), answer=True)


@command("Results", _SIDES, f"{_SIDES} --method realign --method center --json")
def substitution(options: opts.SubstitutionOptions) -> Result:
    """Measure what texts are worth in place of images to small readers of words of captions."""
    from ..interface.progress import Progress
    from ..metrics import Reader, substitution

    captioned = _captioned_rows(options)
    names = [*(options.method or []), *filter(None, [options.aligner, options.space])]
    names = names or ["realign", "optimal-transport", "center"]
    total = options.seeds * (2 + len(names))
    with Progress(total, "readers", unit="reader", shown=shows_progress(options)) as bar:
        result = substitution(
            *captioned.rows,
            *captioned.labels,
            aligned={name: partial(_fit, name, options) for name in names},
            partners=captioned.partners,
            test=options.test,
            seeds=range(options.seeds),
            reader=Reader(steps=options.steps),
            on_reader=bar.update,
        )
    return _substitution_result(options, captioned, result)


def _captioned_rows(options: opts.SubstitutionOptions) -> Captioned:
    """Return rows of both sides with labels; a ValueError for a side with too few captions."""
    from ..metrics import label_by_captions

    sides, columns = _open_sides(options), ("caption", "text", "txt")
    places = [_spread(side.num_rows, options.sample) for side in sides]
    captions = [_values(*side, columns) for side in zip(sides, places, strict=True)]
    captioned = label_by_captions(_rows(sides, places), captions, options.buckets)
    for side, rows, count in zip(sides, captioned.rows, map(len, captions), strict=True):
        if len(rows) < _FEWEST:
            raise ValueError(
                f"{side.path}: {len(rows)} of {count} captions have a word of 3 letters, expected "
                f"{_FEWEST} or more; give captions in {', '.join(columns)}"
            )
    return captioned


def _substitution_result(
    options: opts.SubstitutionOptions, captioned: Captioned, result: Substitution
) -> Result:
    """Return the figures of readers as facts and as a table."""
    from ..metrics.estimate import plain

    texts, images = map(len, captioned.rows)
    tested_count = round(images * options.test)
    columns = ("loss", "accuracy", "share_closed")
    figures = {name: getattr(result, name) for name in columns}
    facts: dict[str, Any] = {"texts": texts, "images": images, "tested": tested_count}
    facts |= {"without_words": dict(zip(_OTHER, captioned.wordless, strict=True))}
    facts |= {"seeds": options.seeds} | {name: plain(column) for name, column in figures.items()}
    facts["interval"] = {
        name: [*plain({"low": low, "high": high}).values()]
        for name, (low, high) in result.interval.items()
    }
    title = f"{tested_count:,} of {images:,} images tested, seeds and splits: {options.seeds}"
    left_out = "left out without a word: {:,} texts, {:,} images".format(*captioned.wordless)
    lines = [
        title,
        *[left_out] * any(captioned.wordless),
        "",
        *_table("readers trained on", figures),
    ]
    return Result(facts, "\n".join(lines), answer=True)


def _open_sides(options: opts.PairOptions) -> list[Corpus]:
    paths = options.source, options.target
    return [open_corpus(options, path, name) for path, name in zip(paths, _OTHER, strict=True)]


def _spread(total: int, count: int) -> Sequence[int]:
    """Return at most ``count`` numbers below ``total``, spread evenly."""
    return [number * total // min(count, total) for number in range(min(count, total))]


def _rows(sides: Sequence[Corpus], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return unit rows [n, D] float64 of each side; a ValueError for bad rows or equal sides."""
    import torch

    from ..moments import good_rows
    from ..ops.reference import unit
    from ..pipeline.align_run import check_columns

    check_columns(*sides)
    taken = [side.take(numbers) for side, numbers in zip(sides, places, strict=True)]
    for side, numbers, rows in zip(sides, places, taken, strict=True):
        if len(bad := (~good_rows(rows)).nonzero()):
            shard = bisect_right(side.starts, row := numbers[int(bad[0])]) - 1
            place = f"{side.shards[shard].path}: row {row - side.starts[shard]}"
            raise ValueError(f"{place} is zero or not finite; leave it out of the file")
    if torch.equal(*taken):
        raise ValueError(f"{sides[0].path}: holds the rows of {sides[1].path}; give two modalities")
    return [unit(rows.double()) for rows in taken]


def _values(corpus: Corpus, places: Sequence[int], columns: Sequence[str]) -> list[str]:
    """Return the values of some rows; see :func:`_all_values`."""
    chosen = set(places)
    return [value for row, value in enumerate(_all_values(corpus, columns)) if row in chosen]


def _all_values(corpus: Corpus, columns: Sequence[str]) -> Iterator[str]:
    """Return values of rows in the first of the columns beside them, or in `metadata/`."""
    from ..corpus.layout import metadata_of
    from ..corpus.row_values import shard_values

    if not metadata_of(corpus) and not all(shard.has_other_columns for shard in corpus.shards):
        raise ValueError(
            f"{corpus.path}: has no metadata/ and no other columns; give a root or files that have "
            f"{' or '.join(columns)} for each row"
        )
    return chain.from_iterable(shard_values(corpus, None, columns))


def _is_first(rows: Tensor) -> Tensor:
    """Return a mask [N] of the rows [N, D] that equal none before them."""
    import torch

    number, group = torch.arange(len(rows)), torch.unique(rows, dim=0, return_inverse=True)[1]
    first = number.new_full(number.shape, len(rows)).scatter_reduce(0, group, number, "amin")
    return first[group] == number


def _paired_rows(options: opts.SearchOptions) -> tuple[dict[str, Tensor], int]:
    """Return the rows of a sample of pairs by modality, and how many pairs were left out.

    Those are pairs with a row of an earlier one, such as other captions of the same image: a search
    for one of them would count the others as wrong.
    """
    sides = _open_sides(options)
    counts = [side.num_rows for side in sides]
    pairs, count = None, min(counts)
    if options.pairs == "id":
        first, second = _sampled_ids(sides, _IDS_A_PAIR * options.sample)
        place = {number: row for row, number in second}
        pairs = [(row, place[number]) for row, number in first if number in place]
        count = len(pairs)
    paths = f"{sides[0].path}, {sides[1].path}"
    if pairs is None and counts[0] != counts[1]:
        raise OptionError(
            f"{paths}: {counts[0]} and {counts[1]} rows, expected pairs in one order; give "
            "--pairs id where both sides have ids"
        )
    sampled = _spread(count, options.sample)
    if pairs is None and sides[0].path != sides[1].path:
        _warn_of_other_ids(sides, sampled)
    chosen = [pairs[n] if pairs else (n, n) for n in sampled]
    if count >= _FEWEST:
        rows = _rows(sides, list(zip(*chosen, strict=True)))
        is_first = _is_first(rows[0]) & _is_first(rows[1])
        if (count := int(is_first.sum())) >= _FEWEST:
            pairs_of_rows = {name: side[is_first] for name, side in zip(_OTHER, rows, strict=True)}
            return pairs_of_rows, len(chosen) - count
    raise OptionError(
        f"{paths}: {count} pairs of different rows, expected {_FEWEST} or more; give more pairs"
    )


def _sampled_ids(sides: Sequence[Corpus], most: int) -> Iterator[list[tuple[int, int]]]:
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
    from ..corpus.row_values import ID_COLUMNS

    for row, value in enumerate(_all_values(corpus, ID_COLUMNS)):
        if value:
            name = value.encode("utf-8", "surrogatepass")
            yield row, int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def _warn_of_other_ids(sides: Sequence[Corpus], places: Sequence[int]) -> None:
    """Warn if both sides have ids and rows with two ids are taken as a pair, of those sampled."""
    from ..corpus.row_values import ID_COLUMNS

    with suppress(ValueError):  # a side without ids
        ids = [_values(side, places, ID_COLUMNS) for side in sides]
        for row, first, second in zip(places, *ids, strict=True):
            if first != second:
                warnings.warn(
                    f"{sides[0].path}, {sides[1].path}: row {row} is taken as a pair and has the "
                    f"ids {first!r} and {second!r}; give --pairs id if ids tell the pairs",
                    stacklevel=2,
                )
                break


def _fit(
    name: str, options: opts.SubstitutionOptions, text: Tensor, image: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
    """Return the maps of texts and of images: from a file, or by a method fitted on these rows."""
    from ..align import ReAlign
    from ..methods import NEED_COVARIANCE
    from ..shared_space import SharedSpace

    if name == options.space:
        space = open_space(options)
        assert space is not None
    elif name == "center":
        space = SharedSpace.fit(text=text, image=image, method="center")
    elif name == options.aligner:
        return ReAlign.from_pretrained(name), None
    else:
        fitting: dict[str, Any] = {"shrinkage": "oas"} if name in NEED_COVARIANCE else {}
        return ReAlign.fit(text, image, method=name, **fitting), None  # type: ignore[arg-type]
    return space.text, space.image


def _table(title: str, columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a line for each figure: its name, and its value and standard error by column."""
    lines = [f"{title:24}" + "".join(f"{name:>18}" for name in columns)]
    for name in next(iter(columns.values())):
        cells = [column[name] for column in columns.values()]
        errors = [getattr(cell, "standard_error", math.nan) for cell in cells]
        texts = [f"{cell:.4f} ± {error:.4f}" for cell, error in zip(cells, errors, strict=True)]
        lines.append(f"{name:24}" + "".join(f"{text:>18}" for text in texts))
    return lines
