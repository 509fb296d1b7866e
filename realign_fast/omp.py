"""OpenMP's waiting, chosen before torch loads it: the first import of the package.

Threads of OpenMP that wait for work spin, and take the cores from those that read and write files:
a run of `realign-fast` is about a quarter slower for it. Only where the program is our own command
line and the user has not chosen: what others do with their processes is theirs.
"""

import os
import sys
from pathlib import Path


def command_is_ours() -> bool:
    """Whether this process was started as ``realign-fast`` or ``python -m realign_fast``."""
    line = sys.orig_argv
    names = [Path(word).name for word in line[1:2]]  # the script that pip installed
    return names in (["realign-fast"], ["realign-fast.exe"]) or line[1:3] == ["-m", "realign_fast"]


if command_is_ours():
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
