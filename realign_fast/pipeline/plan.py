"""The plan of a run: what each pass will read and write, what is finished already, and how long.

Rows, bytes and requests are counted from headers and checkpoints, as the run itself will count
them. The seconds come from rates: those of the user, or those of a short run on the first shards.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._startup import is_own_command
from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..corpus.shard import ContiguousShard
from ..corpus.split_corpus import SplitCorpus
from ..moments import Moments
from ..shared_space import SharedSpace
from ..storage import read_ahead
from ..storage.lock import start_time
from ..storage.paths import AnyPath, StoragePath, output_path, records_of
from .align_run import AlignRun, check_columns, check_sides
from .checkpoints import Entry
from .output import ALIGNER, SPACE, Written, check_output, copied_sizes, format_bytes
from .passes import LOGGER
from .sampling import Sample, rows_to_fit
from .settings import Settings
from .table_rows import AnyMap, moments_for
from .unify_run import SpaceSides, map_of, sample_of, space_settings

UPLOAD_BYTES = 16 << 20  # of a request that uploads a part of a shard
MEASURED_BYTES = 1 << 29  # of each side at least, which the rates are measured on
END_SHARE = 0.3  # of the time in which a process loads torch, to unload it (0.25 to 0.35 measured)


@dataclass
class PlanRun(AlignRun):
    """A run that only counts what its passes would do."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    is_known: bool = True  # False once statistics are missing that later passes depend on
    uploads: bool = False  # to a URL

    def run_pass(self, task: Any, total: Moments, entries: list[Entry]) -> Moments:
        """Count the shards of a pass that are not finished, and merge the others into ``total``."""
        unfinished = []
        for index in range(self.part[0], len(task.corpus.shards), self.part[1]):
            if task.checkpoints is None or (moments := task(index).moments) is None:
                unfinished.append(index)
            else:
                total.merge(moments)
        self.is_known &= not unfinished
        self.add(task.name, task.corpus, unfinished, task.written_row_bytes)
        return total

    def write(self, result: Written, row_map: AnyMap | None, out: StoragePath) -> Moments:
        """Count the shards that are not written: as :meth:`run_pass` does, all without a map."""
        if row_map is None:
            shards = range(self.part[0], len(result.corpus.shards), self.part[1])
            self.add(result.pass_name, result.corpus, shards, result.row_bytes(self.settings))
            return Moments()
        folder = result.folder, out / result.folder
        task = self.task(result.pass_name, result.corpus, row_map, result=folder)
        return self.run_pass(task, moments_for(result.corpus), [])

    def add_carried(self, results: Sequence[Written], out: StoragePath) -> None:
        """Add to the last step the files that are copied along with its rows, and not linked."""
        step, is_whole = self.steps[-1], self.part[1] == 1  # else the end of the array brings them
        sizes = copied_sizes(out, results, self.settings) if is_whole else []
        step["bytes_read"] += sum(sizes)
        step["bytes_written"] += sum(sizes)
        if self.uploads and step["requests"] is not None:
            step["requests"] += sum(max(1, -(-size // UPLOAD_BYTES)) for size in sizes)

    def run_sample(self, name: str, corpus: Corpus, count: int, *_: Any) -> Sample:
        """Count a pass over a sample, which has no checkpoints."""
        sides = corpus.side_rows.values() if isinstance(corpus, SplitCorpus) else [corpus.num_rows]
        self.is_known, rows = False, sum(min(count, number) for number in sides)
        size = rows * corpus.shards[0].row_bytes
        step = {"name": name, "rows": rows, "bytes_read": size, "bytes_written": 0}
        requests = None if corpus.path.is_remote else 0
        self.steps.append(step | {"requests": requests, "finished_before": 0})
        return Sample(Moments(), corpus.num_rows)

    def add(self, name: str, corpus: Corpus, shards: Sequence[int], row_bytes: int = 0) -> None:
        """Add a pass over some shards of a corpus; it writes ``row_bytes`` for each row."""
        rows = [corpus.shards[index].num_rows for index in shards]
        source_row_bytes = corpus.shards[0].row_bytes
        read = bool(self.steps) and corpus.nbytes <= self.settings.memory  # kept since the first
        read_bytes = 0 if read and name != "target moments" else sum(rows) * source_row_bytes
        requests: int | None = 0
        if corpus.path.is_remote and read_bytes:
            ranged = all(isinstance(corpus.shards[index], ContiguousShard) for index in shards)
            rows_each = max(1, read_ahead.PIECE_BYTES // source_row_bytes)
            requests = sum(-(-count // rows_each) for count in rows) if ranged else None
        if self.uploads and requests is not None:
            requests += sum(-(-row_bytes * count // UPLOAD_BYTES) for count in rows)
        step = {"name": name, "rows": sum(rows), "bytes_read": read_bytes}
        step |= {"bytes_written": sum(rows) * row_bytes, "requests": requests}
        every = range(self.part[0], len(corpus.shards), self.part[1])
        before = sum(corpus.shards[index].num_rows for index in every) - sum(rows)
        self.steps.append(step | {"finished_before": before})


def plan_align(
    source: Corpus, target: Corpus, out: AnyPath, settings: Settings, writes: bool = True
) -> list[dict[str, Any]]:
    """Return the passes of ``align``, or without ``writes`` those of ``fit``."""
    run, result = _plan_run(out, settings), Written(source, source.subfolder)
    check_sides(output_path(out), source, target, settings, writes)
    run.count, _ = rows_to_fit(settings, source, target)
    aligner: ReAlign | None = None
    y, x = run.measure("source moments", source), run.measure("target moments", target)
    if run.is_known:
        aligner = run._from_moments((source, y.moments), (target, x.moments))
        aligner.record_drift(run.measure("source drift", source, aligner).moments)
    elif run.count:
        run.measure("source drift", source)
    else:
        run.add("source drift", source, range(len(source.shards)))
    if not writes and not run.count:
        run.add("source residual", source, range(len(source.shards)))
    if run.count and run.records is not None and (run.records / ALIGNER).exists():
        aligner, run.is_known = ReAlign.load(run.records / ALIGNER), True
    if writes:
        run.write(result, aligner if run.is_known else None, output_path(out))
        run.add_carried([result], output_path(out))
    return run.steps


def plan_apply(
    aligner: ReAlign, source: Corpus, out: AnyPath, settings: Settings, part: tuple[int, int]
) -> list[dict[str, Any]]:
    """Return the one pass of ``apply``."""
    run, result = _plan_run(out, settings, part), Written(source, source.subfolder)
    check_output(output_path(out), [result], settings)
    check_columns(source, aligner)
    run.write(result, aligner, output_path(out))
    run.add_carried([result], output_path(out))
    return run.steps


def plan_unify(
    sides: SpaceSides, out: AnyPath, settings: Settings, part: tuple[int, int] = (0, 1)
) -> list[dict[str, Any]]:
    """Return the passes of ``unify``, without those of an automatic choice to centre."""
    place, settings, space = output_path(out), space_settings(settings), sides.space
    run, results = _plan_run(out, settings, part), sides.results(place, settings)
    for name, corpus in sides.corpora.items() if space is None else ():
        run.count = sample_of(settings, corpus)
        run.measure(f"{name} moments", corpus, covariance=True)
        if sides.method not in ("auto", "calibrate"):
            run.steps.append({**run.steps[-1], "name": f"{name} centred"})
    if space is None and run.records and (run.records / SPACE).is_file():
        space = SharedSpace.load(run.records / SPACE)
    for result in results:
        run.write(result, map_of(space, result.pass_name) if space else None, place)
    run.add_carried(results, place)
    return run.steps


def plan_copy(
    name: str, corpus: Corpus, out: AnyPath, suffix: str, settings: Settings
) -> list[dict[str, Any]]:
    """Return the one pass of ``convert``; shards that are in ``out`` already are finished."""
    run, place = _plan_run(out, settings), output_path(out)
    paths = [place / f"{shard.path.stem}{suffix}" for shard in corpus.shards]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    run.add(name, corpus, missing, Written(corpus, "").row_bytes(settings))
    return run.steps


def _plan_run(out: AnyPath, settings: Settings, part: tuple[int, int] = (0, 1)) -> PlanRun:
    place = output_path(out)
    run = PlanRun(settings, part, reading=False, uploads=place.is_remote)
    run.records = None if settings.mode == "overwrite" else records_of(place)
    return run


def measured_seconds(
    steps: Sequence[dict[str, Any]],
    source: Corpus,
    target: Corpus,
    out: AnyPath,
    settings: Settings | None = None,
    run: Callable[[Corpus, Corpus, StoragePath, Settings], list[dict[str, Any]]] | None = None,
) -> list[float]:
    """Return the seconds of the start and of each pass, from a run on the first shards.

    The run takes two shards a worker of each side, or as many as hold ``MEASURED_BYTES``, so that
    shards overlap as they will; it writes into ``OUT.plan``, which is removed. The start is what
    this command has taken until now, and the end of its process. The pages of corpora that memory
    cannot keep from one pass to the next are dropped first, and the later passes of ``align`` then
    read at the rate of the first. ``run`` returns the summaries of its passes; by default it is
    that of ``align``.
    """
    start = _age_of_command() * (1 + END_SHARE)
    scratch = output_path(f"{str(out).rstrip('/')}.plan")
    settings = settings or Settings()
    quick = replace(settings, progress=False, mode="overwrite", fit_rows=0, memory=0)
    quick = replace(quick, with_metadata=False)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    is_kept = source.nbytes + target.nbytes < memory / 2
    try:
        LOGGER.disabled = True
        first = _beginning(source, settings.workers)
        second = first if source is target else _beginning(target, settings.workers)
        for corpus in () if is_kept or not hasattr(os, "posix_fadvise") else (first, second):
            _drop_pages(corpus)
        passes = (run or _align_passes)(first, second, scratch, quick)
    finally:
        LOGGER.disabled = False
        if scratch.exists():
            scratch.remove_tree()
    seconds = {done["name"]: 1 / done["rows_per_second"] for done in passes}  # of a row
    if not is_kept and "source drift" in seconds:
        slower = max(0.0, seconds["source moments"] - seconds["source drift"])
        seconds |= {name: seconds[name] + slower for name in ("source drift", "apply")}
    if "source drift" in seconds:
        seconds["source residual"] = seconds["source drift"]
    return [start, *(step["rows"] * seconds[step["name"]] for step in steps)]


def _age_of_command() -> float:
    """Return the seconds since the start of this process, or 0 if it is another program's."""
    if not is_own_command() or (ticks := start_time(os.getpid())) is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def _drop_pages(corpus: Corpus) -> None:
    """Let the system forget the local files of a corpus, so that they are read from the disk."""
    for shard in corpus.shards:
        if not shard.path.is_remote:
            with open(str(shard.path), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _align_passes(
    source: Corpus, target: Corpus, out: StoragePath, settings: Settings
) -> list[dict[str, Any]]:
    run = AlignRun(settings)
    with run.output_directory(out):
        run.apply(run.fit(source, target), source, out)
    return [finished.summary() for finished in run.passes]


def plan_report(
    steps: Sequence[dict[str, Any]], seconds: Sequence[float], machines: int = 1
) -> dict[str, Any]:
    """Return the passes with their seconds, and the sums over all passes and the start."""
    start, *durations = seconds
    passes = [
        step | {"seconds": duration / machines}
        for step, duration in zip(steps, durations, strict=True)
    ]
    report: dict[str, Any] = {"passes": passes, "start_seconds": start}
    for name in ("rows", "bytes_read", "bytes_written", "requests", "finished_before", "seconds"):
        values = [step[name] for step in passes]
        report[name] = None if None in values else sum(values)
    report["seconds"] += start
    return report | {"hours": report["seconds"] / 3600}


def rated_seconds(steps: Sequence[dict[str, Any]], read: float, write: float) -> list[float]:
    """Return the seconds of each pass, after 0 for the start, at given rates in bytes a second."""
    return [0.0] + [step["bytes_read"] / read + step["bytes_written"] / write for step in steps]


def format_plan(report: dict[str, Any]) -> str:
    """Return a plan as text."""
    lines = []
    for step in [*report["passes"], report | {"name": "in all"}]:
        requests = "unknown" if step["requests"] is None else f"{step['requests']:,}"
        lines.append(
            f"{step['name']:16} {step['rows']:>15,} rows  {format_bytes(step['bytes_read']):>10} "
            f"read  {format_bytes(step['bytes_written']):>10} written  {requests:>9} requests  "
            f"{step['seconds'] / 3600:9.3f} h"
            + (f"  ({step['finished_before']:,} rows are finished)" * bool(step["finished_before"]))
        )
    return "\n".join(lines)


def _beginning(corpus: Corpus, workers: int) -> Corpus:
    """Return a corpus of the first shards alone, and of a table the first of each modality."""
    enough = corpus.starts.searchsorted(MEASURED_BYTES // corpus.shards[0].row_bytes)
    part, shards = copy.copy(corpus), range(len(corpus.shards))[: max(2 * workers, int(enough))]
    first_shards = corpus.first_shards if isinstance(corpus, SplitCorpus) else ()
    part._take(tuple(corpus.shards[index] for index in sorted({*shards, *first_shards})))
    return part
