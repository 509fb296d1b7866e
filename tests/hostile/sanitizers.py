"""Run the tests of the kernels and of the reader under a sanitizer of the compiler.

    PYTHONPATH=.:tests python -m hostile.sanitizers --sanitizer thread    # or address

csrc/cpu and csrc/io are compiled in a copy of the tree, with ThreadSanitizer or with
AddressSanitizer and UBSan, and the tests run with four threads. A report counts if it names one of
the two libraries; torch, OpenMP and Python are not compiled for it. What ThreadSanitizer cannot
know of OpenMP is told by native/openmp_joins.c. There are no suppressions.

``--planted`` puts a fault into a kernel and another one into the reader, and expects both to be
found. Prints one line of JSON and the reports. It needs g++ with libtsan and libasan, on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from hostile import at_least_one
from hostile.mutants import ROOT, copy_tree

OPS = ["sum_rows", "align_rows", "align_rows_backward", "map_rows", "add_scatter", "memory"]
OPS += ["huge_pages", "drawn_arguments"]
READERS = ("shard_reader", "parquet_pages", "pickle_rows", "corpus")
TESTS = [f"tests/ops/test_{name}.py" for name in OPS]
TESTS += [f"tests/corpus/test_{name}.py" for name in READERS]
LEFT_OUT = "not ptx and not reference and not triton"
# Tests of memory: a sanitizer needs its own, and keeps what was freed, to see its use.
LEFT_OUT += " and not freed_by_another_thread and not peak_memory"
BEGIN = r"^=+$|(?=^\S+: runtime error: )"  # of a report
LIBRARIES = {"_C.abi3.so": "csrc/cpu/", "_io.abi3.so": "csrc/io/"}  # and their sources


class Sanitizer(NamedTuple):
    """How the libraries are compiled and run, and the faults that it has to find."""

    flags: str
    runtime: str
    environment: dict[str, str]
    planted: dict[str, tuple[str, str]]  # a pattern of a file and what stands there in its place


SANITIZERS = {
    # Planted: all threads of a kernel share one scratch; a mapping is replaced without a lock.
    "thread": Sanitizer(
        "-fsanitize=thread -fno-omit-frame-pointer",
        "libtsan.so",
        {
            "TSAN_OPTIONS": "halt_on_error=0:exitcode=0:die_after_fork=0"
            ":ignore_noninstrumented_modules=1:report_thread_leaks=0:report_signal_unsafe=0"
        },
        {
            "csrc/cpu/execution.h": (
                r"(  torch::stable::parallel_for\(0, workers.*\n)"
                r"(    AlignedVector<double> scratch.*\n)",
                r"\2\1",
            ),
            "csrc/io/shard_reader.cpp": (r"  std::lock_guard lock\(mapping_mutex_\);\n", ""),
        },
    ),
    "address": Sanitizer(
        "-fsanitize=address,undefined -fsanitize-recover=address,undefined -fno-omit-frame-pointer",
        "libasan.so",
        {
            "ASAN_OPTIONS": "halt_on_error=0:detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        # A copy is shorter than its vectors; a window reads one byte more than its buffer holds.
        {
            "csrc/cpu/execution.h": (
                r"(AlignedVector<M> copy\()round_up\(columns, width\)",
                r"\1columns",
            ),
            "csrc/io/window.cpp": (
                r"(min<int64_t>\(std::ssize\(buffer_\))(, end_ - offset\))",
                r"\1 + 1\2",
            ),
        },
    ),
}


def library(name: str) -> Path | None:
    """Return the path of a library of g++, or None."""
    if not shutil.which("g++"):
        return None
    command = ["g++", f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def build(tree: Path, flags: str) -> Path:
    """Compile both libraries of a tree, and return the library that tells of OpenMP's order."""
    sys.path.insert(0, str(ROOT))
    backend, steps = import_module("build_backend"), import_module("build_steps")
    steps.COMPILE = steps.COMPILE.replace("-O3", f"-O1 -g1 {flags}")
    steps.FURTHER_LINK = flags
    os.chdir(tree)
    kernels, reader = (
        sorted(path.as_posix() for path in Path("csrc").glob(pattern))
        for pattern in ("cpu/*.cpp", "io/**/*.cpp")
    )
    (tree / "realign_fast/_C_cuda.abi3.so").unlink(missing_ok=True)
    steps.run_steps(
        steps.library_steps("g++", backend.find_torch(), kernels, "realign_fast/_C.abi3.so")
        | steps.library_steps("g++", None, reader, "realign_fast/_io.abi3.so")
    )
    joins = tree / "openmp_joins.so"
    source = "tests/hostile/native/openmp_joins.c"
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-O1", *flags.split(), "-o", joins, source]
    subprocess.run([*command, "-ldl"], check=True)
    return joins


def run(
    tree: Path, sanitizer: Sanitizer, joins: Path, tests: Sequence[str], threads: int
) -> tuple[int, str, list[str]]:
    """Run tests; return pytest's status, its last line and the reports that count."""
    logs = tree / "reports"
    logs.mkdir()
    environment = os.environ | {
        **{key: f"{value}:log_path={logs}/log" for key, value in sanitizer.environment.items()},
        # libasan looks for the throw of libstdc++ when the process begins.
        "LD_PRELOAD": f"{library(sanitizer.runtime)} {library('libstdc++.so')}",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": f"{tree}:{tree}/tests",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    if "thread" in sanitizer.flags:
        environment["LD_PRELOAD"] += f" {joins}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    done = subprocess.run(
        [*command, *tests], cwd=tree, env=environment, stdout=subprocess.PIPE, text=True
    )
    texts = [log.read_text(errors="replace") for log in sorted(logs.iterdir())]
    if done.returncode:
        print(done.stdout[-8000:], *[text[:4000] for text in texts])
    reports = [
        report
        for text in texts
        for report in re.split(BEGIN, text, flags=re.M)
        if any(map(partial(concerns, report), LIBRARIES))
    ]
    return done.returncode, done.stdout.strip().rpartition("\n")[2], reports


def concerns(report: str, library: str) -> bool:
    """Return whether a report names a library, or a source of it."""
    return library in report or LIBRARIES[library] in report


def plant(tree: Path, faults: dict[str, tuple[str, str]]) -> None:
    """Put the faults into a copy of the tree."""
    for file, (old, new) in faults.items():
        text, count = re.subn(old, new, (tree / file).read_text())
        assert count == 1, f"{file}: the place of the planted fault has changed"
        (tree / file).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--sanitizer", choices=SANITIZERS, required=True)
    parser.add_argument("--threads", type=at_least_one, default=4)
    parser.add_argument("--planted", action="store_true", help="expect to find planted faults")
    options = parser.parse_args()
    sanitizer = SANITIZERS[options.sanitizer]
    if not library(sanitizer.runtime):
        sys.exit(f"sanitizers needs g++ with {sanitizer.runtime} (apt-get install g++)")
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        if options.planted:
            plant(tree, sanitizer.planted)
        joins = build(tree, sanitizer.flags)
        status, said, reports = run(tree, sanitizer, joins, options.tests, options.threads)
        os.chdir(ROOT)
    found = {name: sum(concerns(report, name) for report in reports) for name in LIBRARIES}
    facts = {"sanitizer": options.sanitizer, "tests": said, "reports": found, "status": status}
    print(json.dumps(facts))
    if options.planted:
        sys.exit(not all(found.values()))
    print("\n".join(reports))
    sys.exit(bool(status or reports))


if __name__ == "__main__":
    main()
