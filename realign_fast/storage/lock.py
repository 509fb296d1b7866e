"""Locks on output directories: for one process, or for the parts of one job array."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

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
        OSError: another process holds it, which the message names; or links stand in the way.
    """
    folder = storage_path(folder)
    if isinstance(folder, Url):
        with locked_object(folder, part):
            yield
        return
    _refuse_links_of_others(folder)
    with ExitStack() as stack:
        stack.enter_context(_held(folder / "lock", alone=not part))
        if part:
            stack.enter_context(_held(folder / f"lock-{part}", alone=True))
        yield


def _refuse_links_of_others(folder: LocalPath) -> None:
    """Refuse links in ``folder`` and beside it that other users made, unless they lead to files.

    Files that are written below such a link would take the place of files of this user.
    """
    for directory in filter(os.path.isdir, (folder.parent, folder)):
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_symlink() or entry.is_file():
                    continue
                owner = entry.stat(follow_symlinks=False).st_uid
                if owner not in (0, os.geteuid()):
                    fault = f"is a link to {os.readlink(entry)} that user {owner} made"
                    advice = "remove it, or give another --out"
                    raise OSError(errno.EPERM, f"{entry.path}: {fault}; {advice}")


@contextmanager
def _held(path: LocalPath, alone: bool) -> Iterator[None]:
    if path.is_symlink():
        fault = f"is a link to {os.readlink(path)}, and a lock is never written through a link"
        raise OSError(errno.ELOOP, f"{path}: {fault}; remove it")
    with explained(path.explanation):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    try:
        with explained(path.explanation):
            _acquire(descriptor, path, alone)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        with suppress(OSError):  # the disk is full; the lock holds without the name of its owner
            if os.fstat(descriptor).st_nlink == 1:  # a file with another name is not ours alone
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"{owner}{'' if alone else ' (or its job array)'}".encode(), 0
                )
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
