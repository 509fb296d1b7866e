"""Fit a :class:`SharedSpace` on corpora, and write them as documents of one index.

The passes are those of ``align``: the moments of each side, their moments about the means if the
method centres, and one pass a side that writes. Each side keeps its format, its number type and the
names of its shards, in ``text_emb/`` and ``img_emb/`` of the output, ``query_emb/`` for queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from torch import Tensor

from ..corpus.corpus import Corpus, common_encoder
from ..interface.option_values import OptionError, UnfinishedShards
from ..moments import Moments, expect_rows, warn_if_far
from ..shared_space import Layout, RoleMap, SharedSpace, SpaceMethod
from ..storage.paths import AnyPath, StoragePath, output_path, records_of
from .align_run import AlignRun, Measure, check_columns, check_different
from .checkpoints import digest, map_hash
from .engines.local import Engine
from .inspection import shape_of
from .output import (
    FOLDERS,
    SPACE,
    Written,
    check_output,
    check_place,
    kept_passes,
    remove_reports,
)
from .settings import Settings

SPACE_ROWS = 50_000  # rows of each modality that a space is fitted on by default
_QUERIES = " queries"  # after the name of their role


@dataclass(frozen=True)
class SpaceSides:
    """The corpora of a space, and how it is fitted.

    Args:
        documents: the corpora ``"text"`` and ``"image"``, or one of them with ``space``.
        queries: rows like those that will be searched for: the space is fitted on them, or with
            ``space`` they are written as they search the index.
        query_role, layout, method: as in :meth:`SharedSpace.fit`.
        space: a fitted space, which takes the place of a fit.
    """

    documents: Mapping[str, Corpus]
    queries: Corpus | None = None
    query_role: str = "text"
    layout: Layout = "single"
    method: SpaceMethod | Literal["auto"] = "auto"
    space: SharedSpace | None = None

    @property
    def corpora(self) -> dict[str, Corpus]:
        """Documents and queries by name."""
        queries = {} if self.queries is None else {self.query_role + _QUERIES: self.queries}
        return {**self.documents, **queries}

    def results(self, out: StoragePath, settings: Settings) -> list[Written]:
        """Return the corpora that are written; refuse an output that cannot hold them."""
        written = self.documents if self.space is None else self.corpora
        modalities = [*(self.space.sides if self.space else self.documents)]
        if self.query_role not in modalities:
            known = ", ".join(modalities)
            raise OptionError(f"query-role: {self.query_role!r} is none of {known}; give one")
        wide = (self.space or self).layout == "blocks"
        results = [
            Written(
                corpus,
                FOLDERS.get(role, FOLDERS["queries"]),
                f"apply {role}",
                corpus.dimension * len(modalities) if wide else None,
            )
            for role, corpus in written.items()
        ]
        check_output(out, results, settings)
        if self.space is not None:
            check_kept_sides(out, results, self.space, settings)
        if self.queries is not None:
            check_place(out, self.queries)
        return results


def unify(
    sides: SpaceSides,
    out: AnyPath,
    settings: Settings,
    engine: Engine | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Write corpora as documents of one index into ``out``, with its space; return the report.

    Args:
        sides: the corpora, and the space or how it is fitted: on ``settings.fit_rows`` rows of each
            modality, by default ``SPACE_ROWS``, 0 is every row.
        out: a directory or a URL.
        settings: the options of the run.
        engine: takes the place of ``settings.workers``, such as :class:`.ray_driver.RayTasks`.
        part: ``(i, n)`` is job i (from 0) of an array of n. It returns what it did and the command
            that is ``next``.

    Raises:
        ValueError, TypeError, OSError: a file, a row or the output directory is refused; the
            message says which one and what to do.
    """
    run, directory = AlignRun(space_settings(settings), part, engine=engine), output_path(out)
    results, space = sides.results(directory, run.settings), sides.space
    known = [(corpus.path, corpus.encoder) for corpus in sides.corpora.values()]
    encoder = common_encoder(("the space", space.encoder if space else None), *known)
    with run.output_directory(directory):
        if space is None:
            try:
                space = fit_space(run, sides)
            except UnfinishedShards as error:
                return run.job_report(error)
            space.encoder = encoder
            check_kept_sides(directory, results, space, run.settings)
        maps = [(result, map_of(space, result.pass_name)) for result in results]
        for result, row_map in maps:
            check_columns(result.corpus, row_map)
        records = records_of(directory)
        run.earlier = remove_reports(records)
        if part[1] == 1:
            space.save(records / SPACE)
        for result, row_map in maps:
            moments = run.write(result, row_map, directory)
            if part[1] == 1:
                _warn_if_far(space, result, moments)
        if part[1] > 1:
            return run.job_report()
        report: dict[str, Any] = {name: shape_of(c) for name, c in sides.corpora.items()}
        report |= {"space": space.record, "fit_rows": run.settings.fit_rows}
        options = "bad_rows", "batch_bytes"
        return run.write_report(directory, options, digest(records / SPACE), report)


def space_settings(settings: Settings) -> Settings:
    """Return the settings of a run that fits a space."""
    return settings if settings.fit_rows is not None else replace(settings, fit_rows=SPACE_ROWS)


def map_of(space: SharedSpace, pass_name: str) -> RoleMap:
    """Return the map of a pass that writes: of documents, or of the queries of a role."""
    role = pass_name.removeprefix("apply ")
    if role.endswith(_QUERIES):
        return space.query_map(role.removesuffix(_QUERIES))
    return space.document_map(role)


def check_kept_sides(
    out: StoragePath, results: Sequence[Written], space: SharedSpace, settings: Settings
) -> None:
    """Raise an OptionError if sides that stay in ``out`` were written through another space."""
    for name, facts in kept_passes(out, results, settings.mode).items():
        try:
            row_map = map_of(space, name)
        except ValueError:  # a modality that this space lacks
            row_map = None
        if facts["map"] != map_hash(row_map):
            raise OptionError(
                f"{out / facts['folder']}: holds rows of another space, which this run would leave "
                f"beside those of its own; give --space {out} to add to that space, or another "
                "--out"
            )


def _warn_if_far(space: SharedSpace, result: Written, moments: Moments) -> None:
    """Warn of rows that were written and lie far from those that the space was fitted on."""
    name = result.pass_name.removeprefix("apply ")
    if name.endswith(_QUERIES):
        fitted = space.query_mean(name.removesuffix(_QUERIES))
    else:
        fitted = space.sides[name].centre, space.sides[name].count
    if moments.count:
        warn_if_far(str(result.corpus.path), moments.mean, moments.count, *fitted)


def sample_of(settings: Settings, corpus: Corpus) -> int | None:
    """Return how many rows of a side are measured; None is all rows, with checkpoints."""
    count = settings.fit_rows
    return count if count and count < corpus.num_rows else None


def fit_space(run: AlignRun, sides: SpaceSides) -> SharedSpace:
    """Fit a space in passes of ``run``; a job of an array may have to wait for others first."""
    first, *later_corpora = sides.corpora.values()
    for corpus in later_corpora:
        check_columns(corpus, first)
    known: dict[str, dict[str, Moments]] = {}  # by statistics, which are measured all at once

    def measure(name: str, centre: Tensor | None) -> Moments:
        """Return the moments of rows, or those about their means."""
        statistics = "moments" if centre is None else "centred"
        if statistics not in known:
            known[statistics] = _measure_all(run, sides, statistics, known.get("moments", {}))
        return known[statistics][name]

    return SharedSpace.from_passes(
        measure,
        [*sides.documents],
        [] if sides.queries is None else [sides.query_role],
        sides.query_role,
        layout=sides.layout,
        method=sides.method,
    )


def _measure_all(
    run: AlignRun, sides: SpaceSides, statistics: str, centres: Mapping[str, Moments]
) -> dict[str, Moments]:
    """Measure each corpus, or a sample of it if it is larger; return the moments by name.

    The rows are centred at the means of ``centres``, if there are any.
    """
    centring = {
        name: RoleMap(own.mean, True, {0: 1.0}, own.dimension) for name, own in centres.items()
    }
    passes = [
        Measure(f"{name} {statistics}", corpus, centring.get(name), sample_of(run.settings, corpus))
        for name, corpus in sides.corpora.items()
    ]
    samples = run.measure(passes, covariance=True)
    measured = {name: sample.moments for name, sample in zip(sides.corpora, samples, strict=True)}
    for name, corpus in sides.corpora.items():
        expect_rows(f"{corpus.path}: the {name} side", measured[name])
    if not centres:
        pairs = ((corpus, measured[name]) for name, corpus in sides.documents.items())
        for one_side, other_side in combinations(pairs, 2):
            check_different(one_side, other_side)
    return measured
