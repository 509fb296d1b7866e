"""The compiled reader and writer of files (`csrc/io`), or None where it was not built."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent

io: Any = None
try:
    io = import_module(f"{_PACKAGE.name}._io")
except ImportError:
    pass


def reader_description() -> str:
    """Return which reader is used for contiguous shards, and why."""
    if io:
        return "native (csrc/io: blocks are read ahead on its own threads)"
    info = _PACKAGE / "_build_info.json"
    build = json.loads(info.read_text()) if info.exists() else {}
    reason = build.get("why_no_reader") or "the native reader was not built for this Python"
    return f"mmap ({reason})"


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Tell the disk to write these bytes of a file now, while the next ones are computed."""
    if io:
        io.start_writing(descriptor, offset, size)
