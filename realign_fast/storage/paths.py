"""One type for local and remote paths, and the functions that give an argument this type.

Public functions take :data:`AnyPath`. All code behind them works with :data:`StoragePath`, a
:class:`~realign_fast.storage.url.Url` or a :class:`~realign_fast.storage.paths.LocalPath`, and
uses methods that both have. ``is_remote`` says whether a question is a request to a server.
"""

from __future__ import annotations

import errno
import glob
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PosixPath
from typing import Any, TypeAlias, TypeVar

from . import atomic, errors
from .url import Url

CONCURRENT_REQUESTS = 16
RECORDS = "__realign__"  # readers of datasets skip names that begin with two underscores
_RECORDS_OF_0_1 = "_stats", "_embed", "embed.json", "aligner.safetensors", "space.safetensors"
_URL = re.compile("(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://")
_LOCAL_URL = re.compile("(?:file|local)://(/[^:]*)")


class LocalFile(io.FileIO):
    """A file opened for reads at offsets; every read asks the file system anew."""

    def stamp(self) -> tuple[int, int]:
        """Return the :meth:`LocalPath.stamp` of the file that is open."""
        status = os.fstat(self.fileno())
        return status.st_size, status.st_mtime_ns

    def pread(self, count: int, offset: int) -> bytes:
        """Return up to ``count`` bytes from ``offset`` on."""
        return os.pread(self.fileno(), count, offset)


class LocalPath(PosixPath):
    """A local file or directory. It equals the ``pathlib.Path`` of the same text."""

    is_remote = False  # a question about it is no request to a server
    is_web = False  # its directories are listed, not shown as pages of links

    def stamp(self) -> tuple[int, int]:
        """Return size and modification time (ns) of a regular file, which tell its content."""
        with errors.explained(self.explanation):
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

    def resolve(self, strict: bool = False) -> LocalPath:
        """Return the path without links; a loop of links stays, an OSError where it is used."""
        return type(self)(os.path.realpath(self, strict=strict))

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

    def read_bytes(self) -> bytes:
        """Return the content of the file; an error names it, also one of the read itself."""
        with errors.explained(self.explanation):
            return super().read_bytes()

    def opened(self) -> LocalFile:
        """Open a regular file for reads at offsets; errors are those of :meth:`stamp`."""
        self.stamp()
        with errors.explained(self.explanation):
            return LocalFile(self, "rb")

    @contextmanager
    def local_copy(self, stamp: tuple[int, int | str] | None = None) -> Iterator[Path]:
        """Yield a path of the open file for libraries, which refuse names that are not UTF-8.

        ``stamp`` matters to remote files only.
        """
        with open(self, "rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")

    pending_file = atomic.pending_file  # a method, as every function in a class is

    def write_whole(self, data: bytes) -> None:
        """Write a file that appears whole or not at all; an error names it."""
        with errors.explained(self.explanation), self.pending_file() as file:
            file.write(data)


StoragePath: TypeAlias = LocalPath | Url
OpenedFile: TypeAlias = LocalFile | Url  # a URL is its own file: every read is a request
AnyPath: TypeAlias = str | os.PathLike[str] | Url
Stamp: TypeAlias = tuple[int, int | str]  # size in bytes; modification time (ns) or remote version
Item = TypeVar("Item")
Result = TypeVar("Result")
Place = TypeVar("Place", StoragePath, Path)


def storage_path(path: AnyPath) -> StoragePath:
    """Return a path of this machine or a URL, whichever the text names."""
    if isinstance(path, LocalPath | Url):
        return path
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else str(path)  # a UPath
    if local := _LOCAL_URL.fullmatch(text):
        return LocalPath(local[1])
    return Url(text) if _URL.match(text) else LocalPath(text)


def output_path(path: AnyPath) -> StoragePath:
    """Return the path of a result; ValueError if it is a URL that nothing can be written to."""
    result = storage_path(path)
    if isinstance(result, Url) and (result.in_chain or result.is_web):
        reason = "a chain of systems" if result.in_chain else "a web server"
        raise ValueError(f"{result}: is read only: {reason} takes no files; give a directory")
    return result


def local_path(path: AnyPath) -> LocalPath:
    """Return the path of something that is written to local directories only, never to URLs."""
    result = storage_path(path)
    if isinstance(result, Url):
        raise ValueError(f"{result}: is a URL, this is written to a directory; give one")
    return result


def records_of(out: Place) -> Place:
    """Return the folder of an output that holds everything but its rows and their metadata.

    It is ``__realign__`` in ``out``, or ``out`` itself where version 0.1.0 began the output.
    """
    records = out / RECORDS
    is_old = not records.is_dir() and any((out / name).exists() for name in _RECORDS_OF_0_1)
    return out if is_old else records


def output_of(records: Place) -> Place:
    """Return the output whose :func:`records_of` are in a folder."""
    return records.parent if records.name == RECORDS else records


def write_whole(path: AnyPath, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    output_path(path).write_whole(data)


def write_json(path: AnyPath, value: dict[str, Any]) -> None:
    """Write a json file that appears whole or not at all; its directory is made."""
    result = output_path(path)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_whole((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def natural_order(path: AnyPath) -> tuple[list[int | str], str]:
    """Return a sort key that puts `part_2` before `part_10`, and `part_01` before `part_1`."""
    text = str(path)
    pieces = re.split("([0-9]+)", text)
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], text


def explained(path: AnyPath) -> AbstractContextManager[None]:
    """Raise errors of the operating system again, with the file and an advice in their message."""
    return errors.explained(storage_path(path).explanation)


def map_concurrently(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    path_of: Callable[[Item], StoragePath],
    threads: int = 1,
) -> list[Result]:
    """Return ``function`` of every item, in order; of items at URLs many run at a time.

    ``path_of`` gives the path of an item; ``threads`` calls run at a time if all are local.
    """
    remote = [path for path in map(path_of, items) if isinstance(path, Url)]
    if not remote and threads == 1:
        return list(map(function, items))
    for path in remote:
        path.connect()
    with ThreadPoolExecutor(CONCURRENT_REQUESTS if remote else threads, "realign-fast-ask") as pool:
        return list(pool.map(function, items))
