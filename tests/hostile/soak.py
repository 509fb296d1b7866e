"""Run align again and again in one process, with a failing call each time; nothing may grow.

    PYTHONPATH=.:tests python -m hostile.soak --seconds 7200

Every round draws a format, a call of the system on OUT and how it fails (``hostile.faults``), runs
align into a new OUT, and then once more without a fault. The bytes must be those of a run without
faults. Memory and descriptors of the process are measured after every round. Prints one line of
JSON every minute, and the faults.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from hostile import at_least_one
from hostile.faults import (
    COMMANDS,
    KINDS,
    begin_again_preloaded,
    fault_of,
    files_of,
    is_harmless,
    write_sources,
)

FORMATS = ("npy", "npz", "pt", "safetensors", "parquet", "arrow", "pickle", "tar")
WARM_ROUNDS = 50  # in which caches and arenas of the libraries fill
MOST_GROWTH = 32 << 20  # bytes from then on


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def run_here(
    arguments: list[str], out: Path, failing_call: int = -1, error: int = 0
) -> tuple[int, str, int, str]:
    """Run a command in this process; return its status, what it said, its calls, which failed."""
    from realign_fast.cli import main as command_line

    library, said = ctypes.CDLL(None), io.StringIO()
    library.faults_failed.restype = ctypes.c_char_p
    with redirect_stdout(said), redirect_stderr(said):
        library.faults_arm(os.fsencode(out), ctypes.c_long(failing_call), error)
        try:
            status = command_line.main(arguments) or 0
        except BaseException:
            status = 1
            traceback.print_exc(file=said)
        finally:
            library.faults_disarm()
    return status, said.getvalue(), library.faults_calls(), os.fsdecode(library.faults_failed())


def soak(folder: Path, seconds: float, seed: int) -> dict[str, object]:
    """Run rounds for so many seconds; return what was counted, and the faults."""
    chance, begin, printed = random.Random(seed), time.monotonic(), 0.0
    work, clean, calls = {}, {}, {}
    for name in FORMATS:
        place = folder / name
        place.mkdir()
        write_sources(place, name)
        work[name] = COMMANDS["align"](place, str(place / "out"))
        status, said, calls[name], _ = run_here(work[name], place / "out")
        assert status == 0, said
        clean[name] = files_of(place / "out")
    rounds, failed, faults = 0, 0, []
    first = most = descriptors = grown = 0
    while time.monotonic() - begin < seconds:
        name, kind = chance.choice(FORMATS), chance.choice(list(KINDS))
        out, number = folder / name / "out", chance.randrange(calls[name])
        shutil.rmtree(out, ignore_errors=True)
        status, said, _, call = run_here(work[name], out, number, KINDS[kind])
        failed += bool(call)
        fault = fault_of(status, said, is_harmless(kind, call), files_of(out), clean[name])
        if not fault:
            status, said, _, _ = run_here(work[name], out)
            if status or files_of(out) != clean[name]:
                fault = f"the next run: status {status}, other bytes\n{said}"
        if fault:
            faults.append(f"{name}, {kind} at call {number} ({call}): {fault}")
            print(faults[-1], flush=True)
        rounds += 1
        gc.collect()
        most = max(most, resident())
        if rounds == WARM_ROUNDS:
            first, descriptors = resident(), len(os.listdir("/proc/self/fd"))
            most = first
        grown, opened = most - first, len(os.listdir("/proc/self/fd")) - descriptors
        if rounds > WARM_ROUNDS and opened:
            faults.append(f"round {rounds}: {opened} more descriptors than in round {WARM_ROUNDS}")
            descriptors += opened
        if time.monotonic() - begin - printed >= 60:
            printed = time.monotonic() - begin
            facts = {"seconds": round(printed), "rounds": rounds, "failed_calls": failed}
            facts |= {"resident_mib": resident() >> 20, "faults": len(faults)}
            print(json.dumps(facts), flush=True)
    if rounds > WARM_ROUNDS and grown > MOST_GROWTH:
        faults.append(f"memory grew by {grown >> 20} MiB after round {WARM_ROUNDS}")
    counted = {"rounds": rounds, "failed_calls": failed, "grown_mib": grown / (1 << 20)}
    return counted | {"faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=at_least_one, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin_again_preloaded("hostile.soak")
    import torch

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.seconds, options.seed)
    faults = result.pop("faults")
    print(json.dumps(result | {"faults": len(faults)}))
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
