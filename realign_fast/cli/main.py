"""The command ``realign-fast``: its parser, its errors, and the commands info and demo."""

from __future__ import annotations

import argparse
import io
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
from ..corpus.io_extension import reader_description
from ..storage.errors import memory_explained
from . import align_commands, corpus_commands, embed_commands, revision_commands
from .options import add_command


def main(arguments: list[str] | None = None) -> int:
    """Run ``realign-fast`` and return its exit status.

    0: done; 1: ``verify`` found faults; 2: an error, which is a line on stderr; 130: stopped.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors="surrogateescape")
    options = _parser().parse_args(arguments)
    if getattr(options, "threads", None):
        torch.set_num_threads(options.threads)
    try:
        with memory_explained():
            status: int | None = options.run(options)
        return status or 0
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            message = (
                error.strerror
            )  # the whole message of this package's errors, without "[Errno]"
        print(f"realign-fast: error: {message}", file=sys.stderr)
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
    add_command(
        commands, "info", _info, "Show versions and which kernel computes each op, and why."
    )
    summary = "Align the built-in embeddings and draw the result."
    add_command(commands, "demo", _demo, summary, "demo-out", "threads", "quiet")
    align_commands.add(commands)
    corpus_commands.add(commands)
    embed_commands.add(commands)
    revision_commands.add(commands, _open_encoder)
    return parser


def _open_encoder(name: str) -> Any:
    """Load the encoder of a directory, or ``NAME`` or ``NAME:WEIGHTS`` of open_clip."""
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
    print(f"cpu           {ops.cpu_instruction_set()} kernels, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"gpu           {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        print("gpu           none that torch can use")
    print(f"cuda kernels  {ops.why_no_cuda() or 'loaded'}")
    for op in ops.OPS:
        for device in devices:
            kernel, reason = ops.backend_of(op, device)
            print(f"{op:13} {device}: {kernel} ({reason})")
    print(f"files         {reader_description()}")


def _demo(options: argparse.Namespace) -> None:
    from .. import demo

    demo.run(options.out, progress=not options.quiet)


if __name__ == "__main__":
    sys.exit(main())
