"""What reads and writes files without the interpreter (`csrc/io`), where it was built."""

from __future__ import annotations

import json
from pathlib import Path

try:
    from .. import _io as io
except ImportError:
    io = None

_BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"


def reader_of() -> str:
    """Which reader reads, and why."""
    if io:
        return "native (csrc/io: blocks are read ahead on its own threads)"
    said = json.loads(_BUILD_INFO.read_text()) if _BUILD_INFO.exists() else {}
    why = said.get("why_no_reader") or "the native reader was not built for this Python"
    return f"mmap ({why})"


def start_writing(descriptor: int, begin: int, size: int) -> None:
    """Have these bytes of a file go to the disk now, while the next are computed."""
    if io:
        io.start_writing(descriptor, begin, size)
