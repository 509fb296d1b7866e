"""A large corpus from its files to aligned files: rates, memory, and the rates of the disk.

python examples/make_random_corpus.py DIR --gigabytes 30
python benchmarks/runs/corpus_run.py DIR --json benchmarks/results/corpus_run.json

Measures in one run, one shard at a time and cold (its pages dropped first): reading with `dd`
(through the page cache and past it), copying with `cp` and a sync; then `realign-fast align` over
everything, cold, with every pass's rate, its share of the disk's and the peak memory. A shard is
copied before and after the run: a machine's disk has moods, and the two say how much.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import realign_fast


def drop(paths: list[Path]) -> None:
    """Sync the disk and remove these files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(command: list[str], paths: list[Path], made: Path | None = None) -> float:
    """Return the median GB/s of `command` on each of `paths`, cold; bytes are counted once."""
    rates = []
    for path in paths:
        drop([path])
        begin = time.perf_counter()
        subprocess.run([word.format(path) for word in command], check=True, capture_output=True)
        if made:
            with open(made, "rb") as file:
                os.fsync(file.fileno())
        rates.append(path.stat().st_size / (time.perf_counter() - begin) / 1e9)
        if made:
            made.unlink()
    return sorted(rates)[len(rates) // 2]


def disk(paths: list[Path], scratch: Path) -> dict[str, float]:
    """Return the rates of the disk alone, GB/s of one direction."""
    made = scratch / "copied"
    return {
        "dd": rate(["dd", "if={}", "of=/dev/null", "bs=16M"], paths),
        "dd_direct": rate(["dd", "if={}", "of=/dev/null", "bs=16M", "iflag=direct"], paths),
        "cp_and_sync": rate(["cp", "{}", str(made)], paths, made),
    }


def main() -> None:
    """Measure the disk, run the job, measure the disk again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="with text/ and image/")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=3, help="shards for the disk's rates")
    parser.add_argument("options", nargs="*", help="for realign-fast align, after --")
    options = parser.parse_args()
    text = sorted((options.corpus / "text").iterdir())
    image = sorted((options.corpus / "image").iterdir())
    out = options.corpus / "aligned"
    shutil.rmtree(out, ignore_errors=True)
    before = disk(text[: options.samples], options.corpus)
    drop(text + image)
    sides = ["--text", str(options.corpus / "text"), "--image", str(options.corpus / "image")]
    command = [sys.executable, "-m", "realign_fast", "align", *sides, "--out", str(out)]
    begin = time.perf_counter()
    subprocess.run([*command, *options.options], check=True)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    after = disk(text[: options.samples], options.corpus)
    report = json.loads((out / "__realign__/report.json").read_text())
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} threads",
        "versions": {"realign_fast": realign_fast.__version__, "torch": torch.__version__},
        "text_gb": sum(path.stat().st_size for path in text) / 1e9,
        "image_gb": sum(path.stat().st_size for path in image) / 1e9,
        "seconds": seconds,
        "peak_memory_mib": peak / 2**20,
        "disk_gb_per_second": {"before": before, "after": after},
        "passes": [share(one, before, after) for one in report["passes"]],
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def share(one: dict, before: dict[str, float], after: dict[str, float]) -> dict:
    """Return a pass relative to the disk: to `dd` if it reads, to `cp` if it also writes."""
    mean = {name: (before[name] + after[name]) / 2 for name in before}
    read = one["bytes_read"] / one["seconds"] / 1e9
    facts = {"name": one["name"], "rows": one["rows"], "seconds": one["seconds"]}
    facts |= {"rows_per_second": one["rows"] / one["seconds"], "read_gb_per_second": read}
    if one["bytes_written"]:
        return facts | {"of_cp_and_sync": read / mean["cp_and_sync"]}
    return facts | {"of_dd": read / mean["dd"], "of_dd_direct": read / mean["dd_direct"]}


if __name__ == "__main__":
    main()
