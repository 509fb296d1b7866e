"""The commands that work on corpora: align, fit, apply, stats, merge, verify, convert, inspect."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .._device import check_device
from ..align import ReAlign
from ..corpus.convert import convert
from ..corpus.corpus import Corpus
from ..corpus.layout import check_apart, metadata_of
from ..pipeline.align_run import AlignRun, align, cached_source, describe, describe_result
from ..pipeline.inspection import as_lines, inspect
from ..pipeline.job_array import HALF, apply_part, merge, stats
from ..pipeline.output import ALIGNER, STATS, check_output, check_scratch
from ..pipeline.sampling import rows_to_fit
from ..pipeline.settings import Settings
from ..pipeline.verify import verify
from ..storage.paths import StoragePath
from .corpus_options import CORPUS_OPTIONS
from .run_options import RUN_OPTIONS, engine_from


def add(commands: Any) -> None:
    """Every command of this file into the parser's `commands`."""

    def command(name: str, run: Any, summary: str, *options: str) -> None:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        for option in options:
            (CORPUS_OPTIONS | RUN_OPTIONS)[option](sub)

    passes = ("threads", "quiet", "bad-rows", "batch-bytes", "device", "engine", "mode")
    reading = ("column", "allow-pickle")
    both = ("source", "target", "out", "method", "shrinkage", "target-column", *reading)
    fitting = (*both, *passes, "fit-rows", "seed", "memory")
    converting = ("path", "modality", "to", "dtype", "converted", *reading, "batch-bytes", "quiet")
    inspecting = ("path", "modality", "sample", "inspect-seed", "json", *reading)
    applying = ("aligner", "source", "out", *reading, *passes, "shard")
    side = ("side", "out", "half", "method", *reading, *passes[:-1], "shard")
    command("align", _align, "Fit, and write the source aligned.", *fitting)
    command("fit", _fit, "Fit, and write the aligner alone.", *fitting)
    command("apply", _apply, "Align with a fitted aligner.", *applying)
    command("stats", _stats, "Keep statistics of one side, for merge: a job of an array.", *side)
    command("merge", _merge, "Fit from kept statistics, reading no rows.", *both, *passes[:-2])
    command("verify", _verify, "Read a result again and hold it against its manifest.", "result")
    command("convert", _convert, "Write a corpus in another format.", *converting)
    command("inspect", _inspect, "Show what a corpus holds.", *inspecting)


def _settings(options: argparse.Namespace) -> Settings:
    if getattr(options, "engine", "local") == "local":  # Ray's nodes look for themselves
        check_device(options.device)
    chosen = ("method", "shrinkage", "mode", "workers", "fit_rows", "seed", "memory", "device")
    fitting = {k: v for k, v in vars(options).items() if k in chosen}
    return Settings(options.bad_rows, options.batch_bytes, not options.quiet, **fitting)


def _corpora(options: argparse.Namespace) -> tuple[Corpus, Corpus]:
    how = _how(options)
    source = _source(options)
    if options.target_column is not None:
        how["column"] = options.target_column
    target = Corpus(options.target, "image", **how)
    if options.target_column is not None:
        _expect_columns(target, "--target-column")
    return source, target


def _source(options: argparse.Namespace) -> Corpus:
    corpus = Corpus(options.source, **{"modality": "text", **_how(options)})
    if options.column is not None:
        _expect_columns(corpus, "--column")
    return corpus


def _expect_columns(corpus: Corpus, option: str) -> None:
    if corpus.format == "npy":
        raise ValueError(f"{corpus.path}: npy has no columns; leave {option} out")


def _say_scratch(options: argparse.Namespace, source: Corpus) -> None:
    """Where a result for a URL takes room on this machine."""
    words = check_scratch(options.out, source, getattr(options, "workers", 1))
    if words and not options.quiet:
        print(f"realign-fast: {words}", file=sys.stderr)


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """How a corpus is opened."""
    side = {"modality": options.modality} if hasattr(options, "modality") else {}
    return {"column": options.column, "allow_pickle": options.allow_pickle, **side}


def _align(options: argparse.Namespace) -> None:
    source, target = _corpora(options)
    _say_scratch(options, source)
    report = align(source, target, options.out, _settings(options), engine_from(options))
    _print_report(report, options.out)
    _say_metadata(source)


def _fit(options: argparse.Namespace) -> None:
    run = AlignRun(_settings(options), engine=engine_from(options))
    source, target = _corpora(options)
    source = cached_source(source, run.settings, run.engine)
    for corpus in (source, target):
        check_apart(options.out, corpus)
    options.out.mkdir(parents=True, exist_ok=True)
    with run.keeping(options.out):
        aligner = run.fit(source, target, residual=True)
        aligner.save(options.out / ALIGNER)
        facts = {"source": describe(source), "target": describe(target)}
        facts["fitted_on"] = rows_to_fit(run.settings, source, target)[1]
        report = run.report(aligner, **facts)
        run.finish(aligner, report)
    _print_report(report, options.out)


def _apply(options: argparse.Namespace) -> None:
    if str(options.aligner).endswith(HALF):
        what = "is a map without its last step, for stats --aligner; run merge and give its result"
        raise ValueError(f"{options.aligner}: {what}")
    _expect_merged(options.aligner)
    aligner = ReAlign.from_pretrained(options.aligner)
    source, run = _source(options), AlignRun(_settings(options))
    run.engine = engine_from(options)
    _say_scratch(options, source)
    if options.shard[1] > 1:
        done = apply_part(aligner, source, options.out, options.shard, run.settings, run.engine)
        _print_pass(done.summary())
        return
    check_output(options.out, source, mode=options.mode)
    with run.keeping(options.out):
        result = describe_result(aligner, run.apply(aligner, source, options.out))
        report = run.report(aligner, source=describe(source), result=result)
        run.finish(aligner, report)
    _print_report(report, options.out)
    _say_metadata(source)


def _expect_merged(aligner: StoragePath) -> None:
    """Refuse the output of a job array that was not merged yet."""
    out = aligner.parent if aligner.name == ALIGNER else aligner
    if (out / STATS).is_dir() and not (out / ALIGNER).exists():
        what = "merge has to fit the map first: run it with the same --source, --target and --out"
        if (out / HALF).exists():
            what = f"the drift is missing: run stats --aligner {out / HALF} --shard i/n, then merge"
        raise FileNotFoundError(f"{out}: has statistics and no {ALIGNER}; {what}")


def _stats(options: argparse.Namespace) -> None:
    side = "source" if options.source is not None else "target"
    modality = {"source": "text", "target": "image"}[side]
    rows = Corpus(getattr(options, side), modality, **_how(options))
    if options.column is not None:
        _expect_columns(rows, "--column")
    if options.aligner and options.aligner.is_dir():
        raise ValueError(f"{options.aligner}: is a directory; name {options.aligner / HALF} itself")
    if options.aligner and not options.aligner.exists():
        what = f"no such file; give the {HALF} that merge wrote"
        raise FileNotFoundError(f"{options.aligner}: {what}")
    aligner = options.aligner and ReAlign.load(options.aligner)
    how = _settings(options), engine_from(options)
    done = stats(rows, side, options.out, options.shard, aligner, *how)
    _print_pass(done.summary())


def _merge(options: argparse.Namespace) -> None:
    source, target = _corpora(options)
    words, report = merge(source, target, options.out, _settings(options))
    if report:
        _print_report(report, options.out)
    print(words)


def _verify(options: argparse.Namespace) -> int:
    checked, faults = verify(options.out)
    for fault in faults:
        print(fault)
    what = ", ".join(f"{count:,} {name}" for name, count in checked.items())
    print(f"{options.out}: {what} checked, {len(faults)} faults")
    return 1 if faults else 0


def _say_metadata(corpus: Corpus) -> None:
    """Say that `metadata/` is not copied: it may be larger than the rows, and still fits them."""
    if folder := metadata_of(corpus):
        print(f"{folder} stays where it is; it describes the result too, row by row")


def _convert(options: argparse.Namespace) -> None:
    corpus = _source(options)
    _say_scratch(options, corpus)
    with tqdm(total=corpus.num_rows, unit="row", disable=options.quiet) as bar:
        dtype = options.dtype and getattr(torch, options.dtype)
        paths = convert(corpus, options.out, options.to, bar.update, options.batch_bytes, dtype)
    print(f"wrote {corpus.num_rows:,} rows in {len(paths)} shards to {options.out}")
    _say_metadata(corpus)
    if (options.out / "metadata").is_dir():
        print(f"wrote their other columns to {options.out / 'metadata'}, row by row")


def _inspect(options: argparse.Namespace) -> None:
    found = inspect(_source(options), options.sample, options.seed)
    print(json.dumps(found, indent=2) if options.json else as_lines(found))


def _print_report(report: dict[str, Any], out: Path) -> None:
    fitted = report["fitted"]
    for one in report["passes"]:
        _print_pass(one)
    for name, rows in report["extended"].items():
        print(f"{name:16} {rows:>12,} rows of shards that are gone, from saved statistics")
    after = report.get("result", {"centroid_gap": fitted["residual_gap"]})["centroid_gap"]
    how = f"scale {fitted['scale']:.6f}" if fitted["scale"] else fitted["method"]
    before = f"{_number(fitted['centroid_gap'])} -> "
    if "target" not in report:  # other rows than those fitted on, and nobody measured them before
        before = f"of the rows fitted on {_number(fitted['centroid_gap'])}, of these now "
    print(
        f"centroid gap {before}{_number(after)} "
        f"(statistical floor on new rows {_number(fitted['statistical_floor'])}), {how}"
    )
    on = f"fitted on {report['fitted_on']}; " if "fitted_on" in report else ""
    print(f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB; {on}wrote {out}")
    if report["sample"]:
        bars = "means +-{target_mean_error:.1e}, scale +-{scale_error:.1e}, gap of all rows "
        print((bars + "to expect {residual_gap_error:.1e}").format(**report["sample"]))


def _print_pass(one: dict[str, Any]) -> None:
    before = f", {one['finished_before']:,} rows were finished before"
    bad = f", {one['zero_rows']} zero and {one['nonfinite_rows']} non-finite rows"
    print(
        f"{one['name']:16} {one['rows']:>12,} rows  {one['seconds']:8.2f} s  "
        f"{one['rows_per_second'] / 1e6:6.2f} M rows/s  {one['gb_per_second']:6.2f} GB/s"
        + (bad if one["zero_rows"] + one["nonfinite_rows"] else "")
        + (before if one["finished_before"] else "")
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"
