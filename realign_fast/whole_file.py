"""Small files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` under a temporary name beside ``path``, sync it, and rename it.

    Raises:
        OSError: names the file; nothing of it is left behind.
    """
    path = Path(path)
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
