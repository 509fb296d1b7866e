"""The standing attack in its long form, with a log.

    PYTHONPATH=.:tests python -m hostile                    # hours on two cores
    PYTHONPATH=.:tests python -m hostile --only faults soak --log LOG

Every attack is a program of this folder, or the drawn tests of the ops. It appends to the log one
line for its command (date, commit, machine, seconds, status) and what the program counted.
docs/reliability.md says what each of them counts as a fault, and what it needs. The status is 1 if
one found a fault; of the mutants, the log says how many were noticed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from hostile.mutants import ROOT
from realign_fast.ops.chooser import key_of

KILLED = "align unify workers ray job-array embed pretrain finetune"
ATTACKS = {
    "readers": ["-m hostile.fuzz_readers --inputs 4000"],
    "native": ["-m hostile.fuzz_native --runs 3000000"],
    "faults": [
        "-m hostile.faults --command align",
        "-m hostile.faults --command unify",
        "-m hostile.faults --command align --format parquet",
    ],
    "surroundings": [
        "-m hostile.surroundings --command align",
        "-m hostile.surroundings --command unify",
    ],
    "ops": ["-m pytest -q -p no:cacheprovider tests/ops/test_drawn_arguments.py"],
    "address": ["-m hostile.sanitizers --sanitizer address"],
    "thread": ["-m hostile.sanitizers --sanitizer thread"],
    "kills": [f"-m hostile.kills --kills 70 --command {name}" for name in KILLED.split()],
    "soak": ["-m hostile.soak --seconds 7200"],
    "mutants": ["-m hostile.mutants --count 300"],
}


def last_lines(text: str) -> str:
    """Return what a program counted: its last lines of JSON, or the last line of a test run."""
    lines = [line for line in text.splitlines() if line.strip()]
    counted = [line for line in lines if line.startswith("{")]
    return "\n".join(f"    {line}" for line in counted or lines[-1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--log", type=Path, default=Path("attack.log"))
    options = parser.parse_args()
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    device = key_of(torch.device("cpu"))["device"]
    where = f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"
    environment = {"HYPOTHESIS_EXAMPLES": "2000"} | os.environ
    failed = False
    options.log.open("a").close()  # where it cannot be written is said before hours of work
    for name in options.only:
        for command in ATTACKS[name]:
            print(f"+ {command}", flush=True)
            now, begin = datetime.now(timezone.utc), time.monotonic()
            done = subprocess.run(
                [sys.executable, *shlex.split(command)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            failed |= bool(done.returncode)
            print(done.stdout, flush=True)
            facts = f"{now:%Y-%m-%d %H:%M} {described.stdout.strip()}, {where}, "
            facts += f"{time.monotonic() - begin:.0f} s, status {done.returncode}"
            with options.log.open("a") as log:
                log.write(f"{command}\n  {facts}\n{last_lines(done.stdout)}\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
