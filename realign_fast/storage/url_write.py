"""The methods of a URL that change something there. Every file appears whole or not at all."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from typing import Any

from .atomic import ScratchFile
from .errors import Participle
from .url_parsing import UrlName

# Stores of objects, which have no directories and show nothing of an upload before its end.
_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"}
_UPLOAD = {"chunksize": 16 << 20, "max_concurrency": 4}  # of an upload in parts: what memory holds


class UrlWriter(UrlName):
    """The writing half of :class:`~realign_fast.storage.url.Url`. Errors are those of ``_ask``."""

    def _ask(self, request: Callable[[Any, str], Any], operation: Participle = "read") -> Any:
        """Return ``request(file system, path)``, tried again where that may help.

        ``operation`` stands in the message of the error that is raised if it fails for good.
        """
        raise NotImplementedError

    @property
    def read_only_reason(self) -> str:
        """Why nothing can be written to this kind of URL; empty if something can."""
        if self.chained:
            return "a chain of systems"
        return "a web server" if self.is_web else ""

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

    def rmdir(self) -> None:
        """Do nothing: object stores keep no empty directories."""

    def remove_tree(self) -> None:
        """Remove the directory with everything below it."""
        self._ask(lambda fs, path: fs.rm(path, recursive=True), "removed")

    def pending_file(self, buffering: int = -1) -> ScratchFile:
        """Open a scratch file of this machine that is uploaded when it is committed."""
        return ScratchFile(self.upload, buffering)

    def write_whole(self, data: bytes) -> None:
        """Write a small file that appears whole or not at all; what was there is replaced."""
        self._write(lambda fs, path: fs.pipe_file(path, data))

    def upload(self, path: str) -> None:
        """Upload a file of this machine; memory holds ``_UPLOAD`` of it at a time."""

        def put_file(fs: Any, target: str) -> None:
            """Upload with the options that this file system knows."""
            known = inspect.signature(getattr(fs, "_put_file", fs.put_file)).parameters
            options = {name: value for name, value in _UPLOAD.items() if name in known}
            fs.put_file(path, target, **options)

        self._write(put_file)

    def create(self, data: bytes, look: bool = True) -> bool:
        """Write a small file if none is there, and return whether it was written.

        Of two processes one succeeds, where the store can promise that. For a store that cannot,
        ``look`` asks before whether there is one; without it such a store replaces what is there.
        """

        def create_file(fs: Any, path: str) -> bool:
            """Create the file in the strictest way that this file system has."""
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
        return bool(self._ask(create_file, "written"))

    def _write(self, send: Callable[[Any, str], Any]) -> None:
        def send_whole(fs: Any, path: str) -> None:
            """Send under a temporary name where an unfinished upload can be seen."""
            if _keeps_objects(fs):
                send(fs, path)
                return
            folder = fs._parent(path)
            partial = f"{folder}/.{self.name}.partial"
            fs.makedirs(folder, exist_ok=True)
            send(fs, partial)
            if fs.exists(path):  # some systems do not rename onto a file
                fs.rm_file(path)
            fs.mv(partial, path)

        self._ask(send_whole, "written")


def _keeps_objects(fs: Any) -> bool:
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(_OBJECTS & names)


def _only_looks(fs: Any) -> bool:
    """Return whether the file system creates a file by looking whether there is one first."""
    return not hasattr(fs, "_pipe_file") and type(fs).pipe_file.__module__ == "fsspec.spec"
