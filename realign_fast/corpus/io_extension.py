"""The compiled reader and writer of files (`csrc/io`), or None where it was not built."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._libraries import PACKAGE, build_info, why_not_loaded
from .._startup import is_own_command

io: Any = None
survives_lost_pages = False  # whether `survive_lost_pages` was called here, and had an effect
_why_not_io = "the native reader was not built for this Python"
_spec = find_spec(f"{PACKAGE.name}._io")
if _spec and _spec.origin:
    _name = _spec.name
    _why_not_io = why_not_loaded(Path(_spec.origin), lambda _: import_module(_name))
    if _why_not_io:
        _message = f"realign_fast reads files through Python: {_why_not_io}"
        warnings.warn(_message, RuntimeWarning, stacklevel=2)
    io = sys.modules.get(_name)


def reader_description() -> str:
    """Return which reader is used for contiguous shards, and why."""
    if io:
        return "native (csrc/io: blocks are read ahead on its own threads)"
    return f"preadv ({(not _spec and build_info().get('why_no_reader')) or _why_not_io})"


def survive_lost_pages() -> None:
    """Let this process outlive the loss of mapped pages, which the reader of the file reports.

    Pages are lost when another process makes a file shorter, or its disk fails. This installs a
    handler of SIGBUS, so only the processes of commands call it, and those of users who want it.
    """
    global survives_lost_pages
    if io:
        io.survive_lost_pages()
        survives_lost_pages = True


if is_own_command():
    survive_lost_pages()
