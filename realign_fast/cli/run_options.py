"""Options that say how a run goes: parts, engines, resuming, samples, memory."""

from __future__ import annotations

import argparse
from typing import Any

from ..pipeline.engines.local import Engine
from ..pipeline.engines.ray_driver import RayTasks
from ..pipeline.sampling import DEFAULT_ROWS, EXACT_BYTES
from ..pipeline.settings import MODES
from ..storage.local import LocalPath
from ..storage.paths import StoragePath, local_path, output_path, storage_path


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def path(text: str) -> LocalPath:
    """A path of this machine that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_or_url(text: str) -> StoragePath:
    """A path or a URL that is read from."""
    return storage_path(text) if text else path(text)


def place(text: str) -> StoragePath:
    """A directory or a URL that a result is written to."""
    try:
        return output_path(text) if text else path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _bytes(text: str) -> int:
    number, unit = text.rstrip("KMGT"), text.lstrip("0123456789.")
    try:
        return int(float(number) * 1024 ** " KMGT".index(unit or " "))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size such as 4G, got {text!r}") from None


def _part(text: str) -> tuple[int, int]:
    """``"2/4"`` -> ``(1, 4)``."""
    first, _, parts = text.partition("/")
    if not (first.isdecimal() and parts.isdecimal() and 1 <= int(first) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N from 1/N to N/N, got {text!r}")
    return int(first) - 1, int(parts)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not (0 <= number < 1 or (number >= 1 and number.is_integer())):
        raise argparse.ArgumentTypeError(f"expected a part of 1 or a whole number, got {text!r}")
    return number


def _add_side(group: Any) -> None:
    group.add_argument("--source", "--text", metavar="DIR", help="measure rows to move")
    group.add_argument("--target", "--image", metavar="DIR", help="measure where they are to go")


def _add_mode(group: Any) -> None:
    group.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="what an earlier or killed run finished in --out: skip it where it is unchanged "
        "(incremental, the default); do everything anew (overwrite); skip it, and count the saved "
        "statistics of shards that are no longer there (extend)",
    )
    resume = {"action": "store_const", "dest": "mode", "const": MODES[0]}
    group.add_argument("--resume", **resume, help="the same as --mode incremental")


def _add_engine(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("engine", "who does the shards; the result has the same bytes")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine (local, the default), or tasks of Ray, anywhere",
    )
    group.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="local: processes that share out the shards and the threads (default: %(default)s)",
    )
    for name, options in RAY_OPTIONS.items():
        group.add_argument(f"--{name}", **options)


def engine_from(options: argparse.Namespace) -> Engine | None:
    """Ray where it is asked for; ``None`` leaves it to ``--workers``.

    Raises:
        ValueError: options that do not go together.
    """
    given = {name: getattr(options, name.replace("-", "_")) for name in RAY_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.engine != "ray":
        if given:
            raise ValueError(
                f"--{next(iter(given))}: is of --engine ray; give that, or leave it out"
            )
        return None
    if options.workers > 1:
        raise ValueError(
            "--workers: are processes of this machine; Ray takes as many tasks at a time as its "
            "nodes have room for, so give --cpus-per-task, or --threads where Ray starts here"
        )
    names = {"ray-address": "address", "ray-ship": "ship"}
    return RayTasks(**{names.get(k, k.replace("-", "_")): value for k, value in given.items()})


RAY_OPTIONS = {
    "ray-address": {
        "metavar": "ADDRESS",
        "help": "ray: ray://HOST:10001 from outside a cluster, HOST:6379 or auto on a node of it "
        "(default: RAY_ADDRESS, else Ray is started on this machine for the run)",
    },
    "cpus-per-task": {
        "type": positive,
        "metavar": "N",
        "help": "ray: CPUs that a shard takes, and its threads (default: 1)",
    },
    "gpus-per-task": {
        "type": _amount,
        "metavar": "N",
        "help": "ray: GPUs set aside for a shard; 0.5 lets two share one (default: 0)",
    },
    "retries": {
        "type": _count,
        "metavar": "N",
        "help": "ray: how often a shard is done again whose worker or node died (default: 3)",
    },
    "ray-ship": {
        "action": "store_const",
        "const": True,
        "help": "ray: send this package to the nodes, which have torch but not the package",
    },
}
RUN_OPTIONS = {
    "fit-rows": lambda sub: sub.add_argument(
        "--fit-rows",
        type=lambda text: 0 if text == "all" else positive(text),
        metavar="N",
        help="fit on N rows of each side, spread evenly, and report how far off that can be; "
        f"'all' for every row (default: all, or {DEFAULT_ROWS:,} where both sides take more than "
        f"{EXACT_BYTES / 1e12:g} TB)",
    ),
    "seed": lambda sub: sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="chooses the rows (default: %(default)s)"
    ),
    "memory": lambda sub: sub.add_argument(
        "--memory",
        type=_bytes,
        default=0,
        metavar="SIZE",
        help="such as 4G (G = 2^30): a source that fits is read from disk once and kept",
    ),
    "side": lambda sub: _add_side(sub.add_mutually_exclusive_group(required=True)),
    "half": lambda sub: sub.add_argument(
        "--aligner",
        type=path_or_url,
        metavar="FILE",
        help="half.safetensors that merge wrote: measure the drift of the source through it",
    ),
    "shard": lambda sub: sub.add_argument(
        "--shard",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="do every N-th shard from the I-th on (1/4 ... 4/4), as one job of an array",
    ),
    "engine": lambda sub: _add_engine(sub),
    "device": lambda sub: sub.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where rows are computed: cpu (the default), cuda (with --workers N each takes the "
        "next GPU) or cuda:N",
    ),
    "mode": lambda sub: _add_mode(sub.add_mutually_exclusive_group()),
}
