"""Job arrays without an engine: n jobs do a part of the shards each, and ``merge`` reads no rows.

Part i of n is every n-th shard. The jobs share an output directory and nothing else; each leaves
its shards' files in ``_stats/``, where merge finds them, and merge and a run of one process write
the same bytes. The order: stats of both sides, merge, stats of the drift (with the half-fitted
aligner that merge wrote), merge, apply, merge.
"""

from __future__ import annotations

from typing import Any

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..corpus.layout import check_apart
from ..storage.paths import AnyPath, output_path
from .align_run import AlignRun, check_columns, describe, describe_result
from .engines.local import Engine
from .output import ALIGNER, check_output
from .passes import Missing, Pass
from .settings import Settings

HALF = "half.safetensors"


def stats(
    rows: Corpus,
    side: str,
    out: AnyPath,
    part: tuple[int, int] = (0, 1),
    aligner: ReAlign | None = None,
    settings: Settings | None = None,
    engine: Engine | None = None,
) -> Pass:
    """Statistics of part ``(i, n)`` of the ``"source"`` or ``"target"`` shards, kept in ``out``.

    With a half-fitted ``aligner`` the drift of source rows sent through it.

    Raises:
        ValueError: an aligner for the target, or for rows of another dimension.
    """
    if aligner is not None and side != "source":
        raise ValueError(f"{rows.path}: the drift is one of source rows; leave --aligner out")
    if aligner is not None and aligner.dimension != rows.dimension:
        got = f"rows have {rows.dimension} columns, the aligner {aligner.dimension}"
        raise ValueError(f"{rows.path}: {got}; give the {HALF} that merge wrote for them")
    run, out = AlignRun(settings or Settings(), part=part, engine=engine), output_path(out)
    check_apart(out, rows)
    with run.keeping(out):
        run.measure(f"{side} {'moments' if aligner is None else 'drift'}", rows, aligner)
    return run.passes[0]


def apply_part(
    aligner: ReAlign,
    source: Corpus,
    out: AnyPath,
    part: tuple[int, int],
    settings: Settings,
    engine: Engine | None = None,
) -> Pass:
    """Align part ``(i, n)`` of the source shards into ``out``."""
    run = AlignRun(settings, part=part, engine=engine)
    run.apply(aligner, source, out)
    return run.passes[0]


def merge(
    source: Corpus, target: Corpus, out: AnyPath, settings: Settings | None = None
) -> tuple[str, dict[str, Any] | None]:
    """Go as far as what is finished in ``out`` allows; say what is next, or give the report.

    Raises:
        ValueError: moments of a shard are missing.
    """
    run, out = AlignRun(settings or Settings(), reading=False), output_path(out)
    check_output(out, source, target, run.settings.mode)
    check_columns(source, target)
    with run.keeping(out):
        aligner = run.half_fit(source, target)
        half, whole = out / HALF, out / ALIGNER
        try:
            drift = run.measure("source drift", source, aligner)
        except Missing as missing:
            aligner.save(half)
            return f"wrote {half}; next: stats --aligner {half} --shard i/n ({missing})", None
        aligner.record_drift(drift)
        half.unlink(missing_ok=True)
        try:
            aligned = run.apply(aligner, source, out)
        except Missing as missing:
            return f"wrote {whole}; next: apply --aligner {whole} --shard i/n ({missing})", None
        aligner.record_residual(aligned)
        aligner.save(whole)
        facts = {"source": describe(source), "target": describe(target)}
        report = run.report(aligner, **facts, result=describe_result(aligner, aligned))
        run.finish(aligner, report)
    return f"wrote {whole}; every shard is aligned", report
