"""Settings of the command line that must be made before torch is imported.

The package imports this module first. It acts only if the process was started as ``realign-fast``;
the processes of other programs are left alone.

- Threads of OpenMP that wait for work spin by default and take cores from the threads that read
  and write files, which makes a run about a quarter slower.
- The import of torch takes seconds. Ctrl-C ends the program with one line then too.
- The collector of cyclic garbage looks at the objects of torch again and again while they are made,
  and once more at the end, where they are freed one by one. That is a third of a short command.
- A stream that the shell closed (``>&-``) becomes ``/dev/null``, before a file takes its number.
"""

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def is_own_command() -> bool:
    """Return whether the process was started as ``realign-fast`` or ``python -m realign_fast``."""
    script = Path("".join(sys.orig_argv[1:2])).name  # the one that pip installed
    is_module = sys.orig_argv[1:3] == ["-m", "realign_fast"]
    return is_module or script in ("realign-fast", "realign-fast.exe")


def _stop(*_: Any) -> None:
    os.write(2, b"realign-fast: stopped before it began\n")
    os._exit(130)


def _open_closed_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _end_at_once() -> None:
    if exit_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status[0])


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage in the block, which imports torch, and none of what it made later."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_own_command():
            gc.freeze()
        if enabled:
            gc.enable()


exit_status: list[int] = []  # of a command that is over
if is_own_command():
    if not atexit._ncallbacks():  # this one is the last; others of before must not be left out
        atexit.register(_end_at_once)
    _open_closed_streams()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)  # until cli.main takes over
