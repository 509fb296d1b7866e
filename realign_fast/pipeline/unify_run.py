"""Fit a :class:`SharedSpace` on corpora, and write them as documents of one index.

The passes are those of ``align``: the moments of each side, their moments about the means if the
method centres, and one pass a side that writes. Each side keeps its format, its number type and the
names of its shards, in ``text_emb/`` and ``img_emb/`` of the output, ``query_emb/`` for queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ..corpus.corpus import Corpus, common_encoder
from ..interface.option_values import OptionError
from ..moments import Moments, warn_if_far
from ..shared_space import Layout, RoleMap, SharedSpace, SpaceMethod
from ..storage.paths import AnyPath, StoragePath, output_path
from .align_run import AlignRun, check_aligner, check_columns, check_different
from .checkpoints import digest
from .engines.local import Engine
from .inspection import shape_of
from .output import FOLDERS, REPORT, SPACE, Written, check_output, check_place
from .settings import Settings

SPACE_ROWS = 50_000  # rows of each side that a space is fitted on by default
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
        blocks = len(self.space.sides) if self.space else len(self.documents)
        wide = (self.space or self).layout == "blocks"
        results = [
            Written(
                corpus,
                FOLDERS.get(role, FOLDERS["queries"]),
                f"apply {role}",
                corpus.dimension * blocks if wide else None,
            )
            for role, corpus in written.items()
        ]
        check_output(out, results, settings)
        if self.queries is not None:
            check_place(out, self.queries)
        return results


def unify(
    sides: SpaceSides, out: AnyPath, settings: Settings, engine: Engine | None = None
) -> dict[str, Any]:
    """Write corpora as documents of one index into ``out``, with its space; return the report.

    Args:
        sides: the corpora, and the space or how it is fitted: on ``settings.fit_rows`` rows of each
            corpus, by default ``SPACE_ROWS``, 0 is every row.
        out: a directory or a URL.
        settings: the options of the run.
        engine: takes the place of ``settings.workers``, such as :class:`.ray_driver.RayTasks`.

    Raises:
        ValueError, TypeError, OSError: a file, a row or the output directory is refused; the
            message says which one and what to do.
    """
    run, directory = AlignRun(space_settings(settings), engine=engine), output_path(out)
    results, space = sides.results(directory, run.settings), sides.space
    known = [(corpus.path, corpus.encoder) for corpus in sides.corpora.values()]
    encoder = common_encoder(("the space", space.encoder if space else None), *known)
    with run.output_directory(directory):
        if space is None:
            space = fit_space(run, sides)
            space.encoder = encoder
        maps = [map_of(space, result.pass_name) for result in results]
        for row_map, result in zip(maps, results, strict=True):
            check_aligner(row_map, result.corpus)
        (directory / REPORT).unlink(missing_ok=True)
        space.save(directory / SPACE)
        for row_map, result in zip(maps, results, strict=True):
            moments = run.write(result, row_map, directory)
            if moments.count:
                fitted = _fitted_mean(space, result.pass_name)
                warn_if_far(str(result.corpus.path), moments.mean, moments.count, *fitted)
        report: dict[str, Any] = {name: shape_of(c) for name, c in sides.corpora.items()}
        report |= {"space": space.record, "fit_rows": run.settings.fit_rows}
        options = "bad_rows", "batch_bytes"
        return run.write_report(directory, options, digest(directory / SPACE), report)


def space_settings(settings: Settings) -> Settings:
    """Return the settings of a run that fits a space; a ValueError for a mode that it lacks."""
    if settings.mode == "extend":
        raise OptionError("extend: a space is fitted on the rows that are there; leave it out")
    return settings if settings.fit_rows is not None else replace(settings, fit_rows=SPACE_ROWS)


def map_of(space: SharedSpace, pass_name: str) -> RoleMap:
    """Return the map of a pass that writes: of documents, or of the queries of a role."""
    role = pass_name.removeprefix("apply ")
    if role.endswith(_QUERIES):
        return space.query_map(role.removesuffix(_QUERIES))
    return space.document_map(role)


def _fitted_mean(space: SharedSpace, pass_name: str) -> tuple[Tensor, int]:
    """Return the mean [D] and the number of the rows that a pass's rows are drawn like."""
    role = pass_name.removeprefix("apply ")
    if role.endswith(_QUERIES):
        return space.query_mean(role.removesuffix(_QUERIES))
    return space.sides[role].centre, space.sides[role].count


def sample_of(settings: Settings, corpus: Corpus) -> int | None:
    """Return how many rows of a corpus are measured; None is every row, with checkpoints."""
    count = settings.fit_rows
    return count if count and count < corpus.num_rows else None


def fit_space(run: AlignRun, sides: SpaceSides) -> SharedSpace:
    """Fit a space in passes of ``run``."""
    first, *later_corpora = sides.corpora.values()
    for corpus in later_corpora:
        check_columns(corpus, first)
    measured: list[tuple[Corpus, Moments]] = []  # documents

    def measure(name: str, centre: Tensor | None) -> Moments:
        """Measure a corpus, or a sample of it if it is larger."""
        corpus, statistics = sides.corpora[name], "moments" if centre is None else "centred"
        row_map = None if centre is None else RoleMap(centre, True, {0: 1.0}, len(centre))
        run.count = sample_of(run.settings, corpus)
        moments = run.measure(f"{name} {statistics}", corpus, row_map, covariance=True).moments
        if centre is None and name in sides.documents:
            for earlier in measured:
                check_different(earlier, (corpus, moments))
            measured.append((corpus, moments))
        return moments

    return SharedSpace.from_passes(
        measure,
        [*sides.documents],
        [] if sides.queries is None else [sides.query_role],
        sides.query_role,
        layout=sides.layout,
        method=sides.method,
    )
