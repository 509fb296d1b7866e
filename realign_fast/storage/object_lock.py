"""One run at a time on an output at a URL: an object in it says who is at work.

A store has no lock that goes with its process, but objects that are created only where there is
none. Who holds one rewrites it every `BEAT_SECONDS` with the time. What a killed process left is
removed by the next run if that run can see that the process is dead: on the same machine, in the
same container. Elsewhere nobody can see that, so a person decides: the error says what to delete.
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

from .url import Url

BEAT_SECONDS = 60
_ATTEMPTS = 5  # to be the one that creates it, where a dead one is in the way


@contextmanager
def locked_object(folder: Url, part: str = "") -> Iterator[None]:
    """Hold `folder` alone, or one part of it beside other parts.

    A part excludes itself and whole runs, a whole run everybody: each creates its object first and
    looks for those of others then, so of two at least one sees the other.

    Raises:
        OSError: another process holds it, or may do so; the message says which.
    """
    with _held(folder / (f"lock-{part}" if part else "lock"), folder.parent):
        held = {path.name for path in folder.iterdir() if path.name.startswith("lock")}
        for name in sorted(held & {"lock"} if part else held - {"lock"}):
            _clear(folder / name, folder.parent)
        yield


@contextmanager
def _held(path: Url, out: Url) -> Iterator[None]:
    mine = {**_process(), "token": uuid.uuid4().hex, "since": _now(), "alive": time.time()}
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, mine, stop), daemon=True)
    try:
        _take(path, mine, out)
        beat.start()
        yield
    finally:
        stop.set()
        if beat.is_alive():
            beat.join()
        with suppress(OSError):  # one that stays is that of a dead process
            if (_read(path) or {}).get("token") == mine["token"]:
                path.unlink(missing_ok=True)


def _take(path: Url, mine: dict[str, Any], out: Url) -> None:
    for _ in range(_ATTEMPTS):
        if path.create(_bytes(mine)):
            break
        if (_read(path) or {}).get("token") == mine["token"]:  # an answer was lost on its way
            break
        _clear(path, out)
    else:
        raise OSError(errno.EBUSY, f"{path}: others take it at the same time; run again")
    if path.create(_bytes(mine), look=False):  # where it is already
        what = "its store cannot create an object only where there is none"
        warnings.warn(f"{path}: {what}, so nothing keeps two runs apart; run one", stacklevel=5)


def _clear(path: Url, out: Url) -> None:
    """Remove what a dead process left; OSError if it may live."""
    with _alone_on_this_machine():  # else a second one would remove the lock of the first
        if (holder := _read(path)) is None:
            return
        if not _dead(holder):
            raise OSError(errno.EBUSY, _busy(path, holder, out))
        path.unlink(missing_ok=True)


def _busy(path: Url, holder: dict[str, Any], out: Url) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    alive = holder.get("alive")
    age = time.time() - alive if isinstance(alive, float) else None
    if age is None:
        state = "does not say when it last was"
    elif age < 3 * BEAT_SECONDS:
        state = f"gave a sign of life {max(0, round(age))} s ago"
    else:
        state = f"gave no sign of life for {age / 60:.0f} min (there is one every minute)"
    since = holder.get("since", "an unknown time")
    return (
        f"{out}: {who} is working on it since {since} and {state}; wait until it ends, or give "
        f"another --out; if it was killed, delete {path} and run again"
    )


def _beat(path: Url, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with suppress(OSError):  # what cannot be written now can be in a minute
            if (_read(path) or {}).get("token") != mine["token"]:
                what = "was deleted or taken over, so two runs may write here; stop one"
                warnings.warn(f"{path}: {what}", stacklevel=1)
                return
            path.write_whole(_bytes(mine | {"alive": time.time()}))


def _read(path: Url) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _bytes(said: dict[str, Any]) -> bytes:
    return (json.dumps(said) + "\n").encode()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _process() -> dict[str, Any]:
    """What tells this process from every other: also in containers, and where ids come again."""
    machine = ""
    with suppress(OSError):  # not on Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine, "pid": pid, "began": _began(pid)}


def _began(pid: int) -> str | None:
    """When a living process began, in the kernel's ticks; "" where the system does not say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state in "ZX" else rest[18]


def _dead(holder: dict[str, Any]) -> bool:
    """Whether this process can see that a holder is dead."""
    mine, pid = _process(), holder.get("pid")
    here = all(holder.get(name) == mine[name] for name in ("host", "machine"))
    return here and isinstance(pid, int) and _began(pid) != holder.get("began")


@contextmanager
def _alone_on_this_machine() -> Iterator[None]:
    descriptor = os.open(tempfile.gettempdir(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
