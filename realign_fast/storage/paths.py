"""One interface for local and remote files, and the functions that give an argument this type.

``storage_path("s3://bucket/text")`` is a :class:`~realign_fast.storage.url.Url`;
``storage_path("/data/text")`` and ``storage_path("file:///data/text")`` are a
:class:`~realign_fast.storage.local.LocalPath`. Public functions take :data:`AnyPath`; all code
behind them works with :class:`StoragePath` and does not ask which of the two it has. Where the
cost of a request decides how something is done, ``is_remote`` says so.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from .atomic import PendingFile
from .local import LocalPath
from .read_ahead import ByteSource
from .url import Url

CONCURRENT_REQUESTS = 16
_URL = re.compile("(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://")
_LOCAL_URL = re.compile("(?:file|local)://(/[^:]*)")

Item = TypeVar("Item")
Result = TypeVar("Result")
Stamp: TypeAlias = tuple[int, int | str]  # size in bytes; modification time or remote version


class OpenedFile(ByteSource, Protocol):
    """A file that is opened for reads at offsets."""

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``start..stop`` in order, in chunks of a few MiB or less."""

    def fileno(self) -> int:
        """Return the file descriptor; ``io.UnsupportedOperation`` for a remote file."""


class StoragePath(Protocol):
    """A local or remote path. Methods that ``pathlib`` has too mean the same as there.

    Errors of a remote path are an ``OSError`` that names the URL and says what to do; errors of
    the operating system about a local path get the same from :func:`explained`.
    """

    @property
    def name(self) -> str:
        """The last part of the path."""

    @property
    def stem(self) -> str:
        """The name without its suffix."""

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""

    @property
    def parent(self) -> StoragePath:
        """The directory it lies in."""

    @property
    def protocol(self) -> str:
        """The protocol of fsspec; ``"file"`` for a local path."""

    @property
    def is_remote(self) -> bool:
        """True for a URL: every question is a request to a server (or to fsspec in general)."""

    @property
    def is_web(self) -> bool:
        """True if a web server shows it, which lists directories as pages of links."""

    @property
    def read_only_reason(self) -> str:
        """Why nothing can be written to this kind of path; empty if something can."""

    def __truediv__(self, name: str, /) -> StoragePath: ...
    def __hash__(self) -> int: ...
    def __lt__(self, path: Any, /) -> bool: ...

    def exists(self) -> bool:
        """Return whether anything is there."""

    def is_file(self) -> bool:
        """Return whether a file is there."""

    def is_dir(self) -> bool:
        """Return whether a directory is there."""

    def resolve(self) -> StoragePath:
        """Return the path without links, or the URL without a slash at its end."""

    def iterdir(self) -> Iterator[StoragePath]:
        """Yield the entries of a directory."""

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Create the directory; a no-op on object stores."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""

    def rmdir(self) -> None:
        """Remove the empty directory; a no-op at a URL."""

    def open(self, mode: Literal["rb"], /) -> io.BufferedReader:
        """Return a file of bytes to read and seek in."""

    def read_bytes(self) -> bytes | bytearray:
        """Return the whole content of a small file."""

    def connect(self) -> None:
        """Prepare a remote file system for use from several threads."""

    def stamp(self) -> Stamp:
        """Return the size and what changes with the content: modification time (ns) or version."""

    def identity(self) -> dict[str, int | str]:
        """Return ``path`` and the stamp as the keys of resumable outputs hold them."""

    def explanation(self, reason: str) -> str:
        """Return the message for an error of the operating system on this path."""

    def is_within(self, folder: StoragePath) -> bool:
        """Return whether this path is ``folder`` or lies in it."""

    def listed(self) -> Iterator[tuple[str, bool]]:
        """Yield the name of each entry of a directory, and whether it is a directory."""

    def remove_tree(self) -> None:
        """Remove the directory with everything below it."""

    def opened(self) -> AbstractContextManager[OpenedFile]:
        """Open a regular file for reads at offsets."""

    def mapped(self) -> AbstractContextManager[mmap.mmap | io.BufferedReader]:
        """Yield a memory map of a local file, or a remote file that reads ahead."""

    def descriptor(self, stamp: Stamp) -> AbstractContextManager[int]:
        """Yield a descriptor of the content; that of a remote file lies in memory."""

    def local_copy(self) -> AbstractContextManager[Path]:
        """Yield a local path of the content, for libraries that open files themselves."""

    def pending_file(self, buffering: int = -1) -> PendingFile:
        """Open a file that appears under this name when it is committed."""

    def write_whole(self, data: bytes) -> None:
        """Write a small file that appears whole or not at all."""


AnyPath: TypeAlias = "str | os.PathLike[str] | StoragePath"


def storage_path(path: AnyPath) -> LocalPath | Url:
    """Return a path of this machine or a URL, whichever the text names."""
    if isinstance(path, LocalPath | Url):
        return path
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else str(path)  # a UPath
    if local := _LOCAL_URL.fullmatch(text):
        return LocalPath(local[1])
    return Url(text) if _URL.match(text) else LocalPath(text)


def output_path(path: AnyPath) -> LocalPath | Url:
    """Return the path of a result.

    Raises:
        ValueError: the path is a URL that nothing can be written to.
    """
    result = storage_path(path)
    if reason := result.read_only_reason:
        advice = "give a directory, or s3://, gs://, ..."
        raise ValueError(f"{path}: is read only: {reason} takes no files; {advice}")
    return result


def local_path(path: AnyPath) -> LocalPath:
    """Return the path of something that is written to local directories only.

    Raises:
        ValueError: the path is a URL.
    """
    result = storage_path(path)
    if isinstance(result, Url):
        raise ValueError(f"{path}: is a URL, this is written to a directory; give one, and copy it")
    return result


def write_whole(path: AnyPath, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: names the file; nothing of it is left behind.
        ValueError: the path is a URL that nothing can be written to.
    """
    output_path(path).write_whole(data)


def write_json(path: AnyPath, value: dict[str, Any]) -> None:
    """Write a json file that appears whole or not at all; its directory is made."""
    result = output_path(path)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_whole((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def explained(path: AnyPath) -> Iterator[None]:
    """Raise errors of the operating system again, with the file and an advice in their message."""
    try:
        yield
    except OSError as error:
        if not error.errno or error.strerror != os.strerror(error.errno):
            raise  # whoever raised it has said what is wrong
        message = storage_path(path).explanation(error.strerror)
        raise OSError(error.errno, message) from error


def map_concurrently(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    path_of: Callable[[Item], StoragePath],
    threads: int = 1,
) -> list[Result]:
    """Return ``function`` of every item, in order; of items at URLs many run at a time.

    Args:
        function: what is called, from several threads.
        items: its arguments.
        path_of: gives the path of an item.
        threads: how many calls run at a time if all paths are local.
    """
    remote = [path for path in map(path_of, items) if path.is_remote]
    if not remote and threads == 1:
        return list(map(function, items))
    for path in remote:
        path.connect()
    with ThreadPoolExecutor(CONCURRENT_REQUESTS if remote else threads, "realign-fast-ask") as pool:
        answers = [pool.submit(function, item) for item in items]
        try:
            return [answer.result() for answer in answers]
        finally:
            pool.shutdown(cancel_futures=True)
