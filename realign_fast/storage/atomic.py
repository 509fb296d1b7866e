"""Files that appear under their name whole or not at all: the one place that syncs and renames.

A local file is written under a temporary name in the same directory (``.<name>.partial``), synced,
and renamed, and then its directory is synced. A file for a URL is written to a nameless scratch
file of this machine and uploaded when it is complete. ``StoragePath.pending_file`` opens either.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class PendingFile:
    """A file that is being written; a ``with`` block commits it, or discards it on an error."""

    file: IO[bytes]

    def commit(self) -> None:
        """Close the file and give it its name."""
        raise NotImplementedError

    def discard(self) -> None:
        """Close the file and remove what was written."""
        raise NotImplementedError

    def __enter__(self) -> IO[bytes]:
        return self.file

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.commit()
        else:
            self.discard()


class PartialFile(PendingFile):
    """A pending file in a local directory that exists.

    What an earlier process left under the temporary name is replaced. Of two writers of one file
    the later one wins, and the commit of the other one fails.
    """

    def __init__(self, path: Path, buffering: int = -1) -> None:
        self._path, self._partial = path, partial_path(path)
        self._partial.unlink(missing_ok=True)
        self.file = open(self._partial, "xb", buffering)

    def commit(self) -> None:
        """Sync the file, rename it and sync its directory.

        Raises:
            OSError: another writer replaced the temporary file, or the disk is full.
        """
        with self.file:
            if not self._is_current():
                reason = "Another writer took over the file while it was written"
                raise OSError(errno.EBUSY, f"{self._path}: {reason}; let one process write it")
            try:
                self.file.flush()
                _publish(self._partial, self._path, self.file.fileno())
            finally:
                self._partial.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the temporary file, unless it is that of another writer by now."""
        with self.file:
            if self._partial.exists() and self._is_current():
                self._partial.unlink()

    def _is_current(self) -> bool:
        return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self._partial))


class ScratchFile(PendingFile):
    """A pending file whose commit uploads it with ``upload(local path)``.

    ``TMPDIR`` chooses where it lies until then. It has no name, so nothing of it is left however
    this process ends.
    """

    def __init__(self, upload: Callable[[str], None], buffering: int = -1) -> None:
        self._upload = upload
        self.file = tempfile.TemporaryFile(prefix="realign-fast-", buffering=buffering)

    def commit(self) -> None:
        """Upload the file."""
        with self.file:
            self.file.seek(0)  # also flushes
            self._upload(f"/dev/fd/{self.file.fileno()}")

    def discard(self) -> None:
        """Close the file, which then is gone: it has no name."""
        self.file.close()


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
    return path.with_name(f".{path.name}.partial")


def _publish(partial: Path, path: Path, descriptor: int) -> None:
    """Sync what is open as ``descriptor``, rename it, and sync the directory."""
    os.fsync(descriptor)
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
