"""The command ``realign-fast embed``: options, and what is printed at the end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from ..embed import Columns, EmbedSettings, embed, load_encoder, open_source
from ..embed.choices import Mode, Precision, RowDtype
from ..embed.embed_output import FAILURES
from ..embed.embed_run import SHARD_ROWS
from .run_options import path, positive

SUMMARY = "Embed images and texts with a CLIP-like model, into rows that align and fit read."
SOURCES = {
    "images": "images: a directory of image files, WebDataset .tar, parquet with bytes or paths, "
    "csv or jsonl with paths, the paper's dataset.json; or a directory of tars or tables",
    "texts": "texts: .txt (one a line), jsonl, csv, tsv, parquet, .tar, dataset.json; or a "
    "directory of one of them",
    "pairs": "images with their captions, in one source (in a directory a.jpg with a.txt): rows "
    "of the two sides belong together",
}


def add_commands(commands: Any) -> None:
    """Add the command to the sub-parsers of ``realign-fast``."""
    sub = commands.add_parser("embed", help=SUMMARY, description=SUMMARY)
    sub.set_defaults(run=_embed)
    for name, words in SOURCES.items():
        sub.add_argument(f"--{name}", metavar="SOURCE", help=words)
    sub.add_argument("--out", required=True, type=path, metavar="DIR", help="for the result")
    _add_model(sub)
    columns = sub.add_argument_group("tables", "columns; by default the usual names are tried")
    for role in Columns._fields:
        columns.add_argument(f"--{role}-column", metavar="NAME", help=f"holds the {role}")
    run = sub.add_argument_group("the run")
    run.add_argument("--batch-size", type=positive, metavar="N", help="256 on CUDA, 32 on the CPU")
    run.add_argument("--workers", type=_workers, metavar="N", help="decoding processes; 0: none")
    run.add_argument(
        "--shard-rows",
        type=positive,
        default=SHARD_ROWS,
        metavar="N",
        help="items a shard, which a killed run does again at most (%(default)s)",
    )
    run.add_argument(
        "--dtype", choices=get_args(RowDtype), default="float16", help="of the rows on disk"
    )
    run.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="incremental",
        help="go on with what an earlier or killed run finished (incremental, the default), or "
        "embed everything anew (overwrite)",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_model(sub: Any) -> None:
    model = sub.add_argument_group("the model")
    model.add_argument(
        "--model",
        required=True,
        metavar="NAME|DIR|JSON",
        help="a model of open_clip by name, json config or directory; or a Hugging Face directory: "
        "CLIP, SigLIP, LLM2CLIP",
    )
    model.add_argument(
        "--pretrained", metavar="TAG|FILE", help="weights of an open_clip name: a tag, a checkpoint"
    )
    model.add_argument("--text-model", metavar="DIR", help="the language model of LLM2CLIP")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: cuda if there")
    model.add_argument(
        "--precision", choices=get_args(Precision), help="default: bf16 on CUDA, else fp32"
    )


def _workers(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _embed(options: argparse.Namespace) -> None:
    columns = Columns(*(getattr(options, f"{role}_column") for role in Columns._fields))
    given = {kind: getattr(options, kind) for kind in SOURCES if getattr(options, kind) is not None}
    if not given or ("pairs" in given and len(given) > 1):
        raise ValueError("embed: give --images, --texts or both, or --pairs alone")
    sources = {kind: open_source(value, kind, columns) for kind, value in given.items()}
    how = {"text_model": options.text_model, "device": options.device}
    encoder = load_encoder(options.model, options.pretrained, precision=options.precision, **how)
    names = ("batch_size", "workers", "shard_rows", "dtype", "mode")
    chosen = {name: getattr(options, name) for name in names}
    settings = EmbedSettings(progress=not options.quiet, **chosen)
    report = embed(encoder, options.out, settings=settings, **sources)
    for source in sources.values():
        if source.ignored:
            others = ", ".join(f"{n:,} .{suffix}" for suffix, n in source.ignored.items())
            print(f"{source.path}: files with other suffixes were not looked at: {others}")
    _print(report, options.out)


def _print(report: dict[str, Any], out: Path) -> None:
    rows = " and ".join(f"{n:,} {side} rows" for side, n in report["rows"].items() if n)
    rate = report["embedded_now"] / max(report["seconds"], 1e-9)
    before = report["finished_before"]
    done = f"; {before:,} items were finished before" if before else ""
    print(f"{rows} of {report['dimension']} columns in {report['shards']} shards, {out}")
    print(
        f"{report['embedded_now']:,} items in {report['seconds']:.1f} s, {rate:,.0f} a second{done}"
    )
    if report["failures"]:
        print(f"{report['failures']:,} items failed and are no rows: {out / FAILURES}")
