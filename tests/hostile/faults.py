"""Let every call of the system on an output fail once, or write half of its bytes.

    PYTHONPATH=.:tests python -m hostile.faults --command align

Each call on a file below OUT is a site. A command is run once for each site and kind of fault, in
a fork. Whatever it answers, these must hold:

- it ends by itself, with status 0 or with one error that names a file; never with a traceback;
- every shard in OUT has the bytes of a run without faults, and no other file looks like a shard;
- the same command, run again without faults, ends with status 0 and leaves the same bytes;
- after a short or interrupted write or read the status is 0.

Prints one line of JSON, and the faults.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from hostile import at_least_one

KINDS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT}
KINDS |= {"EMFILE": errno.EMFILE, "EINTR": errno.EINTR, "short": 0}
# What a program repeats after a signal (signal(7)), and a short write or read.
REPEATED = ("open", "read", "pread", "write", "pwrite", "fsync", "fdatasync", "ftruncate")
SECONDS = 60  # a run that takes longer hangs
SOURCE = Path(__file__).parent / "native/faults.c"
PRELOADED = "REALIGN_FAST_TEST_FAULTS"


def compiled(folder: Path) -> Path:
    """Compile the library that is preloaded."""
    library = folder / "faults.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def begin_again_preloaded(module: str) -> None:
    """Start a module again with the library, and end with its status, unless it is loaded."""
    if not os.environ.get(PRELOADED):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"LD_PRELOAD": str(compiled(Path(folder))), PRELOADED: "1"}
            command = [sys.executable, "-m", module, *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=environment).returncode)


def options_of(about: str, things: str, choices: Collection[str]) -> argparse.Namespace:
    """Return the options of an attack with these things on every site of a command."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--command", choices=sorted(COMMANDS), default="align")
    parser.add_argument("--format", default="npy", help="of the shards, such as parquet")
    parser.add_argument(f"--{things}", nargs="+", choices=choices, default=list(choices))
    parser.add_argument("--sites", type=at_least_one, help="draw this many for each (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = options_of(__doc__, "kinds", KINDS)
    begin_again_preloaded("hostile.faults")
    with tempfile.TemporaryDirectory() as folder:
        drawn = options.kinds, options.sites, options.seed
        result = attack(Path(folder), options.command, options.format, *drawn)
    faults = result.pop("faults")
    print(json.dumps(result | {"faults": len(faults)}))
    print("\n".join(faults))
    sys.exit(bool(faults))


def write_sources(folder: Path, file_format: str) -> None:
    import numpy as np

    from realign_fast import Corpus
    from realign_fast.corpus.convert import convert

    generator = np.random.default_rng(0)
    for side in ("text", "image"):
        (folder / f"{side}-npy").mkdir()
        for number in range(2):
            rows = generator.standard_normal((40, 8)) + (side == "text")
            np.save(folder / f"{side}-npy" / f"rows_{number}.npy", rows.astype("f4"))
        convert(Corpus(folder / f"{side}-npy"), folder / side, file_format)


def _align(folder: Path, out: str) -> list[str]:
    text, image = str(folder / "text"), str(folder / "image")
    return ["align", "--text", text, "--image", image, "--out", out, "--allow-pickle"]


def _unify(folder: Path, out: str) -> list[str]:
    return ["unify", *_align(folder, out)[1:]]


COMMANDS: dict[str, Callable[[Path, str], list[str]]] = {"align": _align, "unify": _unify}


def attack(
    folder: Path,
    command: str,
    file_format: str,
    kinds: Sequence[str],
    sites: int | None,
    seed: int,
) -> dict[str, object]:
    """Run a command with every fault, or with `sites` drawn ones for each kind."""
    import torch

    torch.set_num_threads(1)  # a fork has no threads
    write_sources(folder, file_format)
    out = folder / "out"
    arguments = COMMANDS[command](folder, str(out))
    status, said, calls, _ = run(arguments, out, -1, 0)
    assert status == 0, said
    clean = files_of(out)
    chance, faults, tried = random.Random(seed), [], 0
    for kind in kinds:
        numbers: Sequence[int] = range(calls)
        if sites is not None:
            numbers = sorted(chance.sample(numbers, min(sites, calls)))
        for number in numbers:
            shutil.rmtree(out, ignore_errors=True)
            status, said, _, failed = run(arguments, out, number, KINDS[kind])
            tried += bool(failed)
            fault = fault_of(status, said, is_harmless(kind, failed), files_of(out), clean)
            if not fault:
                status, again, _, _ = run(arguments, out, -1, 0)
                differing = different(files_of(out), clean)
                if status or differing:
                    fault = f"the next run: status {status}, other bytes: {differing}\n{again}"
            if fault:
                faults.append(f"{kind} at call {number} ({failed}): {fault}")
    return {"command": command, "sites": calls, "tried": tried, "faults": faults}


def is_harmless(kind: str, call: str) -> bool:
    """Return whether a program repeats a call that failed in this way, and goes on."""
    return kind == "short" or (kind == "EINTR" and call.startswith(REPEATED))


def fault_of(
    status: int | None,
    said: str,
    can_be_repeated: bool,
    files: dict[str, bytes],
    clean: dict[str, bytes],
) -> str:
    """Return what is wrong with the end of a run in which a call failed."""
    if status is None:
        return f"no end within {SECONDS} s\n{said}"
    if status < 0 or "Traceback" in said:
        return f"status {status}\n{said}"
    if status and can_be_repeated:
        return f"status {status} where the call could be repeated\n{said}"
    if status and ("/" not in said or "rror" not in said):
        return f"status {status} without an error that names a file\n{said}"
    shards = {name: data for name, data in files.items() if is_shard(name)}
    if differing := different(shards, {name: clean.get(name) for name in shards}):
        return f"shards that are not whole: {differing}"
    if status == 0 and (differing := different(files, clean)):
        return f"status 0 and other bytes: {differing}"
    return ""


def is_shard(name: str) -> bool:
    """Return whether a reader of OUT would take the file for a shard."""
    from realign_fast.corpus.format_registry import format_of

    return bool(format_of(name)) and not any(part[0] in "._" for part in Path(name).parts)


def different(files: dict[str, bytes], clean: dict[str, bytes | None]) -> list[str]:
    """Return the names of files that are not the same in both."""
    return sorted(name for name in files.keys() | clean if files.get(name) != clean.get(name))


def files_of(out: Path) -> dict[str, bytes]:
    """Return the bytes of the files of an output, without what says when it was made."""
    from support.kill_and_resume import tree

    return dict(tree(out)) if out.exists() else {}


def run(
    arguments: list[str],
    out: Path,
    failing_call: int,
    error: int,
    action: Callable[[], object] | None = None,
) -> tuple[int | None, str, int, str]:
    """Run a command in a fork; return its status, what it said, its calls, and which one failed.

    With an action, the call does not fail: the action is called before it.
    """
    from realign_fast.cli import main as command_line  # imported before the fork

    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as facts:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                library = ctypes.CDLL(None)
                library.faults_failed.restype = ctypes.c_char_p
                signal.alarm(SECONDS)
                with redirect_stdout(said), redirect_stderr(said):
                    library.faults_arm(os.fsencode(out), ctypes.c_long(failing_call), error)
                    if action:
                        act = ctypes.CFUNCTYPE(None)(action)  # the name keeps it while it is armed
                        library.faults_act(act)
                    status = command_line.main(arguments) or 0
                    calls, failed = library.faults_calls(), library.faults_failed()
                    library.faults_disarm()
                said.flush()
                json.dump([calls, os.fsdecode(failed)], facts)
                facts.flush()
            except BaseException as error:
                import traceback

                traceback.print_exception(error, file=said)
                said.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        facts.seek(0)
        calls, failed = json.loads(facts.read() or '[0, ""]')
        return None if status == -signal.SIGALRM else status, said.read(), calls, failed


if __name__ == "__main__":
    main()
