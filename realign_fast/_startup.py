"""Settings of the command line that must be made before torch is imported.

The package imports this module first. It acts only if the process was started as ``realign-fast``;
the processes of other programs are left alone.

- Threads of OpenMP that wait for work spin by default and take cores from the threads that read
  and write files, which makes a run about a quarter slower.
- The import of torch takes seconds. Ctrl-C ends the program with one line then too.
- A stream that the shell closed (``>&-``) becomes ``/dev/null``, before a file takes its number.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def is_own_command() -> bool:
    """Return whether the process was started as ``realign-fast`` or ``python -m realign_fast``."""
    arguments = sys.orig_argv
    names = [Path(word).name for word in arguments[1:2]]  # the script that pip installed
    own_script = names in (["realign-fast"], ["realign-fast.exe"])
    return own_script or arguments[1:3] == ["-m", "realign_fast"]


def _stop(*_: Any) -> None:
    os.write(2, b"realign-fast: stopped before it began\n")
    os._exit(130)


def _open_closed_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


if is_own_command():
    _open_closed_streams()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)  # until cli.main takes over
