"""The bytes of an output, and runs in forks that may be killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

NOT_COMPARED = ("report.json", "lock")  # times and speeds; a process id


def tree(out):
    """Every byte of an output by path, less what says when it was made."""
    files = [path for path in Path(out).rglob("*") if path.is_file()]
    found = {}
    for path in files:
        if path.name.startswith(NOT_COMPARED):
            continue
        data = path.read_bytes()
        if path.parent.name.startswith("apply") and path.suffix == ".json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "written"})
        found[path.relative_to(out).as_posix()] = data
    return found


def child(run):
    """Fork a process that calls ``run`` and may be killed; an import of torch takes seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    return pid
