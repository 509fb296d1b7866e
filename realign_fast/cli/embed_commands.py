"""The command ``realign-fast embed``: its options, and the summary that it prints."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, get_args

from ..embed import Columns, EmbedSettings, embed, load_encoder, open_source
from ..embed.choices import Content, Mode, Precision, RowDtype
from ..embed.embed_output import FAILURES
from ..embed.embed_run import SHARD_ROWS
from .option_types import local, positive, whole
from .options import OPTIONS, add_command

SUMMARY = "Embed images and texts with a CLIP-like model into rows that align and fit read."
SOURCES: dict[Content, str] = {
    "images": "images: a directory of image files, WebDataset .tar, parquet with bytes or paths, "
    "csv or jsonl with paths, the paper's dataset.json; or a directory of tars or tables",
    "texts": "texts: .txt (one a line), jsonl, csv, tsv, parquet, .tar, dataset.json; or a "
    "directory of files of one of these formats",
    "pairs": "images with their captions in one source (in a directory a.jpg with a.txt); row i of "
    "both sides belongs to the same pair",
}


def add(commands: Any) -> None:
    """Add the command to the sub-parsers ``commands``."""
    parser = add_command(commands, "embed", _embed, SUMMARY)
    for name, description in SOURCES.items():
        parser.add_argument(f"--{name}", metavar="SOURCE", help=description)
    parser.add_argument(
        "--out", required=True, type=local, metavar="DIR", help="write the result to this directory"
    )
    _add_model(parser.add_argument_group("the model"))
    columns = parser.add_argument_group(
        "tables", "names of columns; by default the usual names are tried"
    )
    for role in Columns._fields:
        columns.add_argument(
            f"--{role}-column", metavar="NAME", help=f"name of the column that holds the {role}"
        )
    _add_run(parser.add_argument_group("the run"))


# In the next two functions the settings of an option are on one line, its help is on the next.
# fmt: off
def _add_model(group: Any) -> None:
    group.add_argument("--model", required=True, metavar="NAME|DIR|JSON",
        help="an open_clip model: its name, JSON config or directory; or a Hugging Face directory "
        "with CLIP, SigLIP or LLM2CLIP")
    group.add_argument("--pretrained", metavar="TAG|FILE",
        help="weights of an open_clip model given by name or config: a tag or a checkpoint file")
    group.add_argument("--text-model", metavar="DIR",
        help="the language model of LLM2CLIP (default: text_model/ in the model's directory)")
    group.add_argument("--device", metavar="NAME",
        help="cpu, cuda or cuda:N (default: cuda if torch finds a GPU, else cpu)")
    group.add_argument("--precision", choices=get_args(Precision),
        help="precision of the model (default: bf16 on CUDA, else fp32)")


def _add_run(group: Any) -> None:
    group.add_argument("--batch-size", type=positive, metavar="N",
        help="items in a batch (default: 256 on CUDA, 32 on the CPU)")
    group.add_argument("--workers", type=whole, metavar="N",
        help="number of decoding processes, 0 to decode in the main process (default: a quarter "
        "of the cores, or with CUDA as many as there are cores, at most 16)")
    group.add_argument("--shard-rows", type=positive, default=SHARD_ROWS, metavar="N",
        help="items in a shard; a killed run repeats at most one shard (default: %(default)s)")
    group.add_argument("--dtype", choices=get_args(RowDtype), default="float16",
        help="type of the rows on disk (default: %(default)s)")
    group.add_argument("--mode", choices=get_args(Mode), default="incremental",
        help="keep what an earlier or killed run finished (incremental, the default), or embed "
        "everything again (overwrite)")
    OPTIONS["quiet"](group)
# fmt: on


def _embed(options: Namespace) -> None:
    columns = Columns(*(getattr(options, f"{role}_column") for role in Columns._fields))
    paths = {name: path for name in SOURCES if (path := getattr(options, name)) is not None}
    if not paths or ("pairs" in paths and len(paths) > 1):
        raise ValueError("embed: give --images, --texts or both, or --pairs alone")
    sources = {content: open_source(path, content, columns) for content, path in paths.items()}
    encoder = load_encoder(
        options.model,
        options.pretrained,
        text_model=options.text_model,
        device=options.device,
        precision=options.precision,
    )
    settings = EmbedSettings(
        batch_size=options.batch_size,
        workers=options.workers,
        shard_rows=options.shard_rows,
        dtype=options.dtype,
        mode=options.mode,
        progress=not options.quiet,
    )
    report = embed(encoder, options.out, settings=settings, **sources)
    for source in sources.values():
        if source.ignored:
            counts = ", ".join(f"{count:,} .{suffix}" for suffix, count in source.ignored.items())
            print(f"{source.path}: files with other suffixes were not read: {counts}")
    _print_report(report, options.out)


def _print_report(report: dict[str, Any], out: Path) -> None:
    rows = " and ".join(f"{count:,} {side} rows" for side, count in report["rows"].items() if count)
    rate = report["embedded_now"] / max(report["seconds"], 1e-9)
    before = report["finished_before"]
    earlier = f"; {before:,} items were finished before" if before else ""
    print(f"{rows} of {report['dimension']} columns in {report['shards']} shards, {out}")
    print(
        f"{report['embedded_now']:,} items in {report['seconds']:.1f} s, {rate:,.0f} a second"
        + earlier
    )
    if report["unturned"]:
        print(f"{report['unturned']:,} images have damaged EXIF data and were not turned")
    if report["failures"]:
        print(f"{report['failures']:,} items failed and are no rows: {out / FAILURES}")
