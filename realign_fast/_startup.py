"""What our own command does before torch is imported: the first import of the package.

Threads of OpenMP that wait for work spin, and take the cores from those that read and write files:
a run of `realign-fast` is about a quarter slower for it. And importing torch takes seconds, in
which Ctrl-C should end in a line, as it does later. Only where the program is our command line:
what others do with their processes is theirs.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def command_is_ours() -> bool:
    """Whether this process was started as ``realign-fast`` or ``python -m realign_fast``."""
    line = sys.orig_argv
    names = [Path(word).name for word in line[1:2]]  # the script that pip installed
    return names in (["realign-fast"], ["realign-fast.exe"]) or line[1:3] == ["-m", "realign_fast"]


def _stop(*_: Any) -> None:
    os.write(2, b"realign-fast: stopped before it began\n")
    os._exit(130)


if command_is_ours():
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)  # until cli.main takes over
