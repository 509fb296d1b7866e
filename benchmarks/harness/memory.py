"""Additional memory of a call, measured as peak resident bytes of this process.

Linux alone: the kernel keeps the peak in /proc/self/status and forgets it when asked to. Mapped
files count while their pages are in memory.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def known() -> bool:
    """Return whether the system reports the peak."""
    return STATUS.exists() and FORGET.exists()


def peak(call: Callable[[], object]) -> int:
    """Return by how many bytes the peak during ``call`` exceeds the memory resident before."""
    gc.collect()
    FORGET.write_text("5")  # the peak is now what is resident
    before = _bytes("VmRSS")
    call()
    return max(0, _bytes("VmHWM") - before)


def available() -> int:
    """Return the bytes available without swapping, or 4 GiB if the system does not report them."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 4 << 30
    return int(re.search(r"MemAvailable: +(\d+)", info.read_text())[1]) << 10


def _bytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", STATUS.read_text())[1]) << 10
