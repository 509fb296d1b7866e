"""The command line: the parser, what an error looks like, and the two commands without a corpus."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import __version__, ops
from ..corpus.io_extension import reader_of
from . import corpus_commands, embed_commands
from . import revision_commands as revision_commands
from .corpus_options import CORPUS_OPTIONS


def main(arguments: list[str] | None = None) -> int:
    """Run ``realign-fast``; returns 0, 1 where faults are found, 2 for errors, 130 if stopped."""
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.default_int_handler)
    options = _parser().parse_args(arguments)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # whoever read our output (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        # An OSError of ours says it all in strerror; "[Errno 28]" would only stand in the way.
        ours = isinstance(error, OSError) and error.strerror and error.filename is None
        print(f"realign-fast: error: {error.strerror if ours else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("realign-fast: stopped; what was written is whole", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign-fast",
        description="Move the embeddings of one modality into the distribution of another.",
    )
    parser.add_argument("--version", action="version", version=f"realign-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    what = "Show versions and, for each op, which kernel answers and why."
    commands.add_parser("info", help=what, description=what).set_defaults(run=_info)
    what = "Align the built-in embeddings and draw it."
    demo = commands.add_parser("demo", help=what, description=what)
    demo.set_defaults(run=_demo)
    for option in ("demo-out", "threads", "quiet"):
        CORPUS_OPTIONS[option](demo)
    corpus_commands.add(commands)
    embed_commands.add_commands(commands)
    revision_commands.add(commands, _open_encoder)
    return parser


def _open_encoder(name: str) -> Any:
    """Of a directory, or of open_clip by ``NAME`` or ``NAME:WEIGHTS``."""
    from ..embed import load_encoder

    if Path(name).exists():
        return load_encoder(name)
    model, _, weights = name.partition(":")
    return load_encoder(model, weights or None)


def _info(_: argparse.Namespace) -> None:
    print(f"realign_fast  {__version__}")
    print(f"python        {platform.python_version()}")
    print(f"torch         {torch.__version__}")
    print(f"numpy         {numpy.__version__}")
    print(f"cpu           {ops.cpu_isa()} kernels, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"gpu           {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        print("gpu           none that torch can use")
    print(f"cuda kernels  {ops.why_no_cuda() or 'loaded'}")
    for op in ops.OPS:
        for device in devices:
            kernel, why = ops.backend_of(op, device)
            print(f"{op:13} {device}: {kernel} ({why})")
    print(f"files         {reader_of()}")


def _demo(options: argparse.Namespace) -> None:
    from .. import demo

    demo.run(options.out, progress=not options.quiet)


if __name__ == "__main__":
    sys.exit(main())
