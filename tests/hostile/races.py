"""Run the tests of the kernels and of the reader's threads under ThreadSanitizer.

    PYTHONPATH=.:tests python -m hostile.races

csrc/cpu and csrc/io are compiled with -fsanitize=thread in a copy of the tree, and the tests run
with four threads. A report counts if it names one of the two libraries; torch, OpenMP and Python
are not compiled for ThreadSanitizer, and what it cannot know of OpenMP is told by
native/openmp_joins.c. There are no suppressions.

``--planted`` puts a race into a kernel and another one into the reader, and expects both to be
found. Prints one line of JSON and the reports. It needs g++ with libtsan, on Linux.
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
from importlib import import_module
from pathlib import Path

from hostile.mutants import ROOT, copy_tree

OPS = ("sum_rows", "align_rows", "align_rows_backward", "map_rows", "add_scatter")
TESTS = [f"tests/ops/test_{name}.py" for name in (*OPS, "memory", "huge_pages", "drawn_arguments")]
TESTS += [f"tests/corpus/test_{name}.py" for name in ("shard_reader", "pickle_rows", "corpus")]
LEFT_OUT = "not ptx and not reference and not triton"
LIBRARIES = ("_C.abi3.so", "_io.abi3.so")
OPTIONS = "halt_on_error=0:exitcode=0:die_after_fork=0:ignore_noninstrumented_modules=1"
OPTIONS += ":report_thread_leaks=0:report_signal_unsafe=0"
FLAGS = "-fsanitize=thread -fno-omit-frame-pointer"
# One file each: all threads of a kernel share one scratch; a mapping is replaced without a lock.
PLANTED = {
    "csrc/cpu/execution.h": (
        r"(  torch::stable::parallel_for\(0, workers.*\n)(    AlignedVector<double> scratch.*\n)",
        r"\2\1",
    ),
    "csrc/io/shard_reader.cpp": (r"  std::lock_guard lock\(mapping_mutex_\);\n", ""),
}


def library(name: str) -> Path | None:
    """Return the path of a library of g++, or None."""
    if not shutil.which("g++"):
        return None
    command = ["g++", f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def build(tree: Path) -> Path:
    """Compile both libraries of a tree, and return the library that is preloaded beside libtsan."""
    sys.path.insert(0, str(ROOT))
    backend, steps = import_module("build_backend"), import_module("build_steps")
    steps.COMPILE = steps.COMPILE.replace("-O3", f"-O1 -g1 {FLAGS}")
    steps.FURTHER_LINK = FLAGS
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
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-O1", *FLAGS.split(), "-o", joins, source]
    subprocess.run([*command, "-ldl"], check=True)
    return joins


def run(tree: Path, joins: Path, tests: Sequence[str], threads: int) -> tuple[int, str, list[str]]:
    """Run tests; return pytest's status, its last line and the reports that count."""
    logs = tree / "reports"
    logs.mkdir()
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libtsan.so')} {joins}",
        "TSAN_OPTIONS": f"{OPTIONS}:log_path={logs}/log",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": f"{tree}:{tree}/tests",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    done = subprocess.run(
        [*command, *tests], cwd=tree, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        print(done.stdout[-8000:])
    reports = [
        report
        for log in sorted(logs.iterdir())
        for report in re.split(r"^={18}$", log.read_text(errors="replace"), flags=re.M)
        if any(name in report for name in LIBRARIES)
    ]
    return done.returncode, done.stdout.strip().rpartition("\n")[2], reports


def plant(tree: Path) -> None:
    """Put the races into a copy of the tree."""
    for file, (old, new) in PLANTED.items():
        text, count = re.subn(old, new, (tree / file).read_text())
        assert count == 1, f"{file}: the place of the planted race has changed"
        (tree / file).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--planted", action="store_true", help="expect to find planted races")
    options = parser.parse_args()
    if not library("libtsan.so"):
        sys.exit("races needs g++ with libtsan (apt-get install g++)")
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        if options.planted:
            plant(tree)
        status, said, reports = run(tree, build(tree), options.tests, options.threads)
        os.chdir(ROOT)
    found = {name: sum(name in report for report in reports) for name in LIBRARIES}
    print(json.dumps({"tests": said, "reports": found, "status": status}))
    if options.planted:
        sys.exit(not all(found.values()))
    print("\n".join(reports))
    sys.exit(bool(status or reports))


if __name__ == "__main__":
    main()
