"""The four-pass method as a plain numpy script, with which corpus runs are compared.

python benchmarks/four_pass_numpy.py --text DIR --image DIR --out DIR

float64 in batches of 512 rows, whose temporaries stay in the caches: means of both sides, traces of
both sides, the mean of the mapped text, then apply (ReAlign, arXiv 2602.07026 section 4). Reads and
writes `.npy` shards, or `.pkl` shards that are lists of ``{"id", "embed", ...}`` (Python's own
pickle: only for files you made).
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BATCH_ROWS = 512


def shards(folder: Path) -> list[Path]:
    """Return the files of rows in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".npy", ".pkl"))


def load(path: Path) -> np.ndarray:
    """Load all rows of a shard, `[N, D]`."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    with open(path, "rb") as file:
        return np.stack([np.asarray(item["embed"]) for item in pickle.load(file)])


def save(path: Path, rows: np.ndarray, source: Path) -> None:
    """Save aligned rows in the form that `source` has."""
    if path.suffix == ".npy":
        np.save(path, rows)
        return
    with open(source, "rb") as file:
        items = pickle.load(file)
    with open(path, "wb") as file:
        pickle.dump([{**item, "embed": row} for item, row in zip(items, rows, strict=True)], file)


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows of length one."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def batches(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `(first row, unit rows in float64)`."""
    for first in range(0, len(rows), BATCH_ROWS):
        yield first, unit(rows[first : first + BATCH_ROWS].astype(np.float64))


def mean_of(folder: Path, change=lambda rows: rows) -> np.ndarray:
    """Return the mean of the unit rows of a folder, or of their images under `change`."""
    total, count = 0.0, 0
    for path in shards(folder):
        for _, rows in batches(load(path)):
            total, count = total + change(rows).sum(axis=0), count + len(rows)
    return total / count


def align(text: Path, image: Path, out: Path) -> tuple[int, dict[str, float]]:
    """Run the four passes; return the number of rows and the seconds of each pass."""
    out.mkdir(parents=True, exist_ok=True)
    seconds, begin = {}, time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - begin - sum(seconds.values())

    mean_y, mean_x = mean_of(text), mean_of(image)
    lap("means")
    trace_y, trace_x = (
        mean_of(folder, lambda rows, mean=mean: ((rows - mean) ** 2).sum(axis=1, keepdims=True))
        for folder, mean in ((text, mean_y), (image, mean_x))
    )
    scale = float(np.sqrt(trace_x / trace_y)[0])
    lap("traces")

    def halfway(rows: np.ndarray) -> np.ndarray:
        return unit(mean_x + scale * (rows - mean_y))

    drift = mean_of(text, halfway)
    lap("drift")
    count = 0
    for path in shards(text):
        rows = load(path)
        result = np.empty(rows.shape, rows.dtype)
        for first, part in batches(rows):
            result[first : first + len(part)] = unit(halfway(part) - drift + mean_x)
        save(out / path.name, result, path)
        count += len(rows)
    lap("apply")
    return count, seconds


def main() -> None:
    """Read the arguments; print rows and seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("text", "image", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    rows, seconds = align(**vars(parser.parse_args()))
    print(json.dumps({"rows": rows, "seconds": sum(seconds.values()), "passes": seconds}))


if __name__ == "__main__":
    main()
