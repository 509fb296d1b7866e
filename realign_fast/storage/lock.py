"""Locks on output directories: for one process, or for the parts of one job array.

A local lock ends with the process, however that ends, and leaves nothing to clear away. A store of
objects has no such lock, but it can create an object on the condition that none is there. Its
holder rewrites it every ``HEARTBEAT_SECONDS`` with the time, and keeps a file of the directory for
temporary files locked, which has the token of the object. The next run with that directory sees by
this file that a holder is dead, and removes its object. Elsewhere nobody can see that, so a person
decides: the error says what to delete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from .errors import explained
from .paths import AnyPath, LocalPath, StoragePath, output_of, storage_path
from .url import Url, scratch_folder

Holder = dict[str, Any]  # the process that a lock at a URL names

HEARTBEAT_SECONDS = 60
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(folder: AnyPath, part: str = "") -> Iterator[int]:
    """Hold ``folder`` alone; with ``part`` share it with other parts and hold that part alone.

    It gives the descriptor of a local lock: forked processes hold the lock too until they close it.
    It is an OSError if another process holds it, which the message names, or links are in the way.
    Each process takes its own lock and then looks for those of others, so of two at least one sees
    the other.
    """
    folder = storage_path(folder)
    own = folder / (f"lock-{part}" if part else "lock")
    if isinstance(folder, LocalPath):
        _refuse_links_of_others(folder)
    with _held_object(own) if isinstance(own, Url) else _held_file(own) as descriptor:
        for path in _locks(folder):
            if path != own and (not part or path.name == "lock"):
                _expect_free(path)
        yield descriptor


def check_not_locked(folder: AnyPath) -> None:
    """Raise an OSError (EBUSY) if a process holds ``folder`` or a part of it; write nothing."""
    for path in _locks(storage_path(folder)):
        _expect_free(path)


def _locks(folder: StoragePath) -> list[StoragePath]:
    entries: Iterable[StoragePath] = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in entries if path.name.startswith("lock"))


def _expect_free(path: StoragePath) -> None:
    """Raise an OSError (EBUSY) if a process holds the lock ``path``."""
    if isinstance(path, Url):
        with _not_alive(path, fcntl.LOCK_SH):
            pass
    elif path.is_file() and os.access(path, os.R_OK):
        with open(path) as file:
            _acquire_file(file.fileno(), path, fcntl.LOCK_SH)


def _refuse_links_of_others(folder: LocalPath) -> None:
    """Refuse links to folders, in ``folder`` and in its output, that other users made.

    Files that are written below such a link would take the place of files of this user.
    """
    directories: set[Path] = {output_of(Path(folder.parent)), folder.parent, folder}
    for directory in filter(os.path.isdir, directories):
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_symlink() or entry.is_file():
                    continue
                owner = entry.stat(follow_symlinks=False).st_uid
                if owner not in (0, os.geteuid()):
                    fault = f"is a link to {os.readlink(entry)} that user {owner} made"
                    raise OSError(errno.EPERM, f"{entry.path}: {fault}; remove it")


@contextmanager
def _held_file(path: LocalPath) -> Iterator[int]:
    if path.is_symlink():
        fault = f"is a link to {os.readlink(path)}, and a lock is never written through a link"
        raise OSError(errno.ELOOP, f"{path}: {fault}; remove it")
    output = output_of(path.parent.parent)
    if output.exists() and not output.is_dir():
        fault = "is a file, and --out is a directory; give a directory, which may be new"
        raise OSError(errno.ENOTDIR, f"{output}: {fault}")
    with ExitStack() as stack:
        with explained(path.explanation):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, flags, 0o666)
            stack.callback(os.close, descriptor)
            _acquire_file(descriptor, path, fcntl.LOCK_EX)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        array = "" if path.name == "lock" else " (or its job array)"
        with suppress(OSError):  # the disk is full; the lock holds without the name of its owner
            if os.fstat(descriptor).st_nlink == 1:  # a file with another name is not ours alone
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{owner}{array}".encode(), 0)
        yield descriptor


def _acquire_file(descriptor: int, path: LocalPath, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "a process"
        busy = f"{holder} is working on it; wait until it ends, or give another --out"
        raise OSError(errno.EBUSY, f"{output_of(path.parent.parent)}: {busy}") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{path}: this file system has no locks; run one at a time", stacklevel=5)


@contextmanager
def _held_object(path: Url) -> Iterator[int]:
    token, since = uuid.uuid4().hex, time.strftime("%Y-%m-%d %H:%M:%S %z")
    own: Holder = {"host": socket.gethostname(), "pid": os.getpid(), "token": token}
    own |= {"since": since, "alive": time.time()}
    stop = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(path, own, stop), daemon=True)
    with _not_alive(path, fcntl.LOCK_EX) as (descriptor, is_locked, dead):
        if dead:
            path.unlink(missing_ok=True)
        if is_locked:
            with suppress(OSError):  # the disk is full; nobody will see that this process is dead
                os.pwrite(descriptor, token.encode(), 0)
        try:
            data = json.dumps(own).encode()
            if not path.create(data) and not _is_own(path, own):  # its answer may be lost
                fault = "another process took it at the same time; run again"
                raise OSError(errno.EBUSY, f"{path}: {fault}")
            if path.create(data):  # although it is there
                reason = "its store cannot create an object only where there is none"
                advice = "nothing keeps two runs apart; run one"
                warnings.warn(f"{path}: {reason}, so {advice}", stacklevel=3)
            heartbeat.start()
            yield descriptor
        finally:
            stop.set()
            if heartbeat.is_alive():
                heartbeat.join()
            try:
                if _is_own(path, own):
                    path.unlink(missing_ok=True)
            except OSError as error:  # an object that stays is that of a dead process
                if heartbeat.ident:  # it was created
                    fault = "this run cannot delete its lock, which stops the next: delete it first"
                    warnings.warn(f"{path}: {fault} ({error.strerror or error})", stacklevel=3)


@contextmanager
def _not_alive(path: Url, kind: int) -> Iterator[tuple[int, bool, Holder | None]]:
    """Give the file that stands for ``path`` on this machine, and the dead holder, if any.

    Between them stands whether the file is locked: for a store of another address that has this
    name, another process may have it.
    It is an OSError (EBUSY) if a holder lives, or nobody can see whether it does.
    """
    digest = hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()
    file = os.path.join(scratch_folder(), f"realign-fast-{os.getuid()}-{digest}.lock")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            token, is_locked = os.pread(descriptor, 64, 0).decode(errors="replace"), True
        except OSError:  # a living process holds it, or this file system has no locks
            token, is_locked = "", False
        holder = _read(path)
        if holder is not None and (not token or holder.get("token") != token):
            raise OSError(errno.EBUSY, _busy_message(path, holder))
        yield descriptor, is_locked, holder
    finally:
        os.close(descriptor)


def _busy_message(path: Url, holder: Holder) -> str:
    state = "does not say when it last was alive"
    if isinstance(alive := holder.get("alive"), float):
        age = timedelta(seconds=max(0, round(time.time() - alive)))
        state = f"gave its last sign of life {age} ago (there is one every minute)"
    process = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    since = holder.get("since", "an unknown time")
    return (
        f"{output_of(path.parent.parent)}: {process} is working on it since {since} and {state}; "
        f"wait until it ends, or give another --out; if it was killed, delete {path} and run again"
    )


def _send_heartbeats(path: Url, own: Holder, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a store that cannot be written to now may be in a minute
            if not _is_own(path, own):
                reason = "was deleted or taken over, so two runs may write here; stop one"
                warnings.warn(f"{path}: {reason}", stacklevel=1)
                return
            path.write_whole(json.dumps(own | {"alive": time.time()}).encode())


def _is_own(path: Url, own: Holder) -> bool:
    return bool((_read(path) or {}).get("token") == own["token"])


def _read(path: Url) -> Holder | None:
    """Return the holder that a lock names; None without a lock, {} for an unreadable one."""
    try:
        holder = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
