"""A corpus measured, a map fitted, a corpus aligned: shards on disk in, shards on disk out.

Every pass (:mod:`passes`) maps a work (:mod:`shard_work`) over the shards with an engine and merges
in shard order, and a shard is walked in fixed batches: results have the same bytes for any number
of threads or workers, and after a crash. Memory is a few batches a worker, never the corpus.

``align`` = ``fit`` (moments of the source, of the target, drift of the source) + ``apply``.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from .. import __version__, ops
from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..methods import NEED_COVARIANCE
from ..moments import Moments
from ..storage.paths import AnyPath, output_path, write_json
from .cached_corpus import CachedCorpus
from .checkpoints import code_version, map_hash
from .engines.local import Engine
from .manifest import saved_moments, write_manifest
from .output import ALIGNER, REPORT, check_output
from .passes import PassRunner
from .sampling import Sampled, errors, measure_sample, rows_to_fit
from .settings import Settings
from .shard_tasks import AlignWork, ShardWork


class AlignRun(PassRunner):
    """What a command did: its passes in order, and what goes into ``report.json``."""

    sample: dict[str, Any] | None = None  # error bars of a fit on a sample

    def measure(self, name: str, corpus: Corpus, aligner: ReAlign | None = None) -> Moments:
        """Moments of a corpus, of its rows sent through an aligner if one is given."""
        covariance = aligner is None and self.settings.method in NEED_COVARIANCE
        work = self.work(ShardWork, name, corpus, covariance=covariance, aligner=aligner)
        total, entries = Moments(covariance, accurate=covariance), []
        if self.settings.mode == "extend" and aligner is None and self.out:
            for moments, entry in saved_moments(
                self.out, name, work.checkpoints.facts, work.identities
            ):
                total.merge(moments)
                entries.append(entry)
                self.extended[name] = self.extended.get(name, 0) + entry["rows"]
        return self.walk(work, total, entries)

    def fit(self, source: Corpus, target: Corpus, *, residual: bool = False) -> ReAlign:
        """A :class:`ReAlign` from two corpora; ``residual`` reads the source a third time."""
        check_columns(source, target)
        count, _ = rows_to_fit(self.settings, source, target)
        if count:
            return self.fit_sample(source, target, count)
        aligner = self.half_fit(source, target)
        aligner.record_drift(self.measure("source drift", source, aligner))
        if residual:
            aligner.record_residual(self.measure("source residual", source, aligner))
        return aligner

    def half_fit(self, source: Corpus, target: Corpus) -> ReAlign:
        """The map without its last step, from the moments of both sides."""
        source_moments = self.measure("source moments", source)
        target_moments = self.measure("target moments", target)
        return self._half(source, source_moments, target, target_moments)

    def fit_sample(self, source: Corpus, target: Corpus, count: int) -> ReAlign:
        """The map from ``count`` rows of each side; its error bars go into the report."""
        covariance = self.settings.method in NEED_COVARIANCE

        def measure(name: str, corpus: Corpus, aligner: ReAlign | None = None) -> Sampled:
            through = aligner.row_map if aligner is not None else None
            spread = covariance and aligner is None
            return measure_sample(self, name, corpus, count, spread, through)

        y, x = measure("source sample", source), measure("target sample", target)
        aligner = self._half(source, y.moments, target, x.moments)
        drift = measure("drift of sample", source, aligner)
        aligner.record_drift(drift.moments)
        self.sample = errors(y, x, drift, self.settings.seed)
        return aligner

    def _half(self, source: Corpus, of_source: Moments, target: Corpus, of_target: Moments):
        for corpus, moments in ((source, of_source), (target, of_target)):
            if not moments.count:
                bad = f"{moments.zero_rows} zero, {moments.nonfinite_rows} non-finite"
                raise ValueError(f"{corpus.path}: no usable row ({bad}); embed it again")
        options = {"method": self.settings.method, "shrinkage": self.settings.shrinkage}
        return ReAlign.from_moments(of_source, of_target, **options)

    def apply(self, aligner: ReAlign, source: Corpus, out: AnyPath) -> Moments:
        """Write ``source`` aligned, in its own dtype, with its aligner; return the moments.

        Shards go to ``out / source.subfolder`` under their own names, each whole or not at all.
        The moments are those of the result before it is rounded to the corpus's dtype.
        """
        out = output_path(out)
        check_output(out, source, None, self.settings.mode, self.settings.workers)
        if aligner.dimension != source.dimension:
            got = f"rows have {source.dimension} columns, the aligner {aligner.dimension}"
            raise ValueError(
                f"{source.path}: {got}; align the output of the encoder it was fitted on"
            )
        with self.keeping(out):
            (out / REPORT).unlink(missing_ok=True)
            if self.part[1] == 1:
                aligner.save(out / ALIGNER)
            folder = out / source.subfolder
            work = self.work(AlignWork, "apply", source, aligner=aligner, folder=folder)
            moments = self.walk(work, Moments(), [])
            if self.part[1] == 1:
                source.finish(folder)
            return moments

    def finish(self, aligner: ReAlign, report: dict[str, Any]) -> None:
        """Write the manifest of what was made, then the report."""
        chosen = ("bad_rows", "batch_bytes", "method", "shrinkage")
        settings = {name: getattr(self.settings, name) for name in chosen}
        write_manifest(
            self.out, code_version(self.settings.device), settings, self.made, map_hash(aligner)
        )
        write_json(self.out / REPORT, report)

    def report(self, aligner: ReAlign, **facts: Any) -> dict[str, Any]:
        """Everything a reader needs to judge the run, as plain numbers."""
        peak_unit = 1 if sys.platform == "darwin" else 1024
        return {
            **facts,
            "bad_rows": self.settings.bad_rows,
            "fitted": aligner.record,
            "sample": self.sample,
            "passes": [one.summary() for one in self.passes],
            "extended": self.extended,
            "peak_memory_bytes": peak_unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "threads": torch.get_num_threads(),
            "kernels": {op: " ".join(ops.backend_of(op, self.settings.device)) for op in ops.OPS},
            "device": self.settings.device,
            "versions": {"realign_fast": __version__, "torch": torch.__version__},
        }


def align(
    source: Corpus | AnyPath,
    target: Corpus | AnyPath,
    out: AnyPath,
    settings: Settings | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Fit on two corpora, write the source aligned into ``out``, and return the report.

    ``source`` and ``target`` are corpora, directories of shards, or a clip-retrieval root, whose
    ``text_emb/`` is then the source and whose ``img_emb/`` the target. An ``engine``, such as
    :class:`ray_engine.RayTasks`, takes the place of ``settings.workers``. ValueError, TypeError or
    OSError says what is wrong with a file, a row or the output directory.
    """
    run, out = AlignRun(settings or Settings(), engine=engine), output_path(out)
    source_rows = cached_source(source, run.settings, engine)
    target_rows = target if isinstance(target, Corpus) else Corpus(target, "image")
    check_output(out, source_rows, target_rows, run.settings.mode, run.settings.workers)
    check_columns(source_rows, target_rows)
    with run.keeping(out):
        aligner = run.fit(source_rows, target_rows)
        aligned = run.apply(aligner, source_rows, out)
        aligner.record_residual(aligned)
        aligner.save(out / ALIGNER)
        facts = {"source": describe(source_rows), "target": describe(target_rows)}
        facts["fitted_on"] = rows_to_fit(run.settings, source_rows, target_rows)[1]
        report = run.report(aligner, **facts, result=describe_result(aligner, aligned))
        run.finish(aligner, report)
    return report


def cached_source(
    source: Corpus | AnyPath, settings: Settings, engine: Engine | None = None
) -> Corpus | CachedCorpus:
    """The corpus to move, kept in memory between passes where ``settings.memory`` holds it."""
    corpus = source if isinstance(source, Corpus) else Corpus(source, "text")
    if settings.memory and (settings.workers > 1 or engine):
        others = "--engine ray" if engine else "--workers"
        raise ValueError(f"memory: rows are kept in one process; give --memory or {others}")
    return CachedCorpus(corpus) if corpus.nbytes <= settings.memory else corpus


def check_columns(source: Corpus, target: Corpus) -> None:
    """Refuse two corpora that cannot be of one encoder."""
    if source.dimension != target.dimension:
        got = f"rows have {source.dimension} columns, in {target.path} {target.dimension}"
        raise ValueError(f"{source.path}: {got}; embed both with one encoder")


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a corpus is, for a report."""
    return {
        "path": str(corpus.path),
        "shards": len(corpus.shards),
        "rows": corpus.num_rows,
        "dimension": corpus.dimension,
        "dtype": str(corpus.dtype).removeprefix("torch."),
        "bytes": corpus.nbytes,
    }


def describe_result(aligner: ReAlign, aligned: Moments) -> dict[str, Any]:
    """Where aligned rows came to lie, for a report; ``None`` where no row had a direction."""
    if not aligned.count:
        return {"centroid_gap": None, "trace": None}
    gap = float((aligned.mean - aligner.target_mean).norm())
    return {"centroid_gap": gap, "trace": aligned.trace}
