"""Job arrays without an engine: n jobs take a part of the shards each, and ``merge`` reads no rows.

Part i of n is every n-th shard. The jobs share an output directory and nothing else; each leaves
the checkpoints of its shards in ``_stats/``, where ``merge`` finds them, and ``merge`` writes the
same bytes as a run of one process. The order is: stats of both sides, merge, stats of the drift
(with the half-fitted aligner that merge wrote), merge, apply, merge.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..interface.option_values import OptionError, Step, UnfinishedShards
from ..storage.paths import AnyPath, output_path, records_of
from .align_run import AlignRun, check_columns, check_sides
from .output import ALIGNER, Written, check_kept, check_place, kinds_in
from .passes import Pass
from .settings import Settings
from .unify_run import LAST_STEP

HALF = "half.safetensors"
Side = Literal["source", "target"]


def stats(
    run: AlignRun, side: Side, corpus: Corpus, out: AnyPath, aligner: ReAlign | None = None
) -> Pass:
    """Measure the part ``run.part`` of the shards of one side, with checkpoints in ``out``.

    With a half-fitted ``aligner`` the drift of the source is measured instead of its moments.
    """
    if aligner is not None and side != "source":
        raise OptionError(f"{corpus.path}: the drift is one of source rows; leave --aligner out")
    if aligner is not None:
        check_columns(corpus, aligner)
    directory = output_path(out)
    check_place(directory, corpus)
    pass_names = (f"{side} moments",) if side == "target" else (f"{side} moments", "apply")
    results = [Written(corpus, corpus.subfolder, pass_name) for pass_name in pass_names]
    check_kept(directory, results, run.settings.mode)
    with run.output_directory(directory):
        run.measure(f"{side} {'moments' if aligner is None else 'drift'}", corpus, aligner)
    return run.passes[0]


def merge(
    source: Corpus,
    target: Corpus,
    out: AnyPath,
    settings: Settings | None = None,
    after: Step = "apply",
) -> tuple[str, dict[str, Any] | None]:
    """Go as far as the checkpoints in ``out`` allow, and make sure that a step is finished.

    ``after`` is the step of the array that has ended. After ``"statistics"`` the map without its
    last step is written, also where the drift is known already: the jobs of the drift read it.

    Return a sentence on what is done and what is next, and the report once every shard is aligned.
    A shard of ``after``, or of a step before it, that is not finished is an ``UnfinishedShards``.
    """
    run, directory = AlignRun(settings or Settings(), reading=False), output_path(out)
    if kinds_in(records_of(directory)) - {"alignment"}:
        raise OptionError(
            f"{directory}: is of unify, whose job arrays end without merge: run unify --shard i/n "
            f"with the same options until a round says that it was the last, then {LAST_STEP}"
        )
    check_sides(directory, source, target, run.settings)
    half_path, path = (records_of(directory) / name for name in (HALF, ALIGNER))
    finished_steps, written, next_step = 0, "", "stats --shard i/n of both sides"
    with run.output_directory(directory):
        try:
            *_, aligner = run.half_fit(source, target)
            aligner.save(half_path)
            finished_steps, written = 1, f"wrote {half_path}; "
            next_step = f"stats --aligner {half_path} --shard i/n"
            if after == "statistics":
                return f"{written}next: {next_step}", None
            aligner.record_drift(run.measure("source drift", source, aligner).moments)
            finished_steps, written = 2, f"wrote {path}; "
            dtype = f" --dtype {run.settings.dtype}" if run.settings.dtype else ""
            next_step = f"apply --aligner {path}{dtype} --shard i/n"
            half_path.unlink(missing_ok=True)
            aligned = run.apply(aligner, source, directory)
        except UnfinishedShards as error:
            next_step = f"{written}next: {next_step} ({error})"
            if finished_steps <= get_args(Step).index(after):
                facts = {"complete": False, "next": next_step}
                raise UnfinishedShards(next_step, **facts) from error
            return next_step, None
        aligner.record_residual(aligned)
        aligner.save(path)
        report = run.finish(directory, aligner, source, target, aligned)
    return f"{written}every shard is aligned", report
