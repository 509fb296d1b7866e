"""The options of the commands, by name, and the functions that add options and commands.

A name is that of the option or, where two commands mean different things by one option, says which.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..corpus.format_registry import FORMATS
from ..methods import METHODS
from ..moments import BAD_ROWS
from ..pipeline.engines.local import Engine
from ..pipeline.engines.ray_driver import RayTasks
from ..pipeline.sampling import DEFAULT_ROWS, EXACT_BYTES
from ..pipeline.settings import BATCH_BYTES, MODES
from .option_types import (
    byte_count,
    local,
    positive,
    readable,
    rows_or_all,
    shard_part,
    share_or_whole,
    shrinkage,
    thread_count,
    whole,
    writable,
)

Option = Callable[[ArgumentParser], object]


def option(*flags: str, **settings: Any) -> Option:
    """Return a function that adds an option; the arguments are those of ``add_argument``."""
    return lambda parser: parser.add_argument(*flags, **settings)


def add_command(
    commands: Any, name: str, run: Callable[[Namespace], int | None], summary: str, *options: str
) -> ArgumentParser:
    """Add a command with ``options`` of ``OPTIONS`` to the sub-parsers; return its parser."""
    parser: ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    for key in options:
        OPTIONS[key](parser)
    return parser


def engine_from(options: Namespace) -> Engine | None:
    """Return the engine of the options, or ``None`` for the processes of ``--workers``.

    Raises:
        ValueError: options that exclude each other.
    """
    values = {name: getattr(options, name.replace("-", "_")) for name in _RAY_OPTIONS}
    values = {name: value for name, value in values.items() if value is not None}
    if options.engine != "ray":
        if values:
            raise ValueError(
                f"--{next(iter(values))}: is an option of --engine ray; give that, or leave it out"
            )
        return None
    if options.workers > 1:
        raise ValueError(
            "--workers: is the number of processes on this machine; Ray runs as many tasks at a "
            "time as its nodes have room for, so give --cpus-per-task, or --threads where Ray is "
            "started here"
        )
    names = {"ray-address": "address", "ray-ship": "ship"}
    return RayTasks(**{names.get(k, k.replace("-", "_")): value for k, value in values.items()})


def _add_side(parser: ArgumentParser) -> None:
    """Add ``--source`` and ``--target``, of which a command takes one."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--source", "--text", metavar="DIR", help="measure the source rows")
    group.add_argument("--target", "--image", metavar="DIR", help="measure the target rows")


def _add_mode(parser: ArgumentParser) -> None:
    """Add ``--mode`` and ``--resume``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="use of what an earlier or killed run finished in --out: skip shards that are "
        "finished and unchanged (incremental, the default); repeat everything (overwrite); skip "
        "finished shards, and count the saved statistics of shards that no longer exist (extend)",
    )
    group.add_argument(
        "--resume",
        action="store_const",
        dest="mode",
        const=MODES[0],
        help="the same as --mode incremental",
    )


def _add_engine(parser: ArgumentParser) -> None:
    """Add ``--engine`` and the options of both engines."""
    group = parser.add_argument_group(
        "engine", "what processes the shards; the bytes of the result do not depend on it"
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine (local, the default), or tasks of a Ray cluster (ray)",
    )
    group.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="local: number of processes, which share the shards and the threads (default: "
        "%(default)s)",
    )
    for name, settings in _RAY_OPTIONS.items():
        group.add_argument(f"--{name}", **settings)


# Below, the settings of an option are on one line and its help is on the next.
# fmt: off
_RAY_OPTIONS: dict[str, dict[str, Any]] = {
    "ray-address": {"metavar": "ADDRESS", "help":
        "ray: address of the cluster, ray://HOST:10001 from outside, HOST:6379 or auto on one of "
        "its nodes (default: RAY_ADDRESS, or else Ray is started here for the run)"},
    "cpus-per-task": {"type": positive, "metavar": "N", "help":
        "ray: CPUs and threads of a shard (default: 1)"},
    "gpus-per-task": {"type": share_or_whole, "metavar": "N", "help":
        "ray: GPUs reserved for a shard; 0.5 lets two shards share one (default: 0)"},
    "retries": {"type": whole, "metavar": "N", "help":
        "ray: how often a shard is repeated whose worker or node died (default: 3)"},
    "ray-ship": {"action": "store_const", "const": True, "help":
        "ray: send this package to nodes that have torch but not the package"},
}
OPTIONS: dict[str, Option] = {
    "source": option("--source", "--text", required=True, metavar="DIR",
        help="rows to align: a directory of shards or a clip-retrieval root (its text_emb/), or a "
        "URL of one of these (s3://, gs://, hf://, https://)"),
    "target": option("--target", "--image", required=True, metavar="DIR",
        help="rows to align the source to: a directory of shards or a clip-retrieval root (its "
        "img_emb/), or the URL of one"),
    "out": option("--out", required=True, type=writable, metavar="DIR",
        help="write the result to this directory or URL (s3://, gs://)"),
    "aligner": option("--aligner", required=True, type=readable, metavar="FILE",
        help="aligner.safetensors of an earlier fit, or the directory that holds it"),
    "half-aligner": option("--aligner", type=readable, metavar="FILE",
        help="half.safetensors that merge wrote: measure the drift of the source under this map"),
    "method": option("--method", choices=METHODS, default=METHODS[0],
        help="method that fits the map (default: %(default)s); methods that use covariances also "
        "fit the shape of the target, and may separate neighbours"),
    "shrinkage": option("--shrinkage", type=shrinkage, metavar="R",
        help="shrink the covariances towards a multiple of the identity: by a number from 0 to 1, "
        "oas or ledoit-wolf (default: no shrinkage)"),
    "target-column": option("--target-column", metavar="NAME",
        help="column of the target's rows (default: the same as --column)"),
    "column": option("--column", metavar="NAME",
        help="column that holds the rows, in formats with columns (default: embedding, in pickles "
        "embed); NAME:float16 states the type of a fixed-size binary column"),
    "allow-pickle": option("--allow-pickle", action="store_true",
        help="also read files of pickled lists; plain data is built from them and no code is run"),
    "threads": option("--threads", type=thread_count, metavar="N",
        help="number of CPU threads (default: as many as torch chooses)"),
    "quiet": option("--quiet", action="store_true", help="show no progress bars"),
    "bad-rows": option("--bad-rows", choices=BAD_ROWS, default="error",
        help="treatment of zero and non-finite rows: stop at the first (error, the default); leave "
        "them out of the statistics and write zeros in their place (skip); count zero rows as data "
        "and write NaN for non-finite rows (keep)"),
    "batch-bytes": option("--batch-bytes", type=positive, metavar="N", default=BATCH_BYTES,
        help="process rows of this many bytes at a time; memory use is a few times as much "
        "(default: %(default)s)"),
    "device": option("--device", default="cpu", metavar="NAME",
        help="device that computes: cpu (the default), cuda (with --workers N each process takes "
        "the next GPU) or cuda:N"),
    "shard": option("--shard", type=shard_part, default=(0, 1), metavar="I/N",
        help="process every N-th shard from the I-th on (1/4 ... 4/4), as one job of an array "
        "(default: 1/1, every shard)"),
    "fit-rows": option("--fit-rows", type=rows_or_all, metavar="N",
        help="fit on N rows of each side, spread evenly, and report how far off the result may be; "
        f"'all' fits on every row (default: all, or {DEFAULT_ROWS:,} if both sides together take "
        f"more than {EXACT_BYTES / 1e12:g} TB)"),
    "seed": option("--seed", type=int, default=0, metavar="N",
        help="seed that chooses the rows of --fit-rows (default: %(default)s)"),
    "memory": option("--memory", type=byte_count, default=0, metavar="SIZE",
        help="keep the source in memory between passes if it takes at most this size, such as 4G "
        "(G is 2^30 bytes; default: 0, the source is read in every pass)"),
    "side": _add_side,
    "engine": _add_engine,
    "mode": _add_mode,
    "corpus": option("source", metavar="SOURCE",
        help="a shard, a directory of shards, a saved dataset, or the URL of one"),
    "modality": option("--modality", choices=("text", "image"),
        help="side of a clip-retrieval root that has both (text_emb/, img_emb/)"),
    "to": option("--to", required=True, choices=FORMATS, help="format of the result"),
    "dtype": option("--dtype", choices=("float16", "bfloat16", "float32", "float64"),
        help="type of the result's numbers (default: unchanged; bfloat16 only in safetensors)"),
    "converted": option("out", metavar="OUT", type=writable,
        help="directory or URL for the result, without shards"),
    "sample": option("--sample", type=positive, metavar="N", default=10_000,
        help="number of rows to look at, spread over the corpus (default: %(default)s)"),
    "sample-seed": option("--seed", type=int, metavar="N", default=0,
        help="seed that chooses the sample (default: %(default)s)"),
    "json": option("--json", action="store_true", help="print one JSON object instead of a text"),
    "result": option("out", type=readable, metavar="OUT",
        help="directory or URL of a run's result"),
    "demo-out": option("--out", type=local, metavar="DIR", default=Path("realign_fast_demo"),
        help="write the result to this directory (default: %(default)s)"),
}
# fmt: on
