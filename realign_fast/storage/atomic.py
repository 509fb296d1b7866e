"""Files that appear whole or not at all, here or at a URL."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from .url import Url, place_of


def write_whole(path: str | os.PathLike[str] | Url, data: bytes) -> None:
    """Write ``data`` under a temporary name beside ``path``, sync it, and rename it.

    Raises:
        OSError: names the file; nothing of it is left behind.
    """
    path = place_of(path)
    if isinstance(path, Url):
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            advice = "check that the directory exists, may be written and has room"
            raise OSError(error.errno, f"{path}: {error.strerror}; {advice}") from error
        raise


def write_json(path: Path | Url, value: dict[str, Any]) -> None:
    """Write a json file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def open_scratch(buffering: int = 0) -> BinaryIO:
    """A file for what is uploaded when it is whole (``TMPDIR`` chooses where).

    It has no name, so nothing is left of it however this process ends.
    """
    return tempfile.TemporaryFile(prefix="realign-fast-", buffering=buffering)


def upload(file: BinaryIO, url: Url) -> None:
    """What was written to a scratch file, whole or not at all."""
    file.seek(0)
    url.upload(f"/dev/fd/{file.fileno()}")
