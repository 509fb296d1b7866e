"""What a URL is asked that changes something there. Every change is whole or not to be seen."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from typing import Any

from .url_parsing import UrlName

# Stores of objects, which have no directories and show nothing of an upload before its end.
_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"}
_UPLOAD = {"chunksize": 16 << 20, "max_concurrency": 4}  # of an upload in parts: what memory holds


class UrlWriter(UrlName):
    """Of a `url.Url` what writes. Errors are those of `_ask`."""

    def _ask(self, what: Callable[[Any, str], Any], done: str = "read") -> Any:
        """`what(file system, path)`, tried again where that may help; `done` is for its error."""
        raise NotImplementedError

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing where objects are kept: those need no directories."""

        def make(fs: Any, path: str) -> None:
            if not _keeps_objects(fs):
                fs.makedirs(path, exist_ok=True)

        self._ask(make, "written")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask(lambda fs, path: fs.rm_file(path), "removed")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Everything below it."""
        self._ask(lambda fs, path: fs.rm(path, recursive=True), "removed")

    def write_bytes(self, data: bytes) -> None:
        """A small file; what was there is replaced."""
        self._write(lambda fs, path: fs.pipe_file(path, data))

    def upload(self, path: str) -> None:
        """A file of this machine; memory holds `_UPLOAD` of it."""

        def put(fs: Any, to: str) -> None:
            known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
            fs.put_file(path, to, **{name: n for name, n in _UPLOAD.items() if name in known})

        self._write(put)

    def create(self, data: bytes, look: bool = True) -> bool:
        """Write a small file where there is none; False: there is one.

        Of two processes one succeeds, where its store can promise that. For one that cannot there
        is a look before; without it such a store replaces what is there.
        """

        def make(fs: Any, path: str) -> bool:
            fs.invalidate_cache()
            if look and fs.exists(path):
                return False
            try:
                if _only_looks(fs):
                    with fs.open(path, "xb") as file:
                        file.write(data)
                else:
                    fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):
                fs.pipe_file(path, data)
            except OSError as error:
                if error.errno != errno.ENOSYS:  # of servers that know S3, but not that
                    raise
                fs.pipe_file(path, data)
            return True

        self.parent.mkdir()
        return self._ask(make, "written")

    def _write(self, send: Callable[[Any, str], Any]) -> None:
        def whole(fs: Any, path: str) -> None:
            if _keeps_objects(fs):
                return send(fs, path)
            folder = fs._parent(path)
            partial = f"{folder}/.{self.name}.partial"
            fs.makedirs(folder, exist_ok=True)
            send(fs, partial)
            if fs.exists(path):  # some systems do not rename onto a file
                fs.rm_file(path)
            fs.mv(partial, path)

        self._ask(whole, "written")


def _keeps_objects(fs: Any) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(_OBJECTS & names)


def _only_looks(fs: Any) -> bool:
    """Whether its own way to create a file is to look whether there is one, then to write."""
    return not hasattr(fs, "_pipe_file") and type(fs).pipe_file.__module__ == "fsspec.spec"
