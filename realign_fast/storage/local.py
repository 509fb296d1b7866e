"""Local paths: ``pathlib`` with the methods that every path of this package has."""

from __future__ import annotations

import errno
import glob
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath

from . import atomic
from .errors import explained


class LocalFile(io.FileIO):
    """A file opened for reads at offsets; every read asks the file system anew."""

    @property
    def size(self) -> int:
        """Size in bytes as it is now."""
        return os.fstat(self.fileno()).st_size

    def pread(self, count: int, offset: int) -> bytes:
        """Return up to ``count`` bytes from ``offset`` on."""
        return os.pread(self.fileno(), count, offset)


class LocalPath(PosixPath):
    """A local file or directory. It equals the ``pathlib.Path`` of the same text."""

    is_remote = False  # a question about it is no request to a server
    is_web = False  # its directories are listed, not shown as pages of links

    def stamp(self) -> tuple[int, int]:
        """Return size and modification time (ns) of a regular file, which tell its content."""
        with explained(self.explanation):
            status = os.stat(self)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError(errno.EINVAL, self.explanation("Not a regular file"))
        return status.st_size, status.st_mtime_ns

    def identity(self) -> dict[str, int | str]:
        """Return what identifies the content: the path without links, size, modification time."""
        size, mtime_ns = self.stamp()
        return {"path": os.path.realpath(self), "size": size, "mtime_ns": mtime_ns}

    def explanation(self, reason: str) -> str:
        """Return the message of an error of the operating system, with the file and an advice."""
        link = f" (a link to {os.readlink(self)})" if os.path.islink(self) else ""
        if reason == os.strerror(errno.ENOMEM):  # the file is not at fault
            return f"{self}{link}: {reason}"
        missing = "it" if os.path.isdir(self.parent) else "the directory"
        advice = f"check that {missing} exists and that this user may use it"
        if reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            advice = "check that the disk has room, and which limits there are (quota, ulimit -f)"
        return f"{self}{link}: {reason}; {advice}"

    def is_within(self, folder: object) -> bool:
        """Return whether this path is ``folder`` or lies in it, links followed."""
        return isinstance(folder, Path) and self.resolve().is_relative_to(folder.resolve())

    @property
    def is_glob(self) -> bool:
        """Return whether the path is a pattern of names (`*`, `?`, `[...]`, `**`)."""
        return glob.has_magic(str(self))

    def matches(self) -> Iterator[LocalPath]:
        """Yield what the path matches as a pattern; hidden names only where it says so."""
        return map(type(self), glob.iglob(str(self), recursive=True))

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
        with explained(self.explanation):
            return LocalFile(self, "rb")

    @contextmanager
    def descriptor(self, stamp: tuple[int, int | str]) -> Iterator[int]:
        """Open the file and yield its descriptor; ``stamp`` matters to remote files only."""
        with open(self, "rb") as file:
            yield file.fileno()

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Yield a path of the open file for libraries, which refuse names that are not UTF-8."""
        with open(self, "rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")

    pending_file = atomic.pending_file  # a method, as every function in a class is

    def write_whole(self, data: bytes) -> None:
        """Write a file that appears whole or not at all; an error names it."""
        with explained(self.explanation), self.pending_file() as file:
            file.write(data)
