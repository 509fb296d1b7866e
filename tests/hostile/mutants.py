"""Change one token of the code, run the tests that cover its file, and count what they notice.

    PYTHONPATH=.:tests python -m hostile.mutants --results mutants.jsonl

The population is drawn by seed: operators, comparisons, constants, conditions and calls of the
files in ``COVERED``. Each mutant is tried in a copy of the tree; a mutant that the tests do not
notice survives. Results are appended to a file, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
STATISTICS = "tests/numerics tests/align/test_align.py tests/align/test_distributed.py"
RUNS = "tests/pipeline/test_resume.py tests/pipeline/test_verify.py tests/pipeline/test_pipeline.py"
RUNS += " tests/pipeline/test_job_array.py tests/pipeline/test_unify.py tests/hostile/test_fuzz.py"
RUNS += " tests/project/test_stored_outputs.py"
FILES = "tests/storage tests/pipeline/test_resume.py tests/hostile/test_faults.py"
KERNELS = "tests/ops tests/numerics/test_moments.py tests/numerics/test_covariance.py"
COVERED = {
    "realign_fast/moments.py": STATISTICS,
    "realign_fast/covariance_sums.py": STATISTICS,
    "realign_fast/pipeline/checkpoints.py": RUNS,
    "realign_fast/pipeline/manifest.py": RUNS,
    "realign_fast/pipeline/verify.py": RUNS,
    "realign_fast/storage/atomic.py": FILES,
    "csrc/cpu/sum_rows.inl": KERNELS,
    "csrc/cpu/align_rows.inl": KERNELS,
    "csrc/cpu/add_scatter.inl": KERNELS,
    "csrc/cpu/map_rows.inl": KERNELS,
    "csrc/cpu/row_map.h": KERNELS,
}
SECONDS = 900  # a mutant that runs longer is noticed: it hangs


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
    while len(taken) < count and any(drawn):
        for mutants in drawn:
            if mutants and len(taken) < count:
                taken.append(mutants.pop())
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


def is_noticed(mutant: Mutant, tree: Path) -> str:
    """Return how the tests noticed a mutant: `test`, `build`, `time`, or an empty text."""
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(mutant.text)
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        if not mutant.file.endswith(".py"):
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            if subprocess.run(build, cwd=tree, env=environment, capture_output=True).returncode:
                return "build"
        tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        tests += [*COVERED[mutant.file].split(), "-k", "not build and not libraries"]
        done = subprocess.run(
            tests, cwd=tree, env=environment, capture_output=True, timeout=SECONDS
        )
        return "test" if done.returncode else ""
    except subprocess.TimeoutExpired:
        return "time"
    finally:
        path.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--files", nargs="+", choices=COVERED, default=list(COVERED))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    done = {(one["file"], one["line"], one["change"]): one for one in map(json.loads, lines)}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for mutant in population(options.count, options.seed):
            if mutant.file not in options.files or mutant[:3] in done:
                continue
            if time.monotonic() - begin > options.seconds:
                break
            result = mutant._asdict() | {"noticed": is_noticed(mutant, tree)}
            del result["text"]
            done[mutant[:3]] = result
            with options.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
    for file in COVERED:
        own = Counter(bool(one["noticed"]) for one in done.values() if one["file"] == file)
        print(f"{file}: {own[True]} of {own.total()} noticed")
    total = Counter(bool(one["noticed"]) for one in done.values())
    print(
        f"all: {total[True]} of {total.total()} noticed ({total[True] / max(1, total.total()):.0%})"
    )
    for one in done.values():
        if not one["noticed"]:
            print(f"survives: {one['file']}:{one['line']}: {one['change']}")


if __name__ == "__main__":
    main()
