"""Local paths: ``pathlib`` with the methods that every path of this package has."""

from __future__ import annotations

import errno
import io
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath

from .atomic import PartialFile

CHUNK_BYTES = 1 << 20


class LocalFile(io.FileIO):
    """A file opened for reads at offsets; every read asks the file system anew."""

    @property
    def size(self) -> int:
        """Size in bytes as it is now."""
        return os.fstat(self.fileno()).st_size

    def pread(self, count: int, offset: int) -> bytes:
        """Return up to ``count`` bytes from ``offset`` on."""
        return os.pread(self.fileno(), count, offset)

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``start..stop`` in order; fewer if the file has become shorter."""
        while start < stop and (data := self.pread(min(stop - start, CHUNK_BYTES), start)):
            yield data
            start += len(data)


class LocalPath(PosixPath):
    """A local file or directory. It equals the ``pathlib.Path`` of the same text."""

    protocol = "file"  # its name in fsspec
    is_remote = False  # a question about it is no request to a server
    is_web = False  # its directories are listed, not shown as pages of links
    read_only_reason = ""  # nothing forbids writing to such a path in general

    def connect(self) -> None:
        """Do nothing: a local path needs no connection."""

    def stamp(self) -> tuple[int, int]:
        """Return size and modification time (ns) of a regular file; another stamp, another content.

        Raises:
            OSError: the file cannot be looked at, or is no regular file; the message names it.
        """
        try:
            status = os.stat(self)
        except OSError as error:
            raise OSError(error.errno, self.explanation(error.strerror or "")) from error
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError(errno.EINVAL, self.explanation("Not a regular file"))
        return status.st_size, status.st_mtime_ns

    def identity(self) -> dict[str, int | str]:
        """Return what identifies the content: the path without links, size, modification time."""
        try:
            status = os.stat(self)
        except OSError as error:
            advice = "what is finished is kept: bring it back and run the same command again"
            raise OSError(error.errno, f"{self}: {error.strerror}; {advice}") from error
        times = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        return {"path": os.path.realpath(self), **times}

    def explanation(self, reason: str) -> str:
        """Return the message of an error of the operating system, with the file and an advice."""
        link = f" (a link to {os.readlink(self)})" if self.is_symlink() else ""
        advice = "check that it exists, that this user may use it and that the disk has room"
        return f"{self}{link}: {reason}; {advice}"

    def is_within(self, folder: object) -> bool:
        """Return whether this path is ``folder`` or lies in it, links followed."""
        return isinstance(folder, Path) and self.resolve().is_relative_to(folder.resolve())

    def listed(self) -> Iterator[tuple[str, bool]]:
        """Yield the name of each entry of a directory, and whether it is a directory."""
        with os.scandir(self) as entries:
            yield from ((entry.name, entry.is_dir()) for entry in entries)

    def remove_tree(self) -> None:
        """Remove the directory with everything below it."""
        shutil.rmtree(self)

    def opened(self) -> LocalFile:
        """Open a regular file for reads at offsets; errors are those of :meth:`stamp`."""
        self.stamp()
        try:
            return LocalFile(self, "rb")
        except OSError as error:
            raise OSError(error.errno, self.explanation(error.strerror or "")) from error

    @contextmanager
    def mapped(self) -> Iterator[mmap.mmap | io.BufferedReader]:
        """Map the file for reading. Arrays may view the map, so the last one of them unmaps it."""
        with open(self, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield data

    @contextmanager
    def descriptor(self, stamp: tuple[int, int | str]) -> Iterator[int]:
        """Open the file and yield its descriptor; ``stamp`` matters to remote files only."""
        with open(self, "rb") as file:
            yield file.fileno()

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Yield this path: it needs no copy."""
        yield self

    def pending_file(self, buffering: int = -1) -> PartialFile:
        """Open a file that appears under this name when it is committed."""
        return PartialFile(self, buffering)

    def write_whole(self, data: bytes) -> None:
        """Write a file that appears whole or not at all.

        Raises:
            OSError: names the file; nothing of it is left behind.
        """
        try:
            with self.pending_file() as file:
                file.write(data)
        except OSError as error:
            if error.strerror != os.strerror(error.errno or 0):
                raise
            advice = "check that the directory exists, may be written and has room"
            raise OSError(error.errno, f"{self}: {error.strerror}; {advice}") from error
