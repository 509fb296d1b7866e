"""A path that is a URL: what this package asks of a `pathlib.Path`, over fsspec. Its door.

`path_of("s3://bucket/text")` is a `Url`, `path_of("/data/text")` and `path_of("file:///data/text")`
are paths of this machine and never come here again. Every protocol of fsspec is one of ours, also
in chains (`simplecache::s3://bucket/text`); endpoints and credentials are told as fsspec and its
packages are told them: the environment (`AWS_PROFILE`, `FSSPEC_S3_ENDPOINT_URL`), their own files.

What is written appears whole: an object does when its upload ends, a file of another system is
renamed. What is wrong is one OSError that names the URL; what may pass (a broken connection, a busy
server) is tried again after each of `WAITS`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import unquote

from .errors import may_pass, refuse
from .read_ahead import ReadAhead, fill
from .url_write import UrlWriter

ASKED_AT_A_TIME = 16
BUFFER_BYTES = 256 << 10
WAITS = (0.5, 2.0, 8.0)  # seconds before each further attempt
# What stores say of an object that another content changes; compared without case, "-" and "_".
_VERSIONS = {"etag", "md5", "md5hash", "contentmd5", "digest", "crc32c", "generation", "checksum"}
_VERSIONS |= {"sha256", "blobid", "lastmodified", "mtime", "modified", "updated", "created"}
_URL = re.compile("(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://")
Item, Result = TypeVar("Item"), TypeVar("Result")
_one_at_a_time = threading.Lock()  # a cache would fetch a file once for each thread


def path_of(path: str | os.PathLike[str] | Url) -> Path | Url:
    """A URL, or a path of this machine."""
    if isinstance(path, Url):
        return path
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else str(path)  # a UPath
    if local := re.fullmatch("(?:file|local)://(/[^:]*)", text):
        return Path(local[1])
    return Url(text) if _URL.match(text) else Path(text)


def local_path(out: str | os.PathLike[str] | Url) -> Path:
    """Where something is written that is no corpus.

    Raises:
        ValueError: it is a URL.
    """
    if isinstance(path := path_of(out), Url):
        raise ValueError(f"{out}: is a URL, this is written to a directory; give one, and copy it")
    return path


def place_of(out: str | os.PathLike[str] | Url) -> Path | Url:
    """Where a result is written.

    Raises:
        ValueError: it is a URL that takes none.
    """
    if isinstance(path := path_of(out), Url) and (path.chained or path.is_web):
        what = "is read only: " + ("a chain of systems" if path.chained else "a web server")
        raise ValueError(f"{out}: {what} takes no files; give a directory, or s3://, gs://, ...")
    return path


@contextmanager
def at_hand(path: str | os.PathLike[str] | Url) -> Iterator[str | os.PathLike[str]]:
    """A small file as one of this machine, for libraries that open files themselves."""
    if not isinstance(path := path_of(path), Url):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="realign-fast-", suffix=path.suffix) as file:
        file.write(path.read_bytes())
        file.flush()
        yield file.name


def each(
    function: Callable[[Item], Result], items: Sequence[Item], where: Any, threads: int = 1
) -> list[Result]:
    """`function` of every item, `threads` at a time; of items at URLs (`where(item)`) many.

    Asking a server is waiting for it.
    """
    urls = [path for path in map(where, items) if isinstance(path, Url)]
    if not urls and threads == 1:
        return list(map(function, items))
    for url in urls:
        url.connect()
    with ThreadPoolExecutor(ASKED_AT_A_TIME if urls else threads, "realign-fast-ask") as pool:
        answers = [pool.submit(function, item) for item in items]
        try:
            return [answer.result() for answer in answers]
        finally:
            pool.shutdown(cancel_futures=True)


class Url(UrlWriter):
    """A place that fsspec opens. Equal and hashed by its text; pickled as its text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._door: tuple[int, Any, str] | None = None  # process, file system, path in it
        self._size: int | None = None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def exists(self) -> bool:
        return self._kind() is not None

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[Url]:
        """What lies in it. A web server has to send a page of links."""
        return (self / name for name, _ in self.listed())

    def listed(self) -> Iterator[tuple[str, str]]:
        """The name and type ("file", "directory") of what lies in it."""

        def fresh(fs: Any, path: str) -> list[tuple[str, str]]:
            fs.invalidate_cache()
            found = fs.ls(path, detail=True)
            mine = path.rstrip("/")  # some stores have an object in the name of the folder itself
            return [(o["name"], o["type"]) for o in found if o["name"].rstrip("/") != mine]

        for name, kind in self._ask(fresh):
            name = name.rstrip("/").rpartition("/")[2]
            if name and not (self._web and name.startswith("?")):
                yield unquote(name) if self._web else name, kind

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """A file of bytes to read and seek in, which reads ahead."""
        if mode != "rb":
            raise ValueError(f"{self}: got mode {mode!r}, a URL is read as bytes")
        return io.BufferedReader(ReadAhead(self), BUFFER_BYTES)

    def read_bytes(self) -> bytes | bytearray:
        if not self._web and not self.chained:  # one request
            return self._ask(lambda fs, path: fs.cat_file(path))
        data = bytearray(self.stamp()[0])
        fill(self, 0, memoryview(data))
        return data

    @property
    def size(self) -> int:
        """Bytes, as they were when they were last asked for."""
        return self.stamp()[0] if self._size is None else self._size

    def stamp(self) -> tuple[int, str]:
        """Size, and what its store says of its content: another stamp is another content."""
        info = self._info()
        if info["type"] != "file" or info["size"] is None:
            got = "is a directory" if info["type"] != "file" else "its server does not say its size"
            raise OSError(errno.EINVAL, f"{self}: {got}; expected a file that is read by ranges")
        words = {re.sub("[-_]", "", key.lower()): value for key, value in info.items()}
        known = [f"{key} {words[key]}" for key in sorted(_VERSIONS & set(words)) if words[key]]
        self._size = int(info["size"])
        return self._size, ", ".join(known)

    def pread(self, count: int, offset: int) -> bytes:
        """Bytes from `offset` on, fewer than `count` only at the end of the file."""
        count = min(count, self.size - offset)
        return (
            self._ask(lambda fs, path: self._range(fs, path, count, offset)) if count > 0 else b""
        )

    def _range(self, fs: Any, path: str, count: int, offset: int) -> bytes:
        if self._web and not _caches(fs):  # cat_file would take in all that a server sends
            headers = fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
            options = {"size": self.size, "cache_type": "none", "headers": headers}
            with fs.open(path, "rb", **options) as file:
                file.seek(offset)
                data = file.read(count)
        elif _caches(fs):
            with _one_at_a_time:
                data = fs.cat_file(path, start=offset, end=offset + count)
        else:
            data = fs.cat_file(path, start=offset, end=offset + count)
        if len(data) != count:
            raise ConnectionError(f"got {len(data)} of {count} bytes from byte {offset}")
        return data

    def _kind(self) -> str | None:
        try:
            info = self._info()
        except FileNotFoundError:
            return None
        # A web server has files only, and of a directory it shows a page.
        listing = self._web and info.get("mimetype") == "text/html"
        return "directory" if listing else info["type"]

    def _info(self) -> dict[str, Any]:
        def fresh(fs: Any, path: str) -> dict[str, Any]:
            fs.invalidate_cache()  # of listings, which would tell how an object was
            return fs.info(path)

        return self._ask(fresh)

    def _ask(self, what: Callable[[Any, str], Any], done: str = "read") -> Any:
        """`what(file system, path)`, tried again where that may help; `done` is for its error."""
        for wait in (*WAITS, None):
            try:
                return what(*self._connected())
            except Exception as error:
                if wait is None or not may_pass(error):
                    refuse(self, error, len(WAITS) + 1, done)
            time.sleep(wait)

    def connect(self) -> None:
        """Find its file system: before threads ask, as some file systems are a thread's own."""
        self._ask(lambda fs, path: None)

    def _connected(self) -> tuple[Any, str]:
        """Its file system, and its path there."""
        if self._door is None or self._door[0] != os.getpid():
            self._door = (os.getpid(), *_fsspec(self).core.url_to_fs(self._text))
        return self._door[1:]


def _fsspec(url: Url) -> ModuleType:
    try:
        import fsspec
        import fsspec.core
        import fsspec.implementations.cached
    except ImportError as error:
        what = f"{url}: URLs are read through fsspec, which does not import ({error})"
        raise ImportError(f"{what}: pip install 'realign_fast[urls]'") from error
    return fsspec


def _caches(fs: Any) -> bool:
    import fsspec.implementations.cached

    return isinstance(fs, fsspec.implementations.cached.CachingFileSystem)
