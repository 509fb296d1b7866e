"""The commands that fit and apply an alignment: align, fit, apply, stats and merge."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from .._arguments import check_device
from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..corpus.layout import check_apart
from ..pipeline.align_run import AlignRun, align, cached_source
from ..pipeline.job_array import HALF, Side, merge, stats
from ..pipeline.output import ALIGNER, STATS, check_output
from ..pipeline.settings import Settings
from ..storage.paths import StoragePath
from .corpus_commands import open_corpus, open_source, print_metadata, print_scratch
from .options import add_command, engine_from


def add(commands: Any) -> None:
    """Add the commands of this file to the sub-parsers ``commands``."""
    reading = ("column", "allow-pickle")
    passes = ("threads", "quiet", "bad-rows", "batch-bytes", "device")
    running = (*passes, "engine", "mode")
    two_sides = ("source", "target", "out", "method", "shrinkage", "target-column", *reading)
    fitting = (*two_sides, *running, "fit-rows", "seed", "memory")
    applying = ("aligner", "source", "out", *reading, *running, "shard")
    one_side = ("side", "out", "half-aligner", "method", *reading, *passes, "engine", "shard")
    summary = "Fit a map and write the source rows aligned by it."
    add_command(commands, "align", _align, summary, *fitting)
    summary = "Fit a map and write the aligner with its records, but no shards."
    add_command(commands, "fit", _fit, summary, *fitting)
    summary = "Align rows with an aligner that was fitted before."
    add_command(commands, "apply", _apply, summary, *applying)
    summary = "Compute and keep the statistics of one side for merge, as one job of an array."
    add_command(commands, "stats", _stats, summary, *one_side)
    summary = "Fit a map from kept statistics, without reading rows."
    add_command(commands, "merge", _merge, summary, *two_sides, *passes)


def _settings(options: Namespace) -> Settings:
    if getattr(options, "engine", "local") == "local":  # the nodes of Ray check it themselves
        check_device(options.device)
    names = ("method", "shrinkage", "mode", "workers", "fit_rows", "seed", "memory", "device")
    fitting = {name: value for name, value in vars(options).items() if name in names}
    return Settings(options.bad_rows, options.batch_bytes, not options.quiet, **fitting)


def _sides(options: Namespace) -> tuple[Corpus, Corpus]:
    source = open_source(options)
    if options.target_column is None:
        return source, open_corpus(options, options.target, "image", column_option="")
    target = open_corpus(options, options.target, "image", options.target_column, "--target-column")
    return source, target


def _align(options: Namespace) -> None:
    source, target = _sides(options)
    print_scratch(options, source)
    report = align(source, target, options.out, _settings(options), engine_from(options))
    _print_report(report, options.out)
    print_metadata(source)


def _fit(options: Namespace) -> None:
    run = AlignRun(_settings(options), engine=engine_from(options))
    source_rows, target = _sides(options)
    source = cached_source(source_rows, run.settings, run.engine)
    for corpus in (source, target):
        check_apart(options.out, corpus)
    options.out.mkdir(parents=True, exist_ok=True)
    with run.output_directory(options.out):
        aligner = run.fit(source, target, residual=True)
        aligner.save(options.out / ALIGNER)
        report = run.finish(options.out, aligner, source, target)
    _print_report(report, options.out)


def _apply(options: Namespace) -> None:
    if str(options.aligner).endswith(HALF):
        raise ValueError(
            f"{options.aligner}: is a map without its last step, for stats --aligner; run merge "
            "and give its result"
        )
    _check_merged(options.aligner)
    aligner = ReAlign.from_pretrained(options.aligner)
    source = open_source(options)
    run = AlignRun(_settings(options), options.shard, engine=engine_from(options))
    print_scratch(options, source)
    if options.shard[1] > 1:
        run.apply(aligner, source, options.out)
        _print_pass(run.passes[0].summary())
        return
    check_output(options.out, source, mode=options.mode)
    with run.output_directory(options.out):
        aligned = run.apply(aligner, source, options.out)
        report = run.finish(options.out, aligner, source, aligned=aligned)
    _print_report(report, options.out)
    print_metadata(source)


def _check_merged(aligner: StoragePath) -> None:
    """Refuse the output of a job array that has not been merged yet."""
    out = aligner.parent if aligner.name == ALIGNER else aligner
    if (out / STATS).is_dir() and not (out / ALIGNER).exists():
        advice = "merge has to fit the map first: run it with the same --source, --target and --out"
        if (out / HALF).exists():
            advice = (
                f"the drift is missing: run stats --aligner {out / HALF} --shard i/n, then merge"
            )
        raise FileNotFoundError(f"{out}: has statistics and no {ALIGNER}; {advice}")


def _stats(options: Namespace) -> None:
    side: Side = "source" if options.source is not None else "target"
    if side == "source":
        rows = open_corpus(options, options.source, "text")
    else:
        rows = open_corpus(options, options.target, "image")
    half = options.aligner
    if half and half.is_dir():
        raise ValueError(f"{half}: is a directory; name {half / HALF} itself")
    if half and not half.exists():
        raise FileNotFoundError(f"{half}: no such file; give the {HALF} that merge wrote")
    aligner = half and ReAlign.load(half)
    run = AlignRun(_settings(options), options.shard, engine=engine_from(options))
    _print_pass(stats(run, side, rows, options.out, aligner).summary())


def _merge(options: Namespace) -> None:
    source, target = _sides(options)
    next_step, report = merge(source, target, options.out, _settings(options))
    if report:
        _print_report(report, options.out)
    print(next_step)


def _print_report(report: dict[str, Any], out: StoragePath) -> None:
    fitted = report["fitted"]
    for summary in report["passes"]:
        _print_pass(summary)
    for name, rows in report["extended"].items():
        print(f"{name:16} {rows:>12,} rows of shards that are gone, from saved statistics")
    after = report.get("result", {"centroid_gap": fitted["residual_gap"]})["centroid_gap"]
    method = f"scale {fitted['scale']:.6f}" if fitted["scale"] else fitted["method"]
    before = f"{_number(fitted['centroid_gap'])} -> "
    if "target" not in report:  # other rows than those fitted on, whose gap was not measured
        before = f"of the rows fitted on {_number(fitted['centroid_gap'])}, of these now "
    print(
        f"centroid gap {before}{_number(after)} "
        f"(statistical floor on new rows {_number(fitted['statistical_floor'])}), {method}"
    )
    fitted_on = f"fitted on {report['fitted_on']}; " if "fitted_on" in report else ""
    print(f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB; {fitted_on}wrote {out}")
    if report["sample"]:
        errors = "means +-{target_mean_error:.1e}, scale +-{scale_error:.1e}, gap of all rows "
        print((errors + "to expect {residual_gap_error:.1e}").format(**report["sample"]))


def _print_pass(summary: dict[str, Any]) -> None:
    before = f", {summary['finished_before']:,} rows were finished before"
    bad = f", {summary['zero_rows']} zero and {summary['nonfinite_rows']} non-finite rows"
    print(
        f"{summary['name']:16} {summary['rows']:>12,} rows  {summary['seconds']:8.2f} s  "
        f"{summary['rows_per_second'] / 1e6:6.2f} M rows/s  {summary['gb_per_second']:6.2f} GB/s"
        + (bad if summary["zero_rows"] + summary["nonfinite_rows"] else "")
        + (before if summary["finished_before"] else "")
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"
