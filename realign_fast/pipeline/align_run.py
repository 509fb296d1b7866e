"""Fit a map on two corpora and write one of them aligned: shards in, shards out.

Every pass (:mod:`.passes`) maps a task (:mod:`.shard_tasks`) over the shards with an engine and
merges the results in the order of the shards, which are read in fixed batches: the bytes are the
same for any number of threads or workers, and after a crash. Memory is a few batches a worker.

The jobs of an array run the same command with a part of the shards each, and share an output and
nothing else. A job goes on to the next pass once the checkpoints of all parts of this one are
there. A run without a part ends the array: it finds every shard finished.
"""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import __version__, ops
from ..align import ReAlign
from ..corpus.corpus import Corpus, common_encoder
from ..interface.option_values import UnfinishedShards
from ..methods import NEED_COVARIANCE, few_rows
from ..moments import Moments, warn_if_far
from ..shared_space import QUERIES, SharedSpace
from ..storage.paths import AnyPath, StoragePath, output_path, records_of, write_json
from ..storage.tensor_file import tensor_digest
from .checkpoints import STATS, AnyMap, code_version, map_hash
from .engines.local import Engine
from .manifest import FORMAT, MANIFEST, read_manifest
from .output import ALIGNER, REPORT, SPACE, Written, check_output, remove_reports
from .passes import LOGGER, Part, PassRunner
from .sampling import measure_sample, sampling_errors
from .settings import Settings

_SAME = 1e-9  # distance of two means of the same rows, in files that are cut elsewhere

_NEXT_ROUND = (
    "this was not the last round: once all jobs have ended, run them with the same options again"
)
LAST_STEP = "the same command without --shard, once all jobs of this round have ended"

CorpusLike: TypeAlias = "AnyPath | Corpus"
Fitted: TypeAlias = ReAlign | SharedSpace


class Measure(NamedTuple):
    """A pass that measures a corpus, or a sample of its rows, perhaps sent through a map."""

    name: str
    corpus: Corpus
    row_map: AnyMap | None = None
    sample: int | None = None  # rows; None is every row, with checkpoints


class AlignRun(PassRunner):
    """The steps of ``align``, ``fit`` and ``apply``, and what goes into their ``report.json``."""

    sample: dict[str, Any] | None = None  # the standard errors of a fit on a sample
    map_of_jobs: StoragePath | None = None  # which the last run of an array removes

    def measure(self, passes: Iterable[Measure], covariance: bool = False) -> list[Moments]:
        """Measure corpora in passes that do not depend on each other.

        A job of an array measures its part of each, then takes the checkpoints of all parts; it is
        an ``UnfinishedShards`` once all passes are done if some are missing.
        """
        totals, unfinished = list[Moments](), list[UnfinishedShards]()
        for name, corpus, row_map, count in passes:
            try:
                if count is not None:
                    total = measure_sample(self, name, corpus, count, covariance, row_map)
                else:
                    total = self.run_pass(self.task(name, corpus, row_map, covariance=covariance))
                if self.part[1] > 1 and count is None:
                    reader = copy.copy(self)  # of what all jobs have finished
                    reader.part, reader.reading, reader.out, reader.passes = (0, 1), False, None, []
                    task = reader.task(name, corpus, row_map, covariance=covariance)
                    total = reader.run_pass(task)
            except UnfinishedShards as error:
                unfinished.append(error)
                continue
            totals.append(total)
            if not total.count:
                bad_rows = f"({total.zero_rows} zero, {total.nonfinite_rows} non-finite)"
                raise ValueError(f"{corpus.path}: no usable row {bad_rows}; embed it again")
        if unfinished:
            raise unfinished[0]
        return totals

    def fit(self, source: Corpus, target: Corpus, *, residual: bool = False) -> ReAlign:
        """Fit a map from ``source`` to ``target``; ``residual`` reads the source a third time."""
        check_columns(source, target)
        count = self.settings.fit_rows or None
        sides = ("source moments", source), ("target moments", target)
        covariance = self.settings.method in NEED_COVARIANCE
        y, x = self.measure((Measure(*side, sample=count) for side in sides), covariance)
        check_different((source, y), (target, x))
        method, rows = self.settings.method, min(y.count, x.count)
        fault = few_rows(method, self.settings.shrinkage, rows, y.dimension)
        if fault and self.reading:
            LOGGER.warning(fault)
        aligner, known = self._fitted(y, x), [(c.path, c.encoder) for c in (source, target)]
        aligner.encoder = common_encoder(*known)
        (drift,) = self.measure([Measure("source drift", source, aligner, count)])
        aligner.record_drift(drift)
        if count:
            corpus_rows, seed = (source.num_rows, target.num_rows), self.settings.seed
            self.sample = sampling_errors(y, x, drift, corpus_rows, seed)
        elif residual:
            (moved,) = self.measure([Measure("source residual", source, aligner)])
            aligner.record_residual(moved)
        return aligner

    def _fitted(self, source: Moments, target: Moments) -> ReAlign:
        """Return the map without its last step; all jobs of an array take that of the first one.

        LAPACK gives other last bits on another type of processor, and with them other keys.
        """
        method, shrinkage = self.settings.method, self.settings.shrinkage
        digests = [tensor_digest(m.state_dict()).partition("=")[2] for m in (source, target)]
        name = f"map-{method}-{shrinkage}-{'-'.join(digests)}.safetensors"
        path = self.records / STATS / name if self.records else None
        if path is None or method not in NEED_COVARIANCE or not path.exists():
            aligner = ReAlign.from_moments(source, target, method=method, shrinkage=shrinkage)
            is_job = self.part[1] > 1 and self.reading and method in NEED_COVARIANCE
            if path is None or not is_job:
                return aligner
            aligner.save(path)
        self.map_of_jobs = path
        return ReAlign.load(path)  # another job may have written its own meanwhile

    def apply(self, aligner: ReAlign, source: Corpus, out: AnyPath) -> Moments:
        """Write ``source`` aligned, and the aligner; return the moments of the rows, not rounded.

        Shards go to ``out / source.subfolder`` under their own names. Rows of another dimension,
        and an ``out`` that :func:`.output.check_output` refuses, are errors.
        """
        directory = output_path(out)
        work = align_work(source, None, directory, self.settings, aligner=aligner)
        with self.output_directory(directory):
            return self.write_all(aligner, work.results, directory)[0]

    def write_all(
        self, fitted: Fitted, results: Sequence[Written], out: StoragePath
    ) -> list[Moments]:
        """Write corpora through a map, and the map; warn of rows far from those fitted on."""
        maps, records, is_whole = checked_maps(fitted, results), records_of(out), self.part[1] == 1
        remove_reports(records)
        if is_whole:
            fitted.save(records / (ALIGNER if isinstance(fitted, ReAlign) else SPACE))
        written = []
        for result, row_map in zip(results, maps, strict=True):
            written.append(moments := self.write(result, row_map, out))
            if is_whole and moments.count:
                _, mean, count = map_of(fitted, result.pass_name)
                warn_if_far(str(result.corpus.path), moments.mean, moments.count, mean, count)
        return written

    def write(self, result: Written, row_map: AnyMap, out: StoragePath) -> Moments:
        """Write the rows of a corpus, sent through a map, into a folder of ``out``."""
        folder = result.folder, out / result.folder
        task = self.task(result.pass_name, result.corpus, row_map, result=folder)
        if self.out and task.checkpoints:
            earlier = read_manifest(task.checkpoints.records)["passes"].get(result.pass_name)
            if earlier and earlier["facts"] != task.checkpoints.facts:
                LOGGER.warning(
                    f"{folder[1]}: holds {len(earlier['shards'])} shards of other options or of "
                    "another map; they are written anew, and are of two maps until this run ends"
                )
        moments = self.run_pass(task)
        if self.out and self.part[1] == 1:
            result.corpus.finish(out / result.folder, keeps_columns=result.blocks == 1)
        return moments

    def write_report(
        self, out: StoragePath, options: Sequence[str], made_by: str | None, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the manifest, with the named settings and the hash of the map, and the report."""
        records = records_of(out)
        manifest = {
            "format": FORMAT,
            "code": code_version(self.settings.device),
            "settings": {name: getattr(self.settings, name) for name in options},
            "aligner": made_by,
            "passes": read_manifest(records)["passes"] | self.manifest_passes,
        }
        write_json(records / MANIFEST, manifest)
        peak_unit = 1 if sys.platform == "darwin" else 1024
        report = facts | {
            "bad_rows": self.settings.bad_rows,
            "passes": [finished.summary() for finished in self.passes],
            "peak_memory_bytes": peak_unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "threads": torch.get_num_threads(),
            "kernels": {op: " ".join(ops.backend_of(op, self.settings.device)) for op in ops.OPS},
            "device": self.settings.device,
            "versions": {"realign_fast": __version__, "torch": torch.__version__},
        }
        write_json(records / REPORT, report)
        return report

    def job_report(self, unfinished: UnfinishedShards | None = None) -> dict[str, Any]:
        """Return what a job of an array did, and what is next; ``unfinished`` ended it early."""
        reason = str(unfinished).partition(";")[0]
        next_step = f"{_NEXT_ROUND} ({reason})" if unfinished else LAST_STEP
        passes = [finished.summary() for finished in self.passes]
        return {"complete": False, "next": next_step, "passes": passes}


class Work(NamedTuple):
    """What a command does: passes that fit a map, and corpora that are written through it."""

    out: StoragePath
    settings: Settings
    results: Sequence[Written]
    fit: Callable[[AlignRun], Fitted]
    finish: Callable[[AlignRun, Any, list[Moments]], dict[str, Any]]  # returns the report
    measures: Sequence[Measure] = ()  # the passes of ``fit``, for a plan
    note: str = ""  # what a plan cannot know


def execute(work: Work, engine: Engine | None = None, part: Part = (0, 1)) -> dict[str, Any]:
    """Do the work, or the part of it of a job; return the report (see :func:`align`)."""
    run = AlignRun(work.settings, part, engine=engine)
    with run.output_directory(work.out):
        try:
            fitted = work.fit(run)
        except UnfinishedShards as error:
            return run.job_report(error)
        written = run.write_all(fitted, work.results, work.out)
        if part[1] > 1:
            return run.job_report()
        return work.finish(run, fitted, written)


def align(
    source: CorpusLike,
    target: CorpusLike,
    out: AnyPath,
    settings: Settings | None = None,
    engine: Engine | None = None,
    part: Part = (0, 1),
    *,
    writes: bool = True,
) -> dict[str, Any]:
    """Fit on two corpora, write the source aligned into ``out``, and return the report.

    Args:
        source, target: corpora, directories of shards, or a clip-retrieval root, whose
            ``text_emb/`` is then the source and whose ``img_emb/`` the target.
        out: a directory or a URL.
        settings: the options of the run.
        engine: takes the place of ``settings.workers``, such as :class:`.ray_driver.RayTasks`.
        part: ``(i, n)`` is job i (from 0) of an array of n. It returns what it did and the command
            that is ``next``.
        writes: ``False`` writes the aligner and its records alone.

    Raises:
        ValueError, TypeError, OSError: a file, a row or the output directory is refused; the
            message says which one and what to do.
    """
    source = source if isinstance(source, Corpus) else Corpus(source, "text")
    target = target if isinstance(target, Corpus) else Corpus(target, "image")
    work = align_work(source, target, output_path(out), settings or Settings(), writes)
    return execute(work, engine, part)


def align_work(
    source: Corpus,
    target: Corpus | None,
    out: StoragePath,
    settings: Settings,
    writes: bool = True,
    aligner: ReAlign | None = None,
) -> Work:
    """Return the work of ``align``, without ``writes`` of ``fit``, with an aligner of ``apply``."""
    results, others = [Written(source, source.subfolder)], [target] if target is not None else []
    check_output(out, results, others, writes)
    measures, fitted_on = list[Measure](), "every row"
    if aligner is not None:
        check_columns(source, aligner)
    if target is not None:
        check_columns(source, target)
        count = settings.fit_rows or None
        sides = ("source moments", source), ("target moments", target), ("source drift", source)
        measures = [Measure(*side, sample=count) for side in sides]
        if count:
            rows = [f"{min(count, c.num_rows):,} of {c.num_rows:,}" for c in (source, target)]
            fitted_on = f"a sample of {rows[0]} source rows and {rows[1]} target rows"
        elif not writes:
            measures.append(Measure("source residual", source))

    def fit(run: AlignRun) -> ReAlign:
        """Return the given aligner, or fit one."""
        if aligner is not None:
            return aligner
        assert target is not None
        return run.fit(source, target, residual=not writes)

    def finish(run: AlignRun, fitted: Any, written: list[Moments]) -> dict[str, Any]:
        """Write the aligner, which knows its residual now, the manifest and the report."""
        report: dict[str, Any] = {"source": shape_of(source)}
        if target is not None:
            report |= {"target": shape_of(target), "fitted_on": fitted_on}
        for moments in written:
            report["result"] = {"centroid_gap": None, "trace": None}
            if moments.count:  # else no row has a direction
                gap = float((moments.mean - fitted.target_mean).norm())
                report["result"] = {"centroid_gap": gap, "trace": moments.trace}
            if aligner is None:
                fitted.record_residual(moments)
        fitted.save(records_of(out) / ALIGNER)
        if run.map_of_jobs:
            run.map_of_jobs.unlink()
        report |= {"fitted": fitted.record, "sample": run.sample}
        options = "bad_rows", "batch_bytes", "method", "shrinkage"
        return run.write_report(out, options, map_hash(fitted), report)

    return Work(out, settings, results if writes else [], fit, finish, measures)


def shape_of(corpus: Corpus) -> dict[str, Any]:
    """Return where a corpus is and how much it holds, as plain values."""
    return {
        "path": str(corpus.path),
        "shards": len(corpus.shards),
        "rows": corpus.num_rows,
        "dimension": corpus.dimension,
        "dtype": str(corpus.dtype).removeprefix("torch."),
        "bytes": corpus.nbytes,
    }


def check_different(source: tuple[Corpus, Moments], target: tuple[Corpus, Moments]) -> None:
    """Raise ValueError for two corpora whose rows have the same moments: copies of one another."""
    (source_corpus, y), (target_corpus, x) = source, target
    if (y.count, y.dimension) != (x.count, x.dimension):
        return
    if float((y.mean - x.mean).norm()) + abs(y.trace - x.trace) <= _SAME:
        raise ValueError(
            f"{source_corpus.path}: its {y.count:,} rows have the mean and the trace of those of "
            f"{target_corpus.path}: the two are one side; give the rows of two modalities"
        )


def check_columns(corpus: Corpus, other: Corpus | AnyMap) -> None:
    """Raise ValueError for rows that are not of the encoder of another corpus, or of a map."""
    name = "the aligner" if isinstance(other, ReAlign) else "the space"
    place = f"in {(name := str(other.path))}" if isinstance(other, Corpus) else name
    if corpus.dimension != other.dimension:
        raise ValueError(
            f"{corpus.path}: rows have {corpus.dimension} columns, {place} {other.dimension}; "
            "give rows of one encoder"
        )
    if isinstance(other, Corpus | ReAlign):
        common_encoder((corpus.path, corpus.encoder), (name, other.encoder))


def checked_maps(fitted: Fitted, results: Sequence[Written]) -> list[AnyMap]:
    """Return the maps of results; raise ValueError for rows of another encoder."""
    maps = [map_of(fitted, result.pass_name)[0] for result in results]
    for result, row_map in zip(results, maps, strict=True):
        check_columns(result.corpus, row_map)
    return maps


def map_of(fitted: Fitted, pass_name: str) -> tuple[AnyMap, Tensor, int]:
    """Return the map of a pass that writes, the mean [D] to expect of its rows, and of how many."""
    if isinstance(fitted, ReAlign):
        return fitted, fitted.target_mean, int(fitted.target_count)
    role = pass_name.removeprefix("apply ")
    if role.endswith(QUERIES):
        role = role.removesuffix(QUERIES)
        return fitted.query_map(role), *fitted.query_mean(role)
    return fitted.document_map(role), fitted.sides[role].centre, fitted.sides[role].count
