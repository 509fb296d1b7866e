"""The plan of a run: what each pass will read and write, and what is finished already.

A plan is the run itself, which reads no rows: it goes as far as the checkpoints in its output
allow. The other passes are taken to read every row. Rows and bytes come from headers and
checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..interface.option_values import UnfinishedShards
from ..shared_space import SharedSpace
from ..storage.paths import AnyPath, output_path, records_of
from .align_run import AlignRun, check_columns, check_sides
from .output import ALIGNER, SPACE, Written, check_output, format_bytes
from .sampling import rows_to_fit
from .settings import Settings
from .unify_run import SpaceSides, fit_space, map_of, sample_of, space_settings


class Step(NamedTuple):
    """A pass of a run over a corpus, or over a sample of its rows."""

    name: str
    corpus: Corpus
    sample: int | None = None  # rows
    written_row_bytes: int = 0


def plan_align(
    source: Corpus,
    target: Corpus,
    out: AnyPath,
    settings: Settings,
    part: tuple[int, int] = (0, 1),
    writes: bool = True,
) -> dict[str, Any]:
    """Return the plan of ``align``, or without ``writes`` that of ``fit``."""
    run, result = _dry_run(out, settings, part), Written(source, source.subfolder)
    check_sides(output_path(out), source, target, settings, writes)
    count, _ = rows_to_fit(settings, source, target)
    steps = [Step("source moments", source, count), Step("target moments", target, count)]
    steps.append(Step("source drift", source, count))
    aligner = None
    with suppress(UnfinishedShards):
        aligner = run.fit(source, target, residual=not writes)
    if count and run.records is not None and (run.records / ALIGNER).exists():
        aligner = ReAlign.load(run.records / ALIGNER)  # of the same sample
    if writes:
        steps.append(_written(run, result))
        if aligner is not None:
            _write(run, result, aligner, out)
    elif not count:
        steps.append(Step("source residual", source))
    return _plan(run, steps)


def plan_apply(
    aligner: ReAlign, source: Corpus, out: AnyPath, settings: Settings, part: tuple[int, int]
) -> dict[str, Any]:
    """Return the plan of ``apply``, which has one pass."""
    run, result = _dry_run(out, settings, part), Written(source, source.subfolder)
    check_output(output_path(out), [result], settings)
    check_columns(source, aligner)
    _write(run, result, aligner, out)
    return _plan(run, [_written(run, result)])


def plan_unify(
    sides: SpaceSides, out: AnyPath, settings: Settings, part: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Return the plan of ``unify``, without the passes of an automatic choice to centre."""
    settings, space = space_settings(settings), sides.space
    run, results = _dry_run(out, settings, part), sides.results(output_path(out), settings)
    statistics = ["moments", "centred"][: 1 + (sides.method not in ("auto", "calibrate"))]
    steps = [
        Step(f"{name} {kind}", corpus, sample_of(settings, corpus))
        for kind in (statistics if space is None else ())
        for name, corpus in sides.corpora.items()
    ]
    with suppress(UnfinishedShards):
        space = space or fit_space(run, sides)
    if space is None and run.records is not None and (run.records / SPACE).is_file():
        space = SharedSpace.load(run.records / SPACE)
    for result in results:
        steps.append(_written(run, result))
        if space is not None:
            _write(run, result, map_of(space, result.pass_name), out)
    return _plan(run, steps)


def plan_copy(corpus: Corpus, out: AnyPath, suffix: str, settings: Settings) -> dict[str, Any]:
    """Return the plan of ``convert``; shards that are in ``out`` already are finished."""
    run, place = _dry_run(out, settings, (0, 1)), output_path(out)
    missing = [s for s in corpus.shards if not (place / f"{s.path.stem}{suffix}").exists()]
    step = _written(run, Written(corpus, ""))
    return _plan(run, [step], corpus.num_rows - sum(shard.num_rows for shard in missing))


def _dry_run(out: AnyPath, settings: Settings, part: tuple[int, int]) -> AlignRun:
    """Return a run that reads no rows, and writes and locks nothing."""
    run = AlignRun(replace(settings, progress=False), part, reading=False)
    run.records = None if settings.mode == "overwrite" else records_of(output_path(out))
    return run


def _written(run: AlignRun, result: Written) -> Step:
    return Step(result.pass_name, result.corpus, None, result.row_bytes(run.settings))


def _write(run: AlignRun, result: Written, row_map: Any, out: AnyPath) -> None:
    with suppress(UnfinishedShards):
        run.write(result, row_map, output_path(out))


def _plan(run: AlignRun, steps: Sequence[Step], finished: int = 0) -> dict[str, Any]:
    """Return rows and bytes of each pass, and the sums; ``finished`` rows are there already."""
    before = {done.name: done.finished_before for done in run.passes}
    passes = list[dict[str, Any]]()
    for name, corpus, sample, written_row_bytes in steps:
        shards = corpus.shards[run.part[0] :: run.part[1]]
        rows = sum(shard.num_rows for shard in shards)
        if sample is not None:
            rows = min(sample, corpus.num_rows)
        finished_before = before.get(name, finished)
        rows -= finished_before
        passes.append(
            {
                "name": name,
                "rows": rows,
                "bytes_read": rows * corpus.shards[0].row_bytes,
                "bytes_written": rows * written_row_bytes,
                "finished_before": finished_before,
            }
        )
    names = "rows", "bytes_read", "bytes_written", "finished_before"
    return {"passes": passes} | {name: sum(step[name] for step in passes) for name in names}


def format_plan(plan: dict[str, Any]) -> str:
    """Return a plan as text."""
    lines = []
    for step in [*plan["passes"], plan | {"name": "in all"}]:
        before = step["finished_before"]
        lines.append(
            f"{step['name']:16} {step['rows']:>15,} rows  {format_bytes(step['bytes_read']):>10} "
            f"read  {format_bytes(step['bytes_written']):>10} written"
            + f"  ({before:,} rows are finished)"
            * bool(before)
        )
    return "\n".join(lines)
