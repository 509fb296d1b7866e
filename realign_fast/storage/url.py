"""Remote files: :class:`Url` is a path over fsspec, with the methods of ``LocalPath``.

Every protocol of fsspec works, also in chains (``simplecache::s3://bucket/text``). Endpoints and
credentials are configured as fsspec and its packages document it: by the environment
(``AWS_PROFILE``, ``FSSPEC_S3_ENDPOINT_URL``) and by their own files.

A file that is written appears whole: an object does when its upload ends, a file of another system
is renamed. A failure is one ``OSError`` that names the URL; a failure that may be temporary (a
broken connection, a busy server) is tried again after each of ``WAITS``.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import unquote

from .errors import Participle, may_be_temporary, raise_explained
from .read_ahead import ReadAhead, fill, pieces
from .url_write import UrlWriter

BUFFER_BYTES = 256 << 10
WAITS = (0.5, 2.0, 8.0)  # seconds before each further attempt
# What a store says of an object that changes with its content; compared without case, "-" and "_".
_VERSIONS = {"etag", "md5", "md5hash", "contentmd5", "digest", "crc32c", "generation", "checksum"}
_VERSIONS |= {"sha256", "blobid", "lastmodified", "mtime", "modified", "updated", "created"}
_one_at_a_time = threading.Lock()  # a cache would fetch a file once for each thread


class Url(UrlWriter):
    """A remote file or directory. Equal and hashed by its text; pickled as its text."""

    is_remote = True

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._connection: tuple[int, Any, str] | None = None  # process, file system, path in it
        self._size: int | None = None

    def is_file(self) -> bool:
        """Return whether a file is there."""
        return self._entry_type() == "file"

    def is_dir(self) -> bool:
        """Return whether a directory, or the common beginning of some objects, is there."""
        return self._entry_type() == "directory"

    def exists(self) -> bool:
        """Return whether anything is there."""
        return self._entry_type() is not None

    def iterdir(self) -> Iterator[Url]:
        """Yield the entries of a directory. A web server has to send a page of links."""
        return (self / name for name, _ in self.listed())

    def listed(self) -> Iterator[tuple[str, bool]]:
        """Yield the name of each entry of a directory, and whether it is a directory."""

        def list_entries(fs: Any, path: str) -> list[tuple[str, str]]:
            """List without the cache of an earlier listing."""
            fs.invalidate_cache()
            entries = fs.ls(path, detail=True)
            own = path.rstrip("/")  # some stores have an object in the name of the folder itself
            return [(o["name"], o["type"]) for o in entries if o["name"].rstrip("/") != own]

        for name, entry_type in self._ask(list_entries):
            name = name.rstrip("/").rpartition("/")[2]
            if name and not (self._web and name.startswith("?")):
                yield unquote(name) if self._web else name, entry_type == "directory"

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Return a file of bytes to read and seek in, which reads ahead."""
        if mode != "rb":
            raise ValueError(f"{self}: got mode {mode!r}, a URL is read as bytes")
        return io.BufferedReader(ReadAhead(self), BUFFER_BYTES)

    @contextmanager
    def opened(self) -> Iterator[Url]:
        """Ask for the current size, then read at offsets from the URL itself."""
        self.stamp()
        yield self

    @contextmanager
    def mapped(self) -> Iterator[io.BufferedReader]:
        """Yield a file that reads ahead: a remote file cannot be mapped."""
        with self.open() as file:
            yield file

    @contextmanager
    def descriptor(self, stamp: tuple[int, int | str]) -> Iterator[int]:
        """Yield a descriptor of the content, fetched into memory; the last such file is kept."""
        file = _in_memory(self, stamp)  # the name keeps it open when another file takes its place
        yield file.fileno()

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Yield a local copy of a small file, for libraries that open files themselves."""
        with tempfile.NamedTemporaryFile(prefix="realign-fast-", suffix=self.suffix) as file:
            file.write(self.read_bytes())
            file.flush()
            yield Path(file.name)

    def read_bytes(self) -> bytes | bytearray:
        """Return the whole content of a small file."""
        if not self._web and not self.chained:  # one request
            content: bytes = self._ask(lambda fs, path: fs.cat_file(path))
            return content
        data = bytearray(self.stamp()[0])
        fill(self, 0, memoryview(data))
        return data

    @property
    def size(self) -> int:
        """Size in bytes, as it was when the server was last asked."""
        return self.stamp()[0] if self._size is None else self._size

    def stamp(self) -> tuple[int, str]:
        """Return the size and the version that its store gives; another stamp, another content."""
        info = self._info()
        if info["type"] != "file" or info["size"] is None:
            fault = "is a directory"
            if info["type"] == "file":
                fault = "its server does not say its size"
            raise OSError(errno.EINVAL, f"{self}: {fault}; expected a file that is read by ranges")
        facts = {re.sub("[-_]", "", key.lower()): value for key, value in info.items()}
        known = [f"{key} {facts[key]}" for key in sorted(_VERSIONS & set(facts)) if facts[key]]
        self._size = int(info["size"])
        return self._size, ", ".join(known)

    def identity(self) -> dict[str, int | str]:
        """Return what identifies the content: the URL, its size, its version."""
        size, version = self.stamp()
        return {"path": str(self), "size": size, "version": version}

    def explanation(self, reason: str) -> str:
        """Return the message of a local error: it is one of the scratch file."""
        scratch = f"in its scratch file in {tempfile.gettempdir()}"
        return f"{self}: {reason} {scratch}; make room there, or name another place with TMPDIR"

    def pread(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes from ``offset`` on, fewer only at the end of the file."""
        count = min(count, self.size - offset)
        if count <= 0:
            return b""
        data: bytes = self._ask(lambda fs, path: self._range(fs, path, count, offset))
        return data

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``start..stop`` in order; several requests are in flight."""
        return pieces(self, start, stop)

    def fileno(self) -> int:
        """Raise ``io.UnsupportedOperation``: a remote file has no descriptor."""
        raise io.UnsupportedOperation("fileno")

    def _range(self, fs: Any, path: str, count: int, offset: int) -> bytes:
        if self._web and not _caches(fs):  # cat_file would take in all that a server sends
            headers = fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
            options = {"size": self.size, "cache_type": "none", "headers": headers}
            with fs.open(path, "rb", **options) as file:
                file.seek(offset)
                data: bytes = file.read(count)
        elif _caches(fs):
            with _one_at_a_time:
                data = fs.cat_file(path, start=offset, end=offset + count)
        else:
            data = fs.cat_file(path, start=offset, end=offset + count)
        if len(data) != count:
            raise ConnectionError(f"got {len(data)} of {count} bytes from byte {offset}")
        return data

    def _entry_type(self) -> str | None:
        try:
            info = self._info()
        except FileNotFoundError:
            return None
        # A web server has files only, and of a directory it shows a page.
        listing = self._web and info.get("mimetype") == "text/html"
        return "directory" if listing else str(info["type"])

    def _info(self) -> dict[str, Any]:
        def current_info(fs: Any, path: str) -> Any:
            """Ask without the cache of listings, which would tell how an object was."""
            fs.invalidate_cache()
            return fs.info(path)

        info: dict[str, Any] = self._ask(current_info)
        return info

    def _ask(self, request: Callable[[Any, str], Any], operation: Participle = "read") -> Any:
        for wait in (*WAITS, None):
            try:
                return request(*self._connected())
            except Exception as error:
                if wait is None or not may_be_temporary(error):
                    raise_explained(self, error, len(WAITS) + 1, operation)
            time.sleep(wait)

    def connect(self) -> None:
        """Make its file system before threads use it: some file systems belong to one thread."""
        self._ask(lambda fs, path: None)

    def _connected(self) -> tuple[Any, str]:
        """Return its file system in this process, and its path there."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), *_fsspec(self).core.url_to_fs(self._text))
        return self._connection[1:]


@lru_cache(maxsize=1)  # for every pass that follows over the same file
def _in_memory(url: Url, stamp: tuple[int, int | str]) -> BinaryIO:
    file = open(os.memfd_create("realign-fast"), "wb", buffering=0)
    for data in url.chunks(0, stamp[0]):
        file.write(data)
    return file


def _fsspec(url: Url) -> ModuleType:
    try:
        import fsspec
        import fsspec.core
        import fsspec.implementations.cached
    except ImportError as error:
        reason = f"{url}: URLs are read through fsspec, which does not import ({error})"
        raise ImportError(f"{reason}: pip install 'realign_fast[urls]'") from error
    module: ModuleType = fsspec
    return module


def _caches(fs: Any) -> bool:
    import fsspec.implementations.cached

    return isinstance(fs, fsspec.implementations.cached.CachingFileSystem)
