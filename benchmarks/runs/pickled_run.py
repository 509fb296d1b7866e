"""`realign-fast align` on the paper's pickled lists against four passes in numpy, as processes.

python benchmarks/runs/pickled_run.py DIR --json benchmarks/results/pickled_run.json

Makes `--shards` files of `--rows` dicts {"id", "embed", "text"} a side in DIR (768 float16 numbers
a row, pickled by Python) unless they are there. Runs `four_pass_numpy.py`, which loads them with
Python's own pickle, and the command line in turns. Seconds are of the processes from their start to
their end; the results' rows are compared before a ratio is told.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import realign_fast

DIMENSION = 768
SIDES = ("text", "image")
SAME = 1e-3  # the numbers of unit rows are below 1, where float16 has steps of 2^-11 and less


def make(folder: Path, shards: int, rows: int) -> None:
    """Write pickled lists in the form that a loop over an encoder's batches leaves."""
    random = np.random.default_rng(0)
    for side in SIDES:
        (folder / side).mkdir(parents=True, exist_ok=True)
        centre = random.standard_normal(DIMENSION, dtype=np.float32)
        for shard in range(shards):
            values = random.standard_normal((rows, DIMENSION), dtype=np.float32) + centre
            entries = [
                {"id": f"{side}_{shard}_{i}", "embed": row.copy(), "text": f"thing {i} of {shard}"}
                for i, row in enumerate(values.astype(np.float16))
            ]
            with open(folder / side / f"emb_{shard}.pkl", "wb") as file:
                pickle.dump(entries, file)


def timed(command: list[str]) -> dict[str, float]:
    """Return the seconds of a process and the processor seconds that it used."""
    before, begin = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds, after = time.perf_counter() - begin, os.times()
    used = sum(after[2:4]) - sum(before[2:4])
    return {"seconds": seconds, "processor_seconds": used}


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference between the rows of two folders with equal other contents."""
    largest = 0.0
    for path in sorted(one.glob("*.pkl")):
        lists = [pickle.loads((folder / path.name).read_bytes()) for folder in (one, other)]
        left, right = (np.stack([e.pop("embed") for e in entries]) for entries in lists)
        if lists[0] != lists[1] or left.dtype != right.dtype:
            raise SystemExit(f"{path.name}: what is beside the rows differs")
        largest = max(largest, float(np.abs(left.astype("f4") - right).max()))
    return largest


def main() -> None:
    """Make the files, run both in turns, compare what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=4, help="of each side")
    parser.add_argument("--rows", type=int, default=50_000, help="of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.folder / SIDES[-1]).exists():
        make(options.folder, options.shards, options.rows)
    outs = {name: options.folder / name for name in ("numpy", "realign_fast")}
    sides = [word for s in SIDES for word in (f"--{s}", str(options.folder / s))]
    script = str(Path(__file__).parents[1] / "peers" / "four_pass_numpy.py")
    commands = {
        "numpy": [sys.executable, script, *sides],
        "realign_fast": [sys.executable, "-m", "realign_fast", "align", *sides, "--allow-pickle"],
    }
    runs = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            runs[name].append(timed([*command, "--out", str(outs[name])]))
    difference = largest_difference(*outs.values())
    if not difference < SAME:
        raise SystemExit(f"the results differ by {difference}")
    report = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "machine": f"{platform.machine()}, {os.cpu_count()} threads",
        "versions": {"realign_fast": realign_fast.__version__, "torch": torch.__version__},
        "rows_a_side": options.shards * options.rows,
        "shards_a_side": options.shards,
        "largest_difference": difference,
        "runs": runs,
    }
    for kind in ("seconds", "processor_seconds"):
        one, other = (statistics.median(run[kind] for run in runs[name]) for name in outs)
        report[kind] = {"numpy": one, "realign_fast": other, "ratio": one / other}
    report["passes"] = json.loads((outs["realign_fast"] / "__realign__/report.json").read_text())[
        "passes"
    ]
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
