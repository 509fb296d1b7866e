"""Locks on output directories: for one process, or for the parts of one job array."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .errors import explained
from .local import LocalPath
from .object_lock import locked_object
from .paths import AnyPath, storage_path
from .url import Url

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(folder: AnyPath, part: str = "") -> Iterator[None]:
    """Hold ``folder`` alone; with ``part`` share it with other parts and hold that part alone.

    A local lock ends with the process, however that ends, and leaves nothing to clear away. One at
    a URL may leave an object there; :mod:`~realign_fast.storage.object_lock` says when.

    Raises:
        OSError: another process holds it; the message says which.
    """
    folder = storage_path(folder)
    if isinstance(folder, Url):
        with locked_object(folder, part):
            yield
        return
    with ExitStack() as stack:
        stack.enter_context(_held(folder / "lock", alone=not part))
        if part:
            stack.enter_context(_held(folder / f"lock-{part}", alone=True))
        yield


@contextmanager
def _held(path: LocalPath, alone: bool) -> Iterator[None]:
    with explained(path.explanation):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(descriptor, path, alone)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (owner if alone else f"{owner} (or its job array)").encode(), 0)
        except OSError:
            pass  # the disk is full; the lock holds without the name of its owner
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: LocalPath, alone: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process"
        advice = "wait until it ends, or give another --out"
        busy = f"{path.parent.parent}: {holder} is working on it; {advice}"
        raise OSError(errno.EBUSY, busy) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{path}: this file system has no locks; run one at a time", stacklevel=5)
