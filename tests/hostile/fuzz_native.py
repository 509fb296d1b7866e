"""Fuzz the native readers (csrc/io) with libFuzzer, AddressSanitizer and UBSan.

    PYTHONPATH=.:tests python -m hostile.fuzz_native --runs 1000000 --corpus FOLDER

It needs clang with libFuzzer. ``--corpus`` keeps the inputs that reached new code for the next
run. An input that ends in a crash is written to the current directory, and the status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hostile import at_least_one

ROOT = Path(__file__).parents[2]
SOURCES = ["parquet/*.cpp", "pickle/*.cpp", "window.cpp"]  # of csrc/io, without Python
# The first byte of an input that is a parquet file, and the last of its head for nullable lists.
PARQUET, LIST = 1, 3 + 4


def compiler() -> str | None:
    """Return a clang++ of this machine that has libFuzzer, or None."""
    names = ["clang++", *(f"clang++-{version}" for version in range(22, 13, -1))]
    for path in filter(None, map(shutil.which, names)):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.write_text(
                'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) '
                "{ return 0; }\n"
            )
            command = [path, "-std=c++20", "-fsanitize=fuzzer", str(source), "-o", f"{folder}/a"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return path
    return None


def build(clang: str, program: Path) -> Path:
    """Compile the target and the readers."""
    csrc = ROOT / "csrc"
    readers = sorted(path for pattern in SOURCES for path in (csrc / "io").glob(pattern))
    command = [clang, "-std=c++20", "-g", "-O1", "-fsanitize=fuzzer,address,undefined"]
    command += ["-fno-sanitize-recover=undefined", "-I", csrc, "-o", program, *readers]
    subprocess.run([*command, Path(__file__).parent / "native/fuzz_io.cpp"], check=True)
    return program


def pickles() -> Iterator[bytes]:
    """Yield sound pickles of the forms that the reader knows."""
    rng = np.random.default_rng(0)
    for protocol in range(2, 6):
        for dtype in ("f2", "f4", "f8"):
            rows = rng.standard_normal((3, 4)).astype(dtype)
            for key in ("embed", "embedding"):
                entries = [{"id": str(i), key: row} for i, row in enumerate(rows)]
                yield pickle.dumps(entries, protocol)
            yield pickle.dumps([{"embed": row[None]} for row in rows], protocol)
        lists = [{"embed": [float(v) for v in row], "text": "a word"} for row in rows]
        yield pickle.dumps(lists, protocol)
        yield pickle.dumps(
            [{"embed": rows[0], "n": i, "t": (1, None, {"k": True})} for i in range(3)]
        )


def parquet_files() -> Iterator[tuple[bytes, bytes]]:
    """Yield heads of inputs and small parquet files of the layouts that the reader knows."""
    pyarrow = __import__("pyarrow.parquet")
    rng = np.random.default_rng(0)
    for place, name in enumerate(("float16", "float32", "float64")):
        rows = rng.standard_normal((5, 4)).astype(name)
        flat, length = pyarrow.array(rows.ravel()), rows[0].nbytes
        offsets = pyarrow.array(np.arange(0, 24, 4, dtype="i4"))
        columns = {
            "list": (pyarrow.ListArray.from_arrays(offsets, flat), [3, place, LIST]),
            "fixed": (pyarrow.FixedSizeListArray.from_arrays(flat, 4), [3, place, LIST]),
            "binary": (pyarrow.array(map(bytes, rows), pyarrow.binary(length)), [0, place + 2, 1]),
        }
        for column, sizes in columns.values():
            for version in ("1.0", "2.0"):
                file = io.BytesIO()
                pyarrow.parquet.write_table(
                    pyarrow.table({"embedding": column}),
                    file,
                    compression="none",
                    use_dictionary=False,
                    data_page_version=version,
                    row_group_size=3,
                    data_page_size=16,
                )
                yield bytes([PARQUET, *sizes]), file.getvalue()


def write_seeds(folder: Path) -> int:
    """Write the inputs that the fuzzer starts from; return their number."""
    inputs = [bytes(4) + data for data in pickles()]
    inputs += [head + data for head, data in parquet_files()]
    for number, data in enumerate(inputs):
        (folder / f"seed_{number}").write_bytes(data)
    return len(inputs)


def fuzz(program: Path, corpus: Path, *, runs: int, seconds: int, seed: int) -> dict[str, int]:
    """Run the target; return the numbers of inputs tried and of edges covered, and the status."""
    options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4096"]
    options += ["-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"]
    done = subprocess.run([program, *options, corpus], capture_output=True, text=True)
    found = re.search(r"stat::number_of_executed_units: +(\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode:
        sys.stderr.write(done.stderr[-6000:])
    return {
        "inputs": int(found[1]) if found else 0,
        "edges": int(edges[-1]) if edges else 0,
        "status": done.returncode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=at_least_one, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="end after these seconds (0: never)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="keep the inputs that reached new code here")
    options = parser.parse_args()
    clang = compiler() or sys.exit("fuzz_native needs a clang++ with libFuzzer; install clang")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.corpus or Path(scratch, "corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        write_seeds(corpus)
        program = build(clang, Path(scratch, "fuzz_io"))
        limits = {"runs": options.runs, "seconds": options.seconds, "seed": options.seed}
        result = fuzz(program, corpus, **limits)
    print(json.dumps(result))
    sys.exit(bool(result["status"]))


if __name__ == "__main__":
    main()
