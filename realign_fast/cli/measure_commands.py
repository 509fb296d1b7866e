"""The commands `report`, `evaluate-search` and `substitution`, which measure sides and maps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

from ..interface.option_values import OptionError
from . import options as opts
from .app import Result, command
from .corpus_commands import open_corpus, open_space, shows_progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..corpus.corpus import Corpus

_SIDES = "--text TEXT --image IMAGE"
_OTHER: dict[Any, Any] = {"text": "image", "image": "text"}


@command("Results", "OUT", "OUT --sample 10000")
def report(
    options: opts.Common,
    out: opts.Result,
    sample: opts.Sample = 3000,
    seed: opts.SampleSeed = 0,
) -> Result:
    """Write a page that shows what a run changed, and whether to trust its result."""
    from ..report import write_report

    path, facts = write_report(out, sample, seed)
    lines = [facts["sentence"], facts["trust"]["verdict"]]
    lines += [f"  {finding['rule']}: {finding['text']}" for finding in facts["trust"]["findings"]]
    summary = {name: facts[name] for name in ("sentence", "trust")}
    return Result(
        {"report": str(path), **summary}, "\n".join([*lines, f"wrote {path}"]), answer=True
    )


def check_report(is_asked: bool, is_job: bool = False) -> None:
    """Raise an error before a run whose report lacks a package, or is of one job of an array."""
    if is_asked and is_job:
        raise OptionError(
            "report: a job of an array writes none; give it to the last command, without --shard"
        )
    if is_asked:
        from ..report.page import packages

        packages()


def with_report(result: Result, out: str, options: opts.Common, is_asked: bool) -> Result:
    """Return the result of a run, with the report on its output if that is asked for."""
    if not is_asked:
        return result
    try:
        page = report(options, out)
    except Exception as error:  # the run itself ended well: its lines and status stay
        warnings.warn(
            f"the run ended, its report failed ({error}); try: realign-fast report {out}",
            stacklevel=2,
        )
        return result
    facts = {**result.facts, "page": page.facts}
    return result._replace(facts=facts, text=f"{result.text}\n{page.text}")


@command("Results", _SIDES, f"{_SIDES} --space space.safetensors --json", f"{_SIDES} --pairs id")
def evaluate_search(options: opts.SearchOptions) -> Result:
    """Measure the search for pairs in one index of both sides, by the encoder and in a space."""
    from ..interface.progress import Progress
    from ..metrics import search_pairs
    from ..metrics.estimate import plain
    from ..pipeline.paired_rows import paired_rows, pairs_of_ids, spread
    from ..shared_space import SharedSpace

    fitted = open_space(options, "fit", "splits")
    sides, pairs = _open_sides(options), None
    if options.pairs == "id":
        pairs = pairs_of_ids(sides, options.sample)
    elif sides[0].path != sides[1].path:
        _warn_of_other_ids(sides, spread(min(side.num_rows for side in sides), options.sample))
    paired, repeated = paired_rows(sides, pairs, options.sample)
    rows = dict(zip(_OTHER, paired, strict=True))
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
        columns = {way: figures.figures() for way, figures in ways.items()}
        facts[f"{role}_queries"] = {way: plain(column) for way, column in columns.items()}
        lines += ["", *_table(f"{role} queries", columns)]
    return Result(facts, "\n".join(lines), answer=True)


@command("Results", _SIDES, f"{_SIDES} --method realign --method center --json")
def substitution(options: opts.SubstitutionOptions) -> Result:
    """Measure what texts are worth in place of images to small readers of words of captions."""
    from ..interface.progress import Progress
    from ..metrics import Reader, substitution
    from ..metrics.estimate import plain

    rows, labels, partners, wordless = _captioned_rows(options)
    names = [*(options.method or []), *filter(None, [options.aligner, options.space])]
    names = names or ["realign", "optimal-transport", "center"]
    total = options.seeds * (2 + len(names))
    with Progress(total, "readers", unit="reader", shown=shows_progress(options)) as bar:
        result = substitution(
            *rows,
            *labels,
            aligned={name: partial(_fit, name, options) for name in names},
            partners=partners,
            test=options.test,
            seeds=range(options.seeds),
            reader=Reader(steps=options.steps),
            on_reader=bar.update,
        )
    texts, images = map(len, rows)
    tested = round(images * options.test)
    figures = {name: getattr(result, name) for name in ("loss", "share_closed")}
    facts: dict[str, Any] = {"texts": texts, "images": images, "tested": tested}
    facts |= {"without_words": dict(zip(_OTHER, wordless, strict=True)), "seeds": options.seeds}
    facts |= {name: plain(column) for name, column in figures.items()}
    facts["interval"] = {
        name: [*plain({"low": low, "high": high}).values()]
        for name, (low, high) in result.interval.items()
    }
    lines = [f"{tested:,} of {images:,} images tested, seeds and splits: {options.seeds}"]
    if any(wordless):
        lines.append("left out without a word: {:,} texts, {:,} images".format(*wordless))
    return Result(
        facts, "\n".join([*lines, "", *_table("readers trained on", figures)]), answer=True
    )


def _captioned_rows(
    options: opts.SubstitutionOptions,
) -> tuple[list[Tensor], list[Tensor], Tensor, list[int]]:
    """Return rows with words in their captions, labels, partners, and how many have no words."""
    import torch

    from ..metrics import hashed_words
    from ..pipeline.paired_rows import FEWEST, spread, unit_rows, values_at

    sides, columns = _open_sides(options), ("caption", "text", "txt")
    places = [spread(side.num_rows, options.sample) for side in sides]
    captions = [values_at(*side, columns) for side in zip(sides, places, strict=True)]
    labels = [hashed_words(side, options.buckets) for side in captions]
    masks = [side.any(dim=1) for side in labels]
    for side, mask in zip(sides, masks, strict=True):
        if int(mask.sum()) < FEWEST:
            raise ValueError(
                f"{side.path}: {int(mask.sum())} of {len(mask)} captions have a word of 3 letters, "
                f"expected {FEWEST} or more; give captions in {', '.join(columns)}"
            )
    worded = [[*compress(*side)] for side in zip(captions, masks, strict=True)]
    place = {caption: number for number, caption in enumerate(worded[1])}
    rows = zip(unit_rows(sides, places), masks, strict=True)
    return (
        [side[mask].float() for side, mask in rows],
        [side[mask] for side, mask in zip(labels, masks, strict=True)],
        torch.tensor([place.get(caption, -1) for caption in worded[0]]),
        [int((~mask).sum()) for mask in masks],
    )


def _open_sides(options: opts.PairOptions) -> list[Corpus]:
    paths = options.source, options.target
    return [open_corpus(options, path, name) for path, name in zip(paths, _OTHER, strict=True)]


def _warn_of_other_ids(sides: Sequence[Corpus], places: Sequence[int]) -> None:
    """Warn if both sides have ids and rows with two ids are taken as a pair, of those sampled."""
    from ..corpus.row_values import ID_COLUMNS
    from ..pipeline.paired_rows import values_at

    with suppress(ValueError):  # a side without ids
        ids = [values_at(side, places, ID_COLUMNS) for side in sides]
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
