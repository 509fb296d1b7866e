"""The compiled libraries of this package: what their build recorded, and why one does not load."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def build_info() -> dict[str, Any]:
    """Return what the build recorded in ``_build_info.json``, or {} if that cannot be read."""
    try:
        info = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def why_not_loaded(library: Path, load: Callable[[str], object]) -> str:
    """Load a library with ``load(path)``; return "", or the reason why it does not load."""
    try:
        reason = _why_unfit(library)
        if not reason:
            load(str(library))
            return ""
    except (ImportError, OSError, SystemError) as error:
        message = str(error.__cause__ or error)  # torch hides it in the cause
        reason = message.partition("\n")[0].removeprefix(f"{library}: ")
    return f"{library.name} does not load: {reason}; install realign_fast again"


def _why_unfit(library: Path) -> str:
    """Return why the file is no whole ELF library for this processor, or "" if nothing says so.

    The system's loader maps a truncated file and the process then ends with a bus error, and it
    calls a library for another processor a missing file.
    """
    with library.open("rb") as file, Path(sys.executable).open("rb") as interpreter:
        header, own = file.read(64), interpreter.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return ""  # the loader names the fault
        if own[:5] == header[:5] and own[18:20] != header[18:20]:
            return "it is built for another processor"
        offset, size, count = struct.unpack_from("<32xQ14xHH", header)  # of the program headers
        file.seek(offset)
        table = file.read(size * count)
        loaded = 0
        if len(table) == size * count:
            for entry in range(0, len(table), size):
                segment_type, start, length = struct.unpack_from("<I4xQ16xQ", table, entry)
                if segment_type == 1:  # PT_LOAD
                    loaded = max(loaded, start + length)
        actual = file.seek(0, 2)
    if not loaded or actual < loaded:
        return f"the file is truncated: it has {actual} bytes, expected at least {loaded or offset}"
    return ""
