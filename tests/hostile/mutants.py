"""Change one token of the code, run the tests that cover its file, and count what they notice.

    PYTHONPATH=.:tests python -m hostile.mutants --results mutants.jsonl

The population is drawn by seed: operators, comparisons, constants, conditions and calls of the
files in ``COVERED``. Each mutant is tried in a copy of the tree. The tests that most likely notice
it run first. When they have run for all mutants, the whole suite that covers a file runs for those
that are left. A mutant that no test notices survives. Results are appended to a file, and a run
that was stopped goes on there.

What makes 300 mutants affordable: tests run in forks of this process, which has imported torch and
other libraries but nothing of the package, without plugins of pytest; only the library of
``csrc/cpu`` is compiled, and of it what includes the changed file. For the tests that run first
this is done with -O0 and for the baseline of the instruction sets alone, and they are the tests of
the baseline; for the whole suite it is done with -O1 for all.
``--unchanged`` runs the same tests on the unchanged code with the same libraries, which must pass.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from hostile import at_least_one

ROOT = Path(__file__).parents[2]


class Cover(NamedTuple):
    """Test files and folders that cover a file."""

    first: str  # those that most likely notice a mutant, the quickest first
    whole: str  # all, these included

    def whole_in_order(self) -> list[str]:
        """Return all files, those that ran first at the end."""
        first = self.first.split()
        paths = [ROOT / name for name in self.whole.split()]
        files = [
            path.relative_to(ROOT).as_posix()
            for root in paths
            for path in ([root] if root.is_file() else sorted(root.glob("test_*.py")))
        ]
        return sorted(files, key=lambda file: file in first)


STATISTICS = "tests/numerics tests/align/test_align.py tests/align/test_distributed.py"
STATISTICS += " tests/align/test_align_module.py"
RUNS = "tests/pipeline/test_resume.py tests/pipeline/test_verify.py tests/pipeline/test_pipeline.py"
RUNS += " tests/pipeline/test_job_array.py tests/pipeline/test_unify.py tests/hostile/test_fuzz.py"
RUNS += " tests/project/test_stored_outputs.py tests/corpus/test_archives.py"
FILES = "tests/storage tests/pipeline/test_resume.py tests/hostile/test_faults.py"
FILES += " tests/corpus/test_archives.py"
KERNELS = "tests/ops tests/numerics/test_moments.py tests/numerics/test_covariance.py"
SUMS = "tests/numerics/test_moments.py tests/numerics/test_covariance.py"
RECORDS = "tests/pipeline/test_verify.py tests/pipeline/test_resume.py"
COVERED = {
    "realign_fast/moments.py": Cover(SUMS, STATISTICS),
    "realign_fast/covariance_sums.py": Cover(SUMS, STATISTICS),
    "realign_fast/pipeline/checkpoints.py": Cover(RECORDS, RUNS),
    "realign_fast/pipeline/manifest.py": Cover(RECORDS, RUNS),
    "realign_fast/pipeline/verify.py": Cover("tests/pipeline/test_verify.py", RUNS),
    "realign_fast/storage/atomic.py": Cover(
        "tests/storage/test_paths.py tests/storage/test_links_and_locks.py", FILES
    ),
    "csrc/cpu/sum_rows.inl": Cover("tests/ops/test_sum_rows.py", KERNELS),
    "csrc/cpu/align_rows.inl": Cover("tests/ops/test_align_rows.py", KERNELS),
    "csrc/cpu/add_scatter.inl": Cover("tests/ops/test_add_scatter.py", KERNELS),
    "csrc/cpu/map_rows.inl": Cover("tests/ops/test_map_rows.py", KERNELS),
    "csrc/cpu/row_map.h": Cover("tests/ops/test_align_rows.py tests/ops/test_sum_rows.py", KERNELS),
}
# Not run: tests that compile the package, and tests of kernels that are not of csrc/cpu.
LEFT_OUT = "build or libraries or ptx or triton"
SLOW = "killed or processes or full_disk or other_options or peak_memory or million or 1101"
SLOW += " or number_of_threads or too_large"  # not in the first stage
SECONDS = 900  # a mutant that runs longer is noticed: it hangs
STAGES = ("first", "whole")
# What tests import, so that a fork need not; nothing that imports the package.
LIBRARIES = (
    "torch numpy pytest hypothesis safetensors.torch pyarrow.parquet typer sklearn.base scipy"
)


class Mutant(NamedTuple):
    """A change of one place of a file."""

    file: str
    line: int
    change: str  # for people
    text: str  # of the whole file


_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


def _changed(node: ast.AST) -> bool:
    """Change a node in place if it is of a kind that is mutated; return whether it was."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        node.ops[0] = _SWAPPED[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPPED:
        node.op = _SWAPPED[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        node.value += 1
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        node.value = ast.Constant(None)
    else:
        return False
    return True


def python_mutants(file: str) -> Iterator[Mutant]:
    """Yield every mutant of a Python file, outside of docstrings and annotations."""
    text = (ROOT / file).read_text()
    tree, lines = ast.parse(text), text.splitlines()
    for place, node in enumerate(ast.walk(tree)):
        if not hasattr(node, "lineno") or not _changed(copy.deepcopy(node)):
            continue
        other = copy.deepcopy(tree)
        twin = next(n for number, n in enumerate(ast.walk(other)) if number == place)
        before = ast.unparse(twin).splitlines()[0]
        _changed(twin)
        after = ast.unparse(ast.fix_missing_locations(twin)).splitlines()[0]
        try:
            mutated = ast.unparse(ast.fix_missing_locations(other))
        except (ValueError, TypeError):
            continue
        code = lines[node.lineno - 1].strip()
        yield Mutant(file, node.lineno, f"{code}:  {before}  ->  {after}", mutated)


_TOKENS = (
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" == ", " != "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" \+= ", " -= "),
    (r" && ", " || "),
    (r"\b1\b", "2"),
    (r"\b0\b", "1"),
)


def native_mutants(file: str) -> Iterator[Mutant]:
    """Yield the mutants of a C++ file: one token of one line, or a call that is left out."""
    lines = (ROOT / file).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if not code.strip() or code.lstrip().startswith(("#", "template", "using", "namespace")):
            continue
        changes = [
            code[: found.start()] + new + code[found.end() :]
            for old, new in _TOKENS
            for found in re.finditer(old, code)
        ]
        if re.fullmatch(r"\s+[\w:.<>\->]+\(.*\);\s*", code):
            changes.append("\n")
        for change in changes:
            text = "".join([*lines[:number], change.rstrip("\n") + "\n", *lines[number + 1 :]])
            yield Mutant(file, number + 1, f"{code.strip()}  ->  {change.strip()}", text)


def population(count: int, seed: int, files: Iterable[str] = COVERED) -> list[Mutant]:
    """Draw mutants, as many of each file as of the others while it has some."""
    chance, drawn = random.Random(seed), []
    for file in files:
        mutants = list((python_mutants if file.endswith(".py") else native_mutants)(file))
        chance.shuffle(mutants)
        drawn.append(mutants)
    taken: list[Mutant] = []
    alike: Counter[object] = Counter()  # a line may hold a number twice
    while len(taken) < count and any(drawn):
        for mutants in drawn:
            if mutants and len(taken) < count:
                mutant = mutants.pop()
                alike[mutant[:3]] += 1
                if (place := alike[mutant[:3]]) > 1:
                    mutant = mutant._replace(change=f"{mutant.change} ({place})")
                taken.append(mutant)
    return taken


def copy_tree(folder: Path) -> Path:
    """Copy the files of the repository and the built libraries."""
    tree = folder / "tree"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    libraries = [str(path.relative_to(ROOT)) for path in (ROOT / "realign_fast").glob("*.so")]
    for name in [*names.splitlines(), *libraries, "realign_fast/_build_info.json"]:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def in_fork(work: Callable[[], int], seconds: float, said: Path) -> int | None:
    """Return the status of ``work()`` in a fork with its output in a file; None: out of time."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = work()
            sys.stdout.flush()
        finally:
            os._exit(status)
    end = os.pidfd_open(child)
    in_time = select.select([end], [], [], seconds)[0]
    os.close(end)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it started
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if in_time else None


def enter(tree: Path) -> None:
    """Make a fork import everything from a copy of the tree."""
    os.chdir(tree)
    environment = {"PYTHONPATH": f"{tree}:{tree}/tests", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ.update(environment)
    own = {ROOT.resolve() / name for name in ("", "tests", "benchmarks")}
    others = [path for path in sys.path if Path(path).resolve() not in own]
    sys.path[:] = [str(tree), str(tree / "tests"), *others]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("hostile", "support")]:
        del sys.modules[name]
    assert "realign_fast" not in sys.modules


def run_tests(tree: Path, cover: Cover, stage: str, scratch: Path) -> int:
    """Run tests in this process; return pytest's status."""
    enter(tree)
    first = stage == "first"
    files = cover.first.split() if first else cover.whole_in_order()
    chosen = f"not ({LEFT_OUT} or {SLOW})" if first else f"not ({LEFT_OUT})"
    chosen += " and baseline" * (first and cover.whole == KERNELS)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", chosen, f"--basetemp={scratch}"]
    return int(import_module("pytest").main([*options, "--durations=5", *files]))


_PRECOMPILED = "common/dispatch.h common/huge_pages.h cpu/isa.h algorithm atomic new vector"
_OTHERS = """
namespace realign_fast {
namespace avx2 = baseline;
namespace avx512 = baseline;
}
"""


def compile_library(tree: Path, sources: list[str], stage: str) -> int:
    """Compile sources of csrc/cpu and link the library with the objects of the others."""
    enter(tree)
    backend, steps = import_module("build_backend"), import_module("build_steps")
    every = sorted(path.as_posix() for path in Path("csrc/cpu").glob("*.cpp"))
    Path("build/objects").mkdir(parents=True, exist_ok=True)
    sets = Path("csrc/cpu/for_each_isa.h")
    all_sets = sets.read_text()
    flags = "-O1"
    if stage == "first":
        sets.write_text(all_sets.partition("#if defined(__x86_64__)")[0] + _OTHERS)
        flags = "-O0 -include build/headers.h"
    steps.COMPILE = steps.COMPILE.replace("-O3", flags)
    library, compiler = "realign_fast/_C.abi3.so", backend.find_compiler()[0]
    commands = steps.library_steps(compiler, backend.find_torch(), every, library)
    headers = Path("build/headers.h")
    if stage == "first" and not headers.exists():
        headers.write_text("".join(f"#include <{name}>\n" for name in _PRECOMPILED.split()))
        command = commands[steps.object_path(sources[0])][1].replace(f"-include {headers}", "")
        command = command.partition(" -MD ")[0] + f" -x c++-header {headers} -o {headers}.gch"
        subprocess.run(command, shell=True, check=True)
    try:
        for output in (*map(steps.object_path, sources), library):
            if status := subprocess.run(commands[output][1], shell=True).returncode:
                return status
    finally:
        sets.write_text(all_sets)
    return 0


def sources_of(file: str) -> list[str]:
    """Return the sources of csrc/cpu that include a file.

    They are compiled together: of a function that several of them hold, the linker takes one.
    """
    if file.endswith(".inl"):
        return [file.replace(".inl", ".cpp")]
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp"))


class Workshop:
    """A copy of the tree in which one mutant after another is tried."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.scratch, self.said = copy_tree(folder), folder / "files", folder / "said"
        self.objects, self.clean = self.tree / "build/objects", folder / "objects"
        self.changes = 0

    def compile_unchanged(self) -> None:
        """Compile the library of the unchanged code."""
        if self.clean.exists():
            return
        every = [path.relative_to(self.tree) for path in (self.tree / "csrc/cpu").glob("*.cpp")]
        status = self._run(compile_library, [path.as_posix() for path in every], "whole")
        assert status == 0, self.said.read_text()
        shutil.copytree(self.objects, self.clean)
        shutil.copy2(self.tree / "realign_fast/_C.abi3.so", self.clean)

    def try_mutant(self, mutant: Mutant, stage: str) -> dict[str, object]:
        """Return how tests noticed a mutant (`test`, `build`, `time` or not at all) and by what."""
        path, begin = self.tree / mutant.file, time.monotonic()
        original, kept = path.read_bytes(), path.stat()
        native = not mutant.file.endswith(".py")
        if native:
            self.compile_unchanged()
        path.write_text(mutant.text)
        self.changes += 1  # Python takes a file with the same second and size for the same
        os.utime(path, (self.changes, self.changes))
        try:
            noticed, name = self._try(mutant.file, stage, native)
        finally:
            path.write_bytes(original)
            os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
            if native:
                shutil.copytree(self.clean, self.objects, dirs_exist_ok=True)
                shutil.copy2(self.clean / "_C.abi3.so", self.tree / "realign_fast")
        seconds = round(time.monotonic() - begin, 1)
        return {"stage": stage, "noticed": noticed, "by": name, "seconds": seconds}

    def _try(self, file: str, stage: str, native: bool) -> tuple[str, str]:
        if native and self._run(compile_library, sources_of(file), stage):
            return "build", ""
        status = self._run(run_tests, COVERED[file], stage, self.scratch)
        if status == 0:
            return "", ""
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", self.said.read_text(), re.M)
        return "time" if status is None else "test", found[1] if found else ""

    def _run(self, work: Callable[..., int], *arguments: object) -> int | None:
        return in_fork(lambda: work(self.tree, *arguments), SECONDS, self.said)


def unchanged_passes(workshop: Workshop, files: Iterable[str]) -> bool:
    """Return whether the covering tests of files pass without a change."""
    passed = True
    for file in files:
        for stage in STAGES:
            mutant = Mutant(file, 0, "", (ROOT / file).read_text())
            result = workshop.try_mutant(mutant, stage)
            print(json.dumps({"file": file} | result), flush=True)
            if result["noticed"]:
                print(workshop.said.read_text()[-6000:])
            passed = passed and not result["noticed"]
    return passed


def print_summary(results: dict[tuple[str, int, str], dict[str, object]]) -> None:
    """Print how many mutants of each file were noticed, and those that were not."""
    for file in (*COVERED, "all"):
        own = [one for one in results.values() if file in (one["file"], "all")]
        noticed = sum(bool(one["noticed"]) for one in own)
        print(f"{file}: {noticed} of {len(own)} noticed ({noticed / max(1, len(own)):.0%})")
    for one in results.values():
        if not one["noticed"]:
            kind = "survives" if one["stage"] == "whole" else "not noticed by the first tests"
            print(f"{kind}: {one['file']}:{one['line']}: {one['change']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=at_least_one, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--files", nargs="+", choices=COVERED, default=list(COVERED))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--unchanged", action="store_true", help="run the tests without a change")
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    for library in LIBRARIES.split():
        with suppress(ImportError):
            import_module(library)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {(one["file"], one["line"], one["change"]): one for one in map(json.loads, lines)}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        if options.unchanged:
            sys.exit(not unchanged_passes(workshop, options.files))
        mutants = population(options.count, options.seed)
        for stage, mutant in ((stage, mutant) for stage in STAGES for mutant in mutants):
            before = results.get(mutant[:3])
            is_done = before and (before["noticed"] or stage in ("first", before["stage"]))
            if mutant.file not in options.files or is_done:
                continue
            if time.monotonic() - begin > options.seconds:
                break
            result = mutant._asdict() | workshop.try_mutant(mutant, stage)
            del result["text"]
            results[mutant[:3]] = result
            with options.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print_summary(results)


if __name__ == "__main__":
    main()
