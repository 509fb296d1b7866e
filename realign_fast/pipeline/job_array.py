"""Job arrays without an engine: n jobs take a part of the shards each, and ``merge`` reads no rows.

Part i of n is every n-th shard. The jobs share an output directory and nothing else; each leaves
the checkpoints of its shards in ``_stats/``, where ``merge`` finds them, and ``merge`` writes the
same bytes as a run of one process. The order is: stats of both sides, merge, stats of the drift
(with the half-fitted aligner that merge wrote), merge, apply, merge.
"""

from __future__ import annotations

from typing import Any, Literal

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..interface.option_values import OptionError, UnfinishedShards
from ..storage.paths import AnyPath, output_path
from .align_run import AlignRun, check_aligner, check_columns
from .output import ALIGNER, Written, check_kept, check_output, check_place
from .passes import Pass
from .settings import Settings

HALF = "half.safetensors"
Side = Literal["source", "target"]


def stats(
    run: AlignRun, side: Side, corpus: Corpus, out: AnyPath, aligner: ReAlign | None = None
) -> Pass:
    """Measure the part ``run.part`` of the shards of one side, with checkpoints in ``out``.

    With a half-fitted ``aligner`` the drift of the source is measured instead of its moments.

    Raises:
        ValueError: an aligner for the target, or for rows of another dimension.
    """
    if aligner is not None and side != "source":
        raise OptionError(f"{corpus.path}: the drift is one of source rows; leave --aligner out")
    if aligner is not None:
        check_aligner(aligner, corpus)
    directory = output_path(out)
    check_place(directory, corpus)
    pass_names = (f"{side} moments",) if side == "target" else (f"{side} moments", "apply")
    kept = [Written(corpus, corpus.subfolder, pass_name) for pass_name in pass_names]
    check_kept(directory, kept, run.settings.mode)
    with run.output_directory(directory):
        run.measure(f"{side} {'moments' if aligner is None else 'drift'}", corpus, aligner)
    return run.passes[0]


def merge(
    source: Corpus, target: Corpus, out: AnyPath, settings: Settings | None = None
) -> tuple[str, dict[str, Any] | None, bool]:
    """Go as far as the checkpoints in ``out`` allow.

    Returns:
        A sentence on what is done and what is next, the report once every shard is aligned, and
        whether a step of the array is finished in part.

    Raises:
        UnfinishedShards: moments of a shard are missing.
    """
    run, directory = AlignRun(settings or Settings(), reading=False), output_path(out)
    check_output(directory, [Written(source, source.subfolder)], run.settings, [target])
    check_columns(source, target)
    half_path, path = directory / HALF, directory / ALIGNER
    with run.output_directory(directory):
        *_, aligner = run.half_fit(source, target)
        try:
            drift = run.measure("source drift", source, aligner).moments
        except UnfinishedShards as error:
            aligner.save(half_path)
            next_step = f"stats --aligner {half_path} --shard i/n ({error})"
            return f"wrote {half_path}; next: {next_step}", None, error.finished > 0
        aligner.record_drift(drift)
        half_path.unlink(missing_ok=True)
        try:
            aligned = run.apply(aligner, source, directory)
        except UnfinishedShards as error:
            next_step = f"apply --aligner {path} --shard i/n ({error})"
            return f"wrote {path}; next: {next_step}", None, error.finished > 0
        aligner.record_residual(aligned)
        aligner.save(path)
        report = run.finish(directory, aligner, source, target, aligned)
    return f"wrote {path}; every shard is aligned", report, False
