"""Remote files: :class:`Url` is a path over fsspec, with the methods of ``LocalPath``.

Every protocol of fsspec works, also in chains (``simplecache::s3://bucket/text``), configured as
fsspec and its packages document it. A file that is written appears whole: an object does when its
upload ends, a file of another system is renamed. A failure is one ``OSError`` that names the URL; a
failure that may be temporary is tried again after each of ``WAITS``.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, unquote

from .._extras import import_extra
from .errors import Participle, explained, explained_error, may_be_temporary, redacted
from .read_ahead import ReadAhead, pieces

BUFFER_BYTES = 256 << 10
WAITS = (0.5, 2.0, 8.0)  # seconds before each further attempt
# What a store says of an object that changes with its content; compared without case, "-" and "_".
_VERSIONS = {"etag", "md5", "md5hash", "contentmd5", "digest", "crc32c", "generation", "checksum"}
_VERSIONS |= {"sha256", "blobid", "lastmodified", "mtime", "modified", "updated", "created"}
# Stores of objects, which have no directories and show nothing of an upload before its end.
_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"}
_IN_BUCKETS = {f"{protocol}://" for protocol in _OBJECTS - {"memory", "hf"}}
_UPLOAD = {"chunksize": 16 << 20, "max_concurrency": 4}  # of an upload in parts: what memory holds
_one_at_a_time = threading.Lock()  # a cache would fetch a file once for each thread


@dataclass(order=True, unsafe_hash=True, repr=False)
class Url:
    """A remote file or directory. Equal, ordered and hashed by its text; pickled as its text.

    Its ``str`` is for people, reports and manifests: passwords and signatures are left out.
    """

    _text: str

    is_remote = True

    def __post_init__(self) -> None:
        self._shown = redacted(self._text)
        self._has_secrets = self._shown != self._text  # which errors must not carry along
        # The first link of a chain that has a path is where names are; what follows encloses it.
        if not (parts := re.fullmatch("(.*?://)(.*?)((?:::.*)?)", self._text)):
            raise ValueError(f"{self}: expected a URL, as protocol://place")
        self._prefix, path, self._suffix = parts.groups()
        if self._prefix in _IN_BUCKETS and not path.strip("/") and not self._suffix:
            raise ValueError(f"{self}: names no bucket; expected {self._prefix}bucket/folder")
        self.is_web = self._prefix.endswith(("http://", "https://"))
        query = path.index("?") if self.is_web and "?" in path else len(path)
        self._path: str = path[:query]
        self._suffix = path[query:] + self._suffix
        self.in_chain = "::" in self._text  # one file system lies in another
        self._connection: tuple[int, Any, str] | None = None  # process, file system, path in it
        self._size: int | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        last = self._path.rstrip("/").rpartition("/")[2]
        return unquote(last) if self.is_web else last

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> Url:
        """The directory it lies in; that of a bucket is the bucket."""
        path, _, last = self._path.rstrip("/").rpartition("/")
        parent = path if path.strip("/") else f"{path}/{last}" if path else last
        return Url(f"{self._prefix}{parent}{self._suffix}")

    def resolve(self) -> Url:
        """Return the URL without a slash at its end."""
        return (self / "child").parent

    def is_within(self, folder: object) -> bool:
        """Return whether this URL is ``folder`` or lies in it, by their texts."""
        if not isinstance(folder, Url):
            return False
        own_path, folder_path = (url._path.strip("/") + "/" for url in (self, folder))
        return self._prefix == folder._prefix and own_path.startswith(folder_path)

    def __truediv__(self, name: str) -> Url:
        name = quote(name) if self.is_web else name
        base = f"{self._path.rstrip('/')}/" if self._path else ""
        return Url(f"{self._prefix}{base}{name}{self._suffix}") if name else self

    def __str__(self) -> str:
        return self._shown

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __reduce__(self) -> tuple[type[Url], tuple[str]]:
        return Url, (self._text,)

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

    @property
    def is_glob(self) -> bool:
        """Return whether the path is a pattern of names (`*`, `**`)."""
        return "*" in self._path and not self.in_chain

    def matches(self) -> Iterator[Url]:
        """Yield what the path matches as a pattern."""

        def match_names(fs: Any, path: str) -> list[str]:
            fs.invalidate_cache()
            return [fs.unstrip_protocol(name) for name in fs.glob(path)]

        return (Url(name + self._suffix) for name in self._ask(match_names))

    def listed(self) -> Iterator[tuple[str, bool]]:
        """Yield the name of each entry of a directory, and whether it is a directory."""

        def _list_entries(fs: Any, path: str) -> list[tuple[str, str]]:
            fs.invalidate_cache()  # of an earlier listing
            entries = fs.ls(path, detail=True)
            own = path.rstrip("/")  # some stores have an object in the name of the folder itself
            return [(o["name"], o["type"]) for o in entries if o["name"].rstrip("/") != own]

        for path, entry_type in self._ask(_list_entries):
            name = path.rstrip("/").rpartition("/")[2]
            if name and not (self.is_web and name.startswith("?")):
                yield unquote(name) if self.is_web else name, entry_type == "directory"

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """Return a file of bytes to read and seek in, which reads ahead."""
        return io.BufferedReader(ReadAhead(self.pread, self.size), BUFFER_BYTES)

    @contextmanager
    def opened(self) -> Iterator[Url]:
        """Read at offsets from the URL itself, whose size is that of the last stamp."""
        yield self

    @contextmanager
    def local_copy(self, stamp: tuple[int, int | str] | None = None) -> Iterator[Path]:
        """Yield a path of the content in a scratch file; the last such file is kept."""
        with explained(self.explanation):
            file = _fetched(self, stamp or self.stamp())
        yield Path(f"/dev/fd/{file.fileno()}")  # the name keeps the file open

    def read_bytes(self) -> bytes:
        """Return the whole content of a small file."""
        if self.is_web or self.in_chain:
            return b"".join(pieces(self.pread, 0, self.stamp()[0]))
        return bytes(self._ask(lambda fs, path: fs.cat_file(path)))  # one request

    @property
    def size(self) -> int:
        """Size in bytes, as it was when the server was last asked."""
        return self.stamp()[0] if self._size is None else self._size

    def stamp(self) -> tuple[int, str]:
        """Return the size and the version that its store gives; another stamp, another content."""
        info = self._ask(_current_info)
        if info["type"] != "file" or info["size"] is None:
            is_file = info["type"] == "file"
            fault = "its server does not say its size" if is_file else "is a directory"
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
        return bytes(self._ask(lambda fs, path: self._range(fs, path, count, offset)))

    def fileno(self) -> int:
        """Raise ``io.UnsupportedOperation``: a remote file has no descriptor."""
        raise io.UnsupportedOperation("fileno")

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Create the directory and those above it; a no-op on object stores."""
        self._ask(
            lambda fs, path: _keeps_objects(fs) or fs.makedirs(path, exist_ok=True), "written"
        )

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            self._ask(lambda fs, path: fs.rm_file(path), "removed")
        except FileNotFoundError:
            if not missing_ok:
                raise

    @contextmanager
    def pending_file(self, buffering: int = -1) -> Iterator[IO[bytes]]:
        """Yield a scratch file in ``TMPDIR``, without a name, that is uploaded at the end."""
        scratch = scratch_folder()
        with tempfile.TemporaryFile("w+b", buffering, prefix="realign-fast-", dir=scratch) as file:
            yield file
            file.seek(0)  # also flushes
            self._write(partial(_upload, f"/dev/fd/{file.fileno()}"))

    def write_whole(self, data: bytes) -> None:
        """Write a small file that appears whole or not at all; what was there is replaced."""
        self._write(lambda fs, path: fs.pipe_file(path, data))

    def create(self, data: bytes) -> bool:
        """Write a small file if none is there, and return whether it was written.

        Of two processes one succeeds; a store that cannot promise that replaces what is there.
        """

        def _create_file(fs: Any, path: str) -> bool:
            try:
                if not hasattr(fs, "_pipe_file") and type(fs).pipe_file.__module__ == "fsspec.spec":
                    with fs.open(path, "xb") as file:  # its "create" would look and then write
                        file.write(data)
                else:
                    fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.ENOSYS:
                    raise  # ENOSYS is that of servers that know S3, but not that
                fs.pipe_file(path, data)
            return True

        self.parent.mkdir()
        return bool(self._ask(_create_file, "written"))

    def connect(self) -> None:
        """Make its file system before threads use it: some file systems belong to one thread."""
        self._ask(lambda fs, path: None)

    def _write(self, send: Callable[[Any, str], Any]) -> None:
        def _send_whole(fs: Any, path: str) -> None:
            if _keeps_objects(fs):
                send(fs, path)
                return  # nothing is seen of an upload before its end
            folder = fs._parent(path)
            partial = f"{folder}/.{self.name}.partial"
            fs.makedirs(folder, exist_ok=True)
            send(fs, partial)
            if fs.exists(path):  # some systems do not rename onto a file
                fs.rm_file(path)
            fs.mv(partial, path)

        self._ask(_send_whole, "written")

    def _range(self, fs: Any, path: str, count: int, offset: int) -> bytes:
        if self.is_web and not self.in_chain:  # cat_file would take in all that a server sends
            headers = fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
            options = {"size": self.size, "cache_type": "none", "headers": headers}
            with fs.open(path, "rb", **options) as file:
                file.seek(offset)
                data: bytes = file.read(count)
        else:
            with _one_at_a_time if self.in_chain else nullcontext():
                data = fs.cat_file(path, start=offset, end=offset + count)
        if len(data) != count:
            raise ConnectionError(f"got {len(data)} of {count} bytes from byte {offset}")
        return data

    def _entry_type(self) -> str | None:
        try:
            info = self._ask(_current_info)
        except FileNotFoundError:
            return None
        # A web server has files only, and of a directory it shows a page.
        listing = self.is_web and info.get("mimetype") == "text/html"
        return "directory" if listing else str(info["type"])

    def _ask(self, request: Callable[[Any, str], Any], operation: Participle = "read") -> Any:
        """Return ``request(file system, path)``, tried again where that may help.

        ``operation`` stands in the message of the error if it fails for good.
        """
        for wait in (*WAITS, None):
            try:
                return request(*self._connected())
            except Exception as error:
                if wait is None or not may_be_temporary(error):
                    failure = explained_error(self, error, len(WAITS) + 1, operation)
                    raise failure from (None if self._has_secrets else error)
            time.sleep(wait)

    def _connected(self) -> tuple[Any, str]:
        """Return its file system in this process, and its path there."""
        if self._connection is None or self._connection[0] != os.getpid():
            fsspec = import_extra("fsspec.core", "urls", "A URL")
            self._connection = (os.getpid(), *fsspec.core.url_to_fs(self._text))
        return self._connection[1:]


def scratch_folder() -> str:
    """Return the folder for scratch files. A ``TMPDIR`` without write access is an OSError.

    Python's ``tempfile`` would use ``/tmp`` in its place and not say so.
    """
    if (folder := os.environ.get("TMPDIR")) and not os.access(f"{folder}/.", os.W_OK | os.X_OK):
        fault = "expected a directory that this user may write to; make it, or set another"
        raise OSError(errno.ENOTDIR, f"TMPDIR is {folder}: {fault}")
    return tempfile.gettempdir()


def _upload(path: str, fs: Any, target: str) -> None:
    """Upload a file of this machine; memory holds ``_UPLOAD`` of it at a time."""
    known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
    fs.put_file(path, target, **{name: _UPLOAD[name] for name in _UPLOAD.keys() & known.keys()})


@lru_cache(maxsize=1)  # for every pass that follows over the same file
def _fetched(url: Url, stamp: tuple[int, int | str]) -> IO[bytes]:
    file = tempfile.TemporaryFile(prefix="realign-fast-", dir=scratch_folder())
    file.writelines(pieces(url.pread, 0, stamp[0]))
    file.flush()
    return file


def _current_info(fs: Any, path: str) -> Any:
    fs.invalidate_cache()  # which would tell how an object was
    return fs.info(path)


def _keeps_objects(fs: Any) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(_OBJECTS & names)
