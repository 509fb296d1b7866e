"""Change what surrounds a command, before every one of its calls of the system on its files.

    PYTHONPATH=.:tests python -m hostile.surroundings --command align

A command runs in a fork once for each call on a file of its sources or its output and each change.
The call does not fail itself: the disk becomes full, no descriptor or memory is left, the clock of
the day steps by ten years, another process runs the same command into the same output, or a source
shard is replaced. Whatever the command answers, these must hold:

- it ends by itself, with status 0 or with one error; never with a traceback;
- every shard in OUT is one of a run whose surroundings nobody changed, from the old sources or from
  the new ones, and status 0 means that all of them are those of one such run;
- a step of the clock changes nothing; of two writers at least one ends with status 0;
- the same command, run again, ends with status 0 and the bytes of such a run.

Prints one line of JSON for each change, and the faults. The full disk needs the right to mount.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hostile.faults import (
    COMMANDS,
    SECONDS,
    begin_again_preloaded,
    different,
    files_of,
    is_shard,
    options_of,
    run,
    write_sources,
)

TEN_YEARS = 315_576_000  # seconds


class Change(NamedTuple):
    """Something that happens to a run, and what follows from it."""

    happens: Callable[[Case], object]  # in the process of the run
    # Before and afterwards, in the process of the attack:
    prepare: Callable[[Case], object] = lambda case: None
    back: Callable[[Case], object] = lambda case: None
    has_error: bool = True  # whether the run may end with an error


class Case:
    """A folder with sources, an output that is always below the same path, and its command."""

    def __init__(self, folder: Path, command: str, file_format: str) -> None:
        self.folder, self.out, self.spare = folder, folder / "disk/out", folder / "spare"
        self.out.parent.mkdir()
        write_sources(folder, file_format)
        self.shards = sorted(path for path in (folder / "text").iterdir() if is_shard(path.name))
        for second, path in enumerate(self.shards):
            os.utime(path, (second, second))
        shutil.copytree(folder / "text", self.spare)
        self.arguments = COMMANDS[command](folder, str(self.out))
        self.clean = self.alone()
        self.swap_rows()
        self.clean_replaced = self.alone()
        self.restore()

    def alone(self) -> dict[str, bytes]:
        """Return the files of a run that nothing happens to."""
        shutil.rmtree(self.out, ignore_errors=True)
        status, said, self.calls, _ = run(self.arguments, self.folder, -1, 0)
        assert status == 0, said
        return files_of(self.out)

    def swap_rows(self) -> None:
        """Replace a source shard by another of the same shape, as a pipeline would."""
        self.place(self.shards[1].name)

    def restore(self) -> None:
        self.place(self.shards[0].name)

    def place(self, name: str) -> None:
        """Put a file in the place of the first source shard, with its time."""
        new = self.folder / "new"
        shutil.copy2(self.spare / name, new)
        os.replace(new, self.shards[0])

    def fill(self) -> None:
        """Leave no free block on the disk of the output."""
        with suppress(OSError), open(self.out.parent / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def free(self) -> None:
        (self.out.parent / "filler").unlink(missing_ok=True)

    def start_writer(self) -> None:
        """Start a process that runs the same command when it is told to, and keeps what it says."""
        (self.folder / "second").unlink(missing_ok=True)
        (waits, self.tell), (self.told, ends) = os.pipe(), os.pipe()
        self.writer = os.fork()
        if self.writer == 0:
            os.close(self.tell)
            if os.read(waits, 1):
                status, said, _, _ = run(self.arguments, self.folder, -1, 0)
                (self.folder / "second").write_text(f"{status} {said}")
            os._exit(0)
        os.close(waits)
        os.close(ends)

    def write_too(self) -> None:
        """Let the other process write, to its end."""
        os.write(self.tell, b"!")
        os.read(self.told, 1)

    def end_writer(self) -> None:
        os.close(self.tell)
        os.close(self.told)
        os.waitpid(self.writer, 0)


def no_descriptor(case: Case) -> None:
    opened = len(os.listdir("/proc/self/fd")) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened, opened))


def no_memory(case: Case) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # With less to spare, CPython may wait for ever for a thread that has no memory to begin with,
    # and glibc ends a process whose thread has none for its variables.
    limit = pages * resource.getpagesize() + (2 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def step_clock(case: Case) -> None:
    library = ctypes.CDLL(None)
    years = TEN_YEARS if library.faults_calls() % 2 else -TEN_YEARS
    library.faults_step_clock(ctypes.c_long(years))


CHANGES = {
    "a full disk": Change(Case.fill, back=Case.free),
    "no descriptor": Change(no_descriptor),
    "no memory": Change(no_memory),
    "the clock": Change(step_clock, has_error=False),
    "a second writer": Change(Case.write_too, Case.start_writer, Case.end_writer),
    "a replaced source": Change(Case.swap_rows, back=Case.restore),
}


def fault_of(case: Case, name: str, status: int | None, said: str) -> str:
    """Return what is wrong with the end of a run."""
    if status is None:
        return f"no end within {SECONDS} s\n{said}"
    if status < 0 or "Traceback" in said:
        return f"status {status}\n{said}"
    if status and not CHANGES[name].has_error:
        return f"status {status}\n{said}"
    if status and "rror" not in said:
        return f"status {status} without an error\n{said}"
    files, sound = files_of(case.out), (case.clean, case.clean_replaced)
    for file, data in files.items():
        if is_shard(file) and all(data != clean.get(file) for clean in sound):
            return f"a shard of no run: {file}"
    if status == 0 and files not in sound:
        return f"status 0 and the bytes of no run: {different(files, case.clean)}"
    if name == "a second writer":
        second = (case.folder / "second").read_text()
        if status and not second.startswith("0 "):
            return f"no writer ended well:\n{said}\n{second}"
        if "Traceback" in second:
            return f"the second writer: {second}"
    return ""


def attack(
    case: Case, name: str, sites: int | None, seed: int
) -> tuple[dict[str, object], list[str]]:
    """Let a change happen before every call, or before `sites` drawn ones."""
    chance, faults, tried, errors = random.Random(seed), [], 0, 0
    numbers: Sequence[int] = range(case.calls)
    if sites is not None:
        numbers = sorted(chance.sample(numbers, min(sites, case.calls)))
    change = CHANGES[name]
    for number in numbers:
        shutil.rmtree(case.out, ignore_errors=True)
        change.prepare(case)
        happens = partial(change.happens, case)
        status, said, _, site = run(case.arguments, case.folder, number, 0, happens)
        tried += bool(site)
        errors += bool(status)
        stays = name == "a replaced source"  # for the next run, which makes anew what depends on it
        if not stays:
            change.back(case)
        fault = fault_of(case, name, status, said)
        if not fault:
            status, again, _, _ = run(case.arguments, case.folder, -1, 0)
            files = files_of(case.out)
            expected = case.clean_replaced if stays else case.clean
            if status or files != expected:
                fault = f"the next run: status {status}, {different(files, expected)}\n{again}"
        if stays:
            change.back(case)
        if fault:
            faults.append(f"{name} at call {number} ({site}): {fault}")
            print(faults[-1], flush=True)
    return {"change": name, "sites": case.calls, "tried": tried, "errors": errors}, faults


def main() -> None:
    options = options_of(__doc__, "changes", CHANGES)
    begin_again_preloaded("hostile.surroundings")
    import torch

    torch.set_num_threads(1)  # a fork has no threads
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = Case(folder, options.command, options.format)
        for change in options.changes:
            if change == "a full disk":
                mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", case.out.parent]
                if subprocess.run(mount, capture_output=True).returncode:
                    print(json.dumps({"change": change, "tried": 0, "left out": "cannot mount"}))
                    continue
            try:
                result, faults = attack(case, change, options.sites, options.seed)
            finally:
                if change == "a full disk":
                    subprocess.run(["umount", case.out.parent], check=True)
            print(json.dumps({"command": options.command} | result | {"faults": len(faults)}))
            failed += len(faults)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
