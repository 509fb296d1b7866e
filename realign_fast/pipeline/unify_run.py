"""Fit a :class:`SharedSpace` on corpora, and write them as documents of one index.

The passes are the moments of each side, their moments about the means if the method centres, and
one pass a side that writes, in ``text_emb/`` and ``img_emb/``, ``query_emb/`` for queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from torch import Tensor

from ..corpus.corpus import Corpus, common_encoder
from ..interface.option_values import OptionError
from ..moments import Moments
from ..shared_space import QUERIES, Layout, RoleMap, SharedSpace, SpaceMethod
from ..storage.paths import AnyPath, StoragePath, output_path, records_of
from .align_run import AlignRun, Measure, Work, check_columns, check_different, execute, shape_of
from .checkpoints import digest
from .engines.local import Engine
from .output import FOLDERS, SPACE, Written, check_output, check_place
from .passes import Part
from .settings import Settings

SPACE_ROWS = 50_000  # rows of each modality that a space is fitted on by default


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
        queries = {} if self.queries is None else {self.query_role + QUERIES: self.queries}
        return {**self.documents, **queries}

    def results(self) -> list[Written]:
        """Return the corpora that are written."""
        written = self.documents if self.space is None else self.corpora
        modalities = [*(self.space.sides if self.space else self.documents)]
        if self.query_role not in modalities:
            known = ", ".join(modalities)
            raise OptionError(f"query-role: {self.query_role!r} is none of {known}; give one")
        blocks = len(modalities) if (self.space or self).layout == "blocks" else 1
        return [
            Written(corpus, FOLDERS.get(role, FOLDERS["queries"]), f"apply {role}", blocks)
            for role, corpus in written.items()
        ]


def unify(
    sides: SpaceSides,
    out: AnyPath,
    settings: Settings,
    engine: Engine | None = None,
    part: Part = (0, 1),
) -> dict[str, Any]:
    """Write corpora as documents of one index into ``out``, with its space; return the report.

    A space is fitted on ``settings.fit_rows`` rows of each side, by default ``SPACE_ROWS``; 0 is
    every row. The other arguments and the errors are those of :func:`.align_run.align`.
    """
    return execute(space_work(sides, output_path(out), settings), engine, part)


def space_work(sides: SpaceSides, out: StoragePath, settings: Settings) -> Work:
    """Return the work of ``unify``; its measures lack the passes of an automatic choice."""
    results = sides.results()
    check_output(out, results)
    if sides.queries is not None:
        check_place(out, sides.queries)
    known = [(corpus.path, corpus.encoder) for corpus in sides.corpora.values()]
    encoder = common_encoder(("the space", sides.space.encoder if sides.space else None), *known)
    fit_rows = SPACE_ROWS if settings.fit_rows is None else settings.fit_rows

    def passes(statistics: str, centring: Mapping[str, RoleMap]) -> list[Measure]:
        """Return a pass over each corpus, or over a sample of its rows if it has more."""
        measures = []
        for name, corpus in sides.corpora.items():
            sample = fit_rows if 0 < fit_rows < corpus.num_rows else None
            measures.append(Measure(f"{name} {statistics}", corpus, centring.get(name), sample))
        return measures

    def fit(run: AlignRun) -> SharedSpace:
        """Return the given space, or fit one in passes of ``run``."""
        if sides.space is not None:
            return sides.space
        first, *later_corpora = sides.corpora.values()
        for corpus in later_corpora:
            check_columns(corpus, first)
        measured: dict[str, dict[str, Moments]] = {}  # by statistics, of all corpora at once

        def measure(name: str, centre: Tensor | None) -> Moments:
            """Return the moments of rows, or those about their means."""
            statistics = "moments" if centre is None else "centred"
            if statistics not in measured:
                centring = {
                    side: RoleMap(own.mean, True, {0: 1.0}, own.dimension)
                    for side, own in measured.get("moments", {}).items()
                }
                totals = run.measure(passes(statistics, centring), covariance=True)
                measured[statistics] = moments = dict(zip(sides.corpora, totals, strict=True))
                if centre is None:
                    pairs = [(own, moments[side]) for side, own in sides.documents.items()]
                    for one_side, other_side in combinations(pairs, 2):
                        check_different(one_side, other_side)
            return measured[statistics][name]

        space = SharedSpace.from_passes(
            measure,
            [*sides.documents],
            [] if sides.queries is None else [sides.query_role],
            sides.query_role,
            layout=sides.layout,
            method=sides.method,
        )
        space.encoder = encoder
        return space

    def finish(run: AlignRun, space: Any, _: list[Moments]) -> dict[str, Any]:
        """Write the manifest and the report."""
        report: dict[str, Any] = {name: shape_of(c) for name, c in sides.corpora.items()}
        report |= {"space": space.record, "fit_rows": fit_rows}
        made_by = digest(records_of(out) / SPACE)
        return run.write_report(out, ("bad_rows", "batch_bytes"), made_by, report)

    work = Work(out, settings, results, fit, finish)
    if sides.space is not None:
        return work
    centres = sides.method not in ("auto", "calibrate")
    measures = passes("moments", {}) + (passes("centred", {}) if centres else [])
    note = f"and up to {len(sides.corpora)} passes more, as those of the moments, if it centres"
    return work._replace(measures=measures, note=note * (sides.method == "auto"))
