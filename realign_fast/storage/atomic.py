"""Files that appear under their name whole or not at all: the one place that syncs and renames.

A local file is written under a temporary name in the same directory (``.<name>.partial``), synced,
and renamed, and then its directory is synced. ``StoragePath.pending_file`` opens such a file; for a
URL it opens a scratch file of this machine, which is uploaded when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MAX_NAME_BYTES = 255  # of a file's name, on every file system in use


@contextmanager
def pending_file(path: Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Yield a file that is renamed to ``path`` when the block ends, and removed if the block fails.

    The directory exists. What an earlier process left under the temporary name is replaced. Of two
    writers of one file the later one wins, and the block of the other one fails.

    Raises:
        OSError: another writer replaced the temporary file, or the disk is full.
    """
    partial = partial_path(path)
    _remove(partial)
    with open(partial, "xb", buffering) as file:
        written = os.fstat(file.fileno())
        try:
            yield file
            file.flush()
            if not _is_at(written, partial):
                reason = "Another writer took over the file while it was written"
                raise OSError(errno.EBUSY, f"{path}: {reason}; let one process write it")
            _publish(partial, path, file.fileno())
        finally:
            if _is_at(written, partial):
                partial.unlink()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a library that writes files itself, and rename it to ``path``.

    What the block makes there is a file or a directory; it is removed if the block fails.
    """
    partial = partial_path(path)
    _remove(partial)
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            _publish(partial, path, descriptor)
        finally:
            os.close(descriptor)
    finally:
        _remove(partial)


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file that is being written; it is hidden, so never a shard."""
    return path.with_name(f".{short_name(path.name, MAX_NAME_BYTES - 9)}.partial")


def short_name(name: str, most_bytes: int) -> str:
    """Return a name, or one with a hash of it if it has more than `most_bytes` bytes."""
    data = os.fsencode(name)
    if len(data) <= most_bytes:
        return name
    return hashlib.blake2b(data, digest_size=16).hexdigest() + ".hashed"


def _publish(partial: Path, path: Path, descriptor: int) -> None:
    """Sync what is open as ``descriptor``, rename it, and sync the directory."""
    os.fsync(descriptor)
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _is_at(status: os.stat_result, path: Path) -> bool:
    """Return whether ``path`` still names the file that has this status."""
    return os.path.lexists(path) and os.path.samestat(status, path.lstat())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
