"""Files that appear under their name whole or not at all: the one place that syncs and renames.

A local file is written under a temporary name in the same directory (``.<name>.partial``), synced,
and renamed, and then its directory is synced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path
from typing import IO

MAX_NAME_BYTES = 255  # of a file's name, on every file system in use
# Errors of file systems that have no sync of a directory, or none at all (vboxsf, CIFS, FUSE), and
# of directories that may be written to and not read. Losses (EIO, ENOSPC, ...) are raised.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
_CANNOT_SYNC |= {errno.EACCES, errno.EPERM, errno.EISDIR}
_unsynced: set[int] = set()  # devices of which a warning has said so


@contextmanager
def pending_file(path: Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Yield a file that is renamed to ``path`` when the block ends, and removed if the block fails.

    The directory exists. What an earlier process left under the temporary name is replaced. Of two
    writers of one file the later one wins, and the block of the other one fails with an OSError.
    """
    partial = partial_path(path)
    _remove(partial)
    with open(partial, "xb", buffering) as file:  # exclusive: never through a link that came since
        written = os.fstat(file.fileno())
        try:
            yield file
            file.flush()
            if not _is_at(written, partial):
                message = f"{path}: Another writer took over the file; let one process write it"
                raise OSError(errno.EBUSY, message)
            _publish(partial, path)
        finally:
            if _is_at(written, partial):
                partial.unlink()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a library that writes files itself, and rename it to ``path``.

    It lies in a new directory, in which nobody else can have put a link. What the block makes there
    is a file or a directory; it is removed if the block fails.
    """
    folder = partial_path(path)
    _remove(folder)
    folder.mkdir(mode=0o700)
    try:
        yield folder / path.name
        _publish(folder / path.name, path)
    finally:
        _remove(folder)


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file that is being written; it is hidden, so never a shard."""
    return path.with_name(f".{short_name(path.name, MAX_NAME_BYTES - 9)}.partial")


def short_name(name: str, most_bytes: int) -> str:
    """Return a name, or one with a hash of it if it has more than `most_bytes` bytes."""
    data = os.fsencode(name)
    if len(data) <= most_bytes:
        return name
    return hashlib.blake2b(data, digest_size=16).hexdigest() + ".hashed"


def _publish(partial: Path, path: Path) -> None:
    """Sync a file, give it its name and sync the directory."""
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error
        device = path.stat().st_dev
        if device in _unsynced or parent_process():  # the process that started this one says it
            return
        _unsynced.add(device)
        reason = "its file system cannot sync a file or a directory"
        advice = "what was written last may be lost if the machine stops; then run again"
        warnings.warn(f"{path}: {reason}; {advice}", stacklevel=2)


def _is_at(status: os.stat_result, path: Path) -> bool:
    """Return whether ``path`` still names the file that has this status."""
    return os.path.lexists(path) and os.path.samestat(status, path.lstat())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
