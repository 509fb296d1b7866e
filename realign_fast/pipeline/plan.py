"""The plan of a run: what each pass will read and write, and what is finished already.

A plan is the run itself, which reads no rows: it goes as far as the checkpoints in its output
allow. The other passes are taken to read every row.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ..align import ReAlign
from ..corpus.corpus import sample_ids
from ..interface.option_values import UnfinishedShards
from ..shared_space import SharedSpace
from ..storage.paths import records_of
from .align_run import AlignRun, Fitted, Work, checked_maps
from .manifest import read_manifest
from .output import ALIGNER, SPACE
from .passes import Part


def plan(work: Work, part: Part = (0, 1)) -> dict[str, Any]:
    """Return rows and bytes of each pass, the sums, and notes on what else the run does.

    Nothing is written or locked. The bytes of a sample are those of all rows that its format has to
    read, such as whole row groups of parquet at a URL. A map of an earlier run stands for one that
    cannot be fitted without reading, such as a map of a sample.
    """
    out, settings = work.out, work.settings
    run = AlignRun(replace(settings, progress=False), part, reading=False)
    run.records = records_of(out)
    fitted: Fitted | None = None
    with suppress(UnfinishedShards):
        fitted = work.fit(run)
    if fitted is None and any(measured.sample for measured in work.measures):
        if (path := run.records / ALIGNER).is_file():
            fitted = ReAlign.load(path)
        elif (path := run.records / SPACE).is_file():
            fitted = SharedSpace.load(path)
    if fitted is not None:
        for result, row_map in zip(work.results, checked_maps(fitted, work.results), strict=True):
            with suppress(UnfinishedShards):
                run.write(result, row_map, out)
    steps = [(name, corpus, sample, 0) for name, corpus, _, sample in work.measures]
    steps += [(r.pass_name, r.corpus, None, r.row_bytes) for r in work.results]
    before = {done.name: done.finished_before for done in run.passes}
    passes = list[dict[str, Any]]()
    for name, corpus, sample, written_row_bytes in steps:
        rows = sum(shard.num_rows for shard in corpus.shards[part[0] :: part[1]])
        rows = rows_read = rows - before.get(name, 0)
        if sample is not None:
            ids = sample_ids(corpus.num_rows, sample, settings.seed)
            rows, rows_read = len(ids), corpus.rows_read(ids)
        passes.append(
            {
                "name": name,
                "rows": rows,
                "bytes_read": rows_read * corpus.shards[0].row_bytes,
                "bytes_written": rows * written_row_bytes,
                "finished_before": before.get(name, 0),
            }
        )
    names = "rows", "bytes_read", "bytes_written", "finished_before"
    totals = {name: sum(step[name] for step in passes) for name in names}
    notes, written = [work.note * (fitted is None)], read_manifest(records_of(out))["passes"]
    for result in work.results:
        shards = written.get(result.pass_name, {"shards": []})["shards"]
        if shards and not before.get(result.pass_name):
            folder = out / result.folder
            reason = "as the options, the sources or the map differ"
            notes.append(f"{folder}: the run replaces its {len(shards)} shards, {reason}")
    return {"passes": passes, "notes": [note for note in notes if note]} | totals


def format_plan(plan: dict[str, Any]) -> str:
    """Return a plan as text."""
    lines, size = list[str](), tqdm.format_sizeof
    for step in [*plan["passes"], plan | {"name": "in all"}]:
        before = step["finished_before"]
        lines.append(
            f"{step['name']:16} {step['rows']:>15,} rows  {size(step['bytes_read'], 'B'):>8} read  "
            f"{size(step['bytes_written'], 'B'):>8} written"
            + f"  ({before:,} rows are finished)"
            * bool(before)
        )
    return "\n".join([*lines, *plan["notes"]])
