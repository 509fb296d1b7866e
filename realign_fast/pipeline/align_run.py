"""Fit a map on two corpora and write one of them aligned: shards in, shards out.

Every pass (:mod:`.passes`) maps a task (:mod:`.shard_tasks`) over the shards with an engine and
merges the results in the order of the shards, and a shard is read in fixed batches. Results have
the same bytes for any number of threads or workers, and after a crash. Memory is a few batches a
worker, whatever the size of the corpus.

``align`` is ``fit`` (moments of the source, moments of the target, drift of the source) and then
``apply``.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from os.path import exists
from typing import Any, TypeAlias

import torch

from .. import __version__, ops
from ..align import ReAlign
from ..corpus.corpus import Corpus, common_encoder
from ..interface.option_values import OptionError
from ..methods import NEED_COVARIANCE
from ..moments import Moments, warn_if_far
from ..storage.paths import AnyPath, StoragePath, output_path, records_of, write_json
from .cached_corpus import CachedCorpus
from .carried_files import carry
from .checkpoints import code_version, map_hash
from .engines.local import Engine
from .inspection import shape_of
from .manifest import FORMAT, MANIFEST, PASS_ORDER, files_before, read_manifest, saved_moments
from .output import (
    ALIGNER,
    REPORT,
    Written,
    check_kept,
    check_output,
    check_place,
    check_scratch,
    remove_reports,
)
from .passes import LOGGER, PassRunner
from .sampling import Sample, measure_sample, rows_to_fit, sampling_errors
from .settings import Settings
from .table_rows import AnyMap, moments_for

_SAME = 1e-9  # distance of two means of the same rows, in files that are cut elsewhere

CorpusLike: TypeAlias = "AnyPath | Corpus"


class AlignRun(PassRunner):
    """The steps of ``align``, ``fit`` and ``apply``, and what goes into their ``report.json``."""

    sample: dict[str, Any] | None = None  # the standard errors of a fit on a sample
    count: int | None = None  # rows of each corpus that are measured; None is every row
    run_sample: Callable[..., Sample] = measure_sample
    earlier: dict[str, bytes] | None = None  # the reports of the run before, once they are removed

    def measure(
        self,
        name: str,
        corpus: Corpus,
        row_map: AnyMap | None = None,
        covariance: bool | None = None,
    ) -> Sample:
        """Measure a corpus, or a sample of it, or its rows sent through a map.

        Without ``covariance`` the method of the settings decides whether there is one.
        """
        if covariance is None:
            covariance = row_map is None and self.settings.method in NEED_COVARIANCE
        if self.count is not None:
            return self.run_sample(name, corpus, self.count, covariance, row_map)
        task = self.task(name, corpus, row_map, covariance=covariance)
        total, entries = moments_for(corpus, covariance), []
        if self.settings.mode == "extend" and task.checkpoints and row_map is None:
            for moments, entry in saved_moments(task.checkpoints, task.identities):
                total.merge(moments)
                entries.append(entry)
                self.extended[name] = self.extended.get(name, 0) + entry["rows"]
        return Sample(self.run_pass(task, total, entries), corpus.num_rows)

    def fit(self, source: Corpus, target: Corpus, *, residual: bool = False) -> ReAlign:
        """Fit a map from ``source`` to ``target``; ``residual`` reads the source a third time."""
        check_columns(source, target)
        self.count, chosen = rows_to_fit(self.settings, source, target)
        if self.count and self.settings.fit_rows is None:  # before hours of reading, not after
            message = f"fitting on {chosen}; --fit-rows all reads every row"
            LOGGER.warning(message, extra={"event": {"event": "sample"}})
        y, x, aligner = self.half_fit(source, target)
        drift = self.measure("source drift", source, aligner)
        aligner.record_drift(drift.moments)
        if self.count:
            self.sample = sampling_errors(y, x, drift, self.settings.seed)
            self.count = None
        elif residual:
            aligner.record_residual(self.measure("source residual", source, aligner).moments)
        return aligner

    def half_fit(self, source: Corpus, target: Corpus) -> tuple[Sample, Sample, ReAlign]:
        """Measure both sides; fit the map without its last step, which needs the drift."""
        y, x = self.measure("source moments", source), self.measure("target moments", target)
        return y, x, self._from_moments((source, y.moments), (target, x.moments))

    def _from_moments(self, *sides: tuple[Corpus, Moments]) -> ReAlign:
        for corpus, moments in sides:
            if not moments.count:
                raise ValueError(
                    f"{corpus.path}: no usable row ({moments.zero_rows} zero, "
                    f"{moments.nonfinite_rows} non-finite); embed it again"
                )
        y, x = (moments for _, moments in sides)
        check_different(*sides)
        method, shrinkage = self.settings.method, self.settings.shrinkage
        aligner = ReAlign.from_moments(y, x, method=method, shrinkage=shrinkage)
        aligner.encoder = common_encoder(*((corpus.path, corpus.encoder) for corpus, _ in sides))
        return aligner

    def apply(self, aligner: ReAlign, source: Corpus, out: AnyPath) -> Moments:
        """Write ``source`` aligned, with its aligner; return the moments.

        Shards go to ``out / source.subfolder`` under their own names; each appears complete or not
        at all. The moments are those of the result before it is rounded to its dtype. Rows of
        another dimension, and an ``out`` that :func:`.output.check_output` refuses, are errors.
        """
        directory = output_path(out)
        result = Written(source, source.subfolder)
        if self.out != directory:  # else whoever opened it has checked it
            check_output(directory, [result], self.settings)
        check_columns(source, aligner)
        with self.output_directory(directory):
            self.earlier = remove_reports(records_of(directory))
            if self.part[1] == 1:
                aligner.save(records_of(directory) / ALIGNER)
            moments = self.write(result, aligner, directory)
            if self.part[1] == 1 and moments.count:
                mean, count = aligner.target_mean, int(aligner.target_count)
                warn_if_far(str(source.path), moments.mean, moments.count, mean, count)
            return moments

    def write(self, result: Written, row_map: AnyMap, out: StoragePath) -> Moments:
        """Write the rows of a corpus, sent through a map, into a folder of ``out``."""
        folder = result.folder, out / result.folder
        task = self.task(result.pass_name, result.corpus, row_map, result=folder)
        earlier = read_manifest(records_of(out))["passes"].get(result.pass_name)
        replaced = 0
        if task.checkpoints and earlier is None:  # a run that was killed before its manifest
            replaced = task.checkpoints.other_results(result.corpus.shards, task.identities)
        elif task.checkpoints and earlier["facts"] != task.checkpoints.facts:
            replaced = len(earlier["shards"])
        if replaced:
            LOGGER.warning(
                f"{task.folder}: holds {replaced} shards of other options or of "
                "another map; they are written anew, and are of two maps until this run ends"
            )
        if self.reading and (message := check_scratch(out, [result], self.settings)):
            LOGGER.info(message, extra={"event": {"event": "scratch"}})
        moments = self.run_pass(task, moments_for(result.corpus), [])
        if self.part[1] == 1:
            has_columns = result.columns is None and not self.settings.converted_to(result.corpus)
            result.corpus.finish(out / result.folder, keeps_columns=has_columns)
            if self.settings.with_metadata:
                self.carried |= carry(out, result.carried_files, files_before(records_of(out)))
        return moments

    def finish(
        self,
        out: StoragePath,
        aligner: ReAlign,
        source: Corpus,
        target: Corpus | None = None,
        aligned: Moments | None = None,
    ) -> dict[str, Any]:
        """Write the manifest and then the report of what was done; return the report."""
        report: dict[str, Any] = {"source": shape_of(source)}
        if target is not None:
            report["target"] = shape_of(target)
            if self.reading:
                report["fitted_on"] = rows_to_fit(self.settings, source, target)[1]
        if aligned is not None:
            report["result"] = {"centroid_gap": None, "trace": None}
            if aligned.count:  # else no row has a direction
                gap = float((aligned.mean - aligner.target_mean).norm())
                report["result"] = {"centroid_gap": gap, "trace": aligned.trace}
        names = "bad_rows", "batch_bytes", "method", "shrinkage"
        report |= {"fitted": aligner.record, "sample": self.sample}
        return self.write_report(out, names, map_hash(aligner), report)

    def write_report(
        self, out: StoragePath, options: Sequence[str], made_by: str | None, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the manifest and the report, which has ``facts`` and what every run knows.

        ``options`` are the names of settings for the manifest, ``made_by`` is the hash of the map.
        A run that changes nothing leaves the reports of the run that did the work.
        """
        records = records_of(out)
        before, earlier = read_manifest(records), self.earlier
        earlier = remove_reports(records) if earlier is None else earlier
        passes = before["passes"] | self.manifest_passes
        names = dict.fromkeys([*PASS_ORDER, *sorted(passes)])  # queries may be of other roles
        files = files_before(records) | self.carried
        for name in [*files] if self.settings.with_metadata else ():
            if not (name in self.carried or (out / name).exists() or exists(files[name]["path"])):
                del files[name]  # the user removed it at both places
        manifest = {
            "format": FORMAT,
            "code": code_version(self.settings.device),
            "settings": {name: getattr(self.settings, name) for name in options},
            "aligner": made_by,
            "passes": {name: passes[name] for name in names if name in passes},
        }
        if files:
            manifest["files"] = [files[name] for name in sorted(files)]
        write_json(records / MANIFEST, manifest)
        peak_unit = 1 if sys.platform == "darwin" else 1024
        report = facts | {
            "bad_rows": self.settings.bad_rows,
            "passes": [finished.summary() for finished in self.passes],
            "extended": self.extended,
            "carried_files": len(self.carried),
            "peak_memory_bytes": peak_unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "threads": torch.get_num_threads(),
            "kernels": {op: " ".join(ops.backend_of(op, self.settings.device)) for op in ops.OPS},
            "device": self.settings.device,
            "versions": {"realign_fast": __version__, "torch": torch.__version__},
        }
        if before == {"files": []} | manifest and not any(p.bytes_written for p in self.passes):
            with suppress(KeyError, TypeError, ValueError):  # none, or a damaged one
                kept = json.loads(earlier[REPORT])
                if all(type(kept[name]) is type(value) for name, value in report.items()):
                    for name, content in earlier.items():
                        (records / name).write_whole(content)
                    return report
        write_json(records / REPORT, report)
        return report


def align(
    source: CorpusLike,
    target: CorpusLike,
    out: AnyPath,
    settings: Settings | None = None,
    engine: Engine | None = None,
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
        writes: ``False`` writes the aligner and its records alone.

    Raises:
        ValueError, TypeError, OSError: a file, a row or the output directory is refused; the
            message says which one and what to do.
    """
    run, directory = AlignRun(settings or Settings(), engine=engine), output_path(out)
    source = source if isinstance(source, Corpus) else Corpus(source, "text")
    target = target if isinstance(target, Corpus) else Corpus(target, "image")
    memory = run.settings.memory
    if memory and (run.settings.workers > 1 or engine):
        option = "--engine ray" if engine else "--workers"
        raise OptionError(f"memory: rows are kept in one process; give --memory or {option}")
    if source.nbytes <= memory:
        source = CachedCorpus(source)
    check_sides(directory, source, target, run.settings, writes)
    aligned = None
    with run.output_directory(directory):
        aligner = run.fit(source, target, residual=not writes)
        if writes:
            aligned = run.apply(aligner, source, directory)
            aligner.record_residual(aligned)
        aligner.save(records_of(directory) / ALIGNER)
        return run.finish(directory, aligner, source, target, aligned)


def check_sides(
    out: StoragePath, source: Corpus, target: Corpus, settings: Settings, writes: bool = True
) -> None:
    """Refuse two sides, or an output of ``align`` or (without ``writes``) of ``fit`` on them."""
    result = Written(source, source.subfolder)
    if writes:
        check_output(out, [result], settings, [target])
        folder = result.other_side if settings.with_metadata else None
        if folder and folder.resolve() not in {s.path.parent.resolve() for s in target.shards}:
            raise OptionError(
                f"with-metadata: {folder} would go along, but the rows move to {target.path}; give "
                f"{source.path} for both sides, or leave the option out"
            )
    else:
        check_place(out, source, target)
        check_kept(out, [result], settings.mode)
    check_columns(source, target)


def check_different(source: tuple[Corpus, Moments], target: tuple[Corpus, Moments]) -> None:
    """Raise ValueError for two corpora whose rows have the same moments: copies of one another.

    One object in both places is allowed: a plan measures its speed with it.
    """
    (source_corpus, y), (target_corpus, x) = source, target
    is_same = y.count == x.count and y.dimension == x.dimension
    is_same = is_same and float((y.mean - x.mean).norm()) + abs(y.trace - x.trace) <= _SAME
    if is_same and source_corpus is not target_corpus:
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
