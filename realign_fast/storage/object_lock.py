"""Locks at URLs: an object in the output says which process works on it.

A store has no lock that ends with its process, but it can create an object on the condition that
none is there. The holder rewrites its object every ``HEARTBEAT_SECONDS`` with the time. The object
of a killed process is removed by the next run if that run can see that the process is dead: on the
same machine, in the same container. Elsewhere nobody can see that, so a person decides: the error
says what to delete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import explained
from .local import LocalPath
from .url import Url

Holder = dict[str, Any]  # the process that a lock names

HEARTBEAT_SECONDS = 60


@contextmanager
def locked_object(folder: Url, part: str = "") -> Iterator[None]:
    """Hold ``folder`` alone, or one part of it while other processes hold other parts.

    A part excludes the same part and whole runs; a whole run excludes everybody. Each process
    creates its object first and then looks for those of others, so of two at least one sees the
    other.

    Raises:
        OSError: another process holds it, or may do so; the message says which.
    """
    path = folder / (f"lock-{part}" if part else "lock")
    own = {**_process(), "token": uuid.uuid4().hex, "since": _now(), "alive": time.time()}
    stop = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(path, own, stop), daemon=True)
    try:
        _acquire(path, own)
        heartbeat.start()
        locks = {entry.name for entry in folder.iterdir() if entry.name.startswith("lock")}
        for name in sorted(locks & {"lock"} if part else locks - {"lock"}):
            _remove_if_dead(folder / name)
        yield
    finally:
        stop.set()
        if heartbeat.is_alive():
            heartbeat.join()
        with suppress(OSError):  # an object that stays is that of a dead process
            if _is_own(path, own):
                path.unlink(missing_ok=True)


def _acquire(path: Url, own: Holder) -> None:
    _remove_if_dead(path)
    if not path.create(_to_json(own)) and not _is_own(path, own):  # its answer may be lost
        raise OSError(errno.EBUSY, f"{path}: another process took it at the same time; run again")
    if path.create(_to_json(own)):  # although it is there
        reason = "its store cannot create an object only where there is none"
        warnings.warn(f"{path}: {reason}, so nothing keeps two runs apart; run one", stacklevel=4)


def _remove_if_dead(path: Url) -> None:
    """Remove the lock of a dead process; raise OSError if its holder may live."""
    with _alone_on_this_machine():  # else a second process would remove the lock of the first
        if (holder := _read(path)) is None:
            return
        if not _is_dead(holder):
            raise OSError(errno.EBUSY, _busy_message(path, holder))
        path.unlink(missing_ok=True)


def _busy_message(path: Url, holder: Holder) -> str:
    process = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    alive = holder.get("alive")
    age = time.time() - alive if isinstance(alive, float) else None
    if age is None:
        state = "does not say when it last was"
    elif age < 3 * HEARTBEAT_SECONDS:
        state = f"gave a sign of life {max(0, round(age))} s ago"
    else:
        state = f"gave no sign of life for {age / 60:.0f} min (there is one every minute)"
    since = holder.get("since", "an unknown time")
    return (
        f"{path.parent.parent}: {process} is working on it since {since} and {state}; wait until "
        f"it ends, or give another --out; if it was killed, delete {path} and run again"
    )


def _send_heartbeats(path: Url, own: Holder, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a store that cannot be written to now may be in a minute
            if not _is_own(path, own):
                reason = "was deleted or taken over, so two runs may write here; stop one"
                warnings.warn(f"{path}: {reason}", stacklevel=1)
                return
            path.write_whole(_to_json(own | {"alive": time.time()}))


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


def _to_json(holder: Holder) -> bytes:
    return (json.dumps(holder) + "\n").encode()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _process() -> Holder:
    """Return facts that identify this process, also in containers and where ids are used again."""
    machine, pid = "", os.getpid()
    with suppress(OSError):  # not on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    began = _start_time(pid)
    return {"host": socket.gethostname(), "machine": machine, "pid": pid, "began": began}


def _start_time(pid: int) -> str | None:
    """Return when a living process began, in ticks; None for a dead one, and where no /proc is."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _is_dead(holder: Holder) -> bool:
    """Return whether this process can see that a holder is dead."""
    own, pid = _process(), holder.get("pid")
    is_here = all(holder.get(name) == own[name] for name in ("host", "machine"))
    return is_here and isinstance(pid, int) and _start_time(pid) != holder.get("began")


@contextmanager
def _alone_on_this_machine() -> Iterator[None]:
    descriptor = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        with explained(LocalPath(tempfile.gettempdir()).explanation):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
