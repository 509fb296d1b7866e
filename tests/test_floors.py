"""The house has floors, and an import goes downwards only; heavy packages have one door each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "realign_fast"
FLOORS = {
    "start": 0,
    "__main__": 14,
    "cli": 13,
    "corpus_commands": 12,
    "embed_commands": 11,
    "demo": 10,
    "corpus_options": 11,
    "run_options": 10,
    "revision": 9,
    "report": 9,
    "ray_engine": 9,
    "ray_worker": 6,
    "embed": 9,
    "verify": 9,
    "job_array": 9,
    "pipeline": 8,
    "sample": 7,
    "passes": 6,
    "shard_work": 5,
    "lanes": 2,
    "manifest": 5,
    "align": 5,
    "ledger": 4,
    "family": 4,
    "estimator": 3,
    "frame": 3,
    "inspection": 3,
    "metrics": 3,
    "output": 3,
    "batches": 2,
    "moments": 2,
    "kept": 2,
    "corpus": 1,
    "scatter": 1,
    "whiten": 1,
    "_io": 0,
    "engine": 0,
    "lock": 0,
    "object_lock": -1,
    "ops": 0,
    "whole_file": 0,
    "url": -2,
    "url_errors": -3,
    "url_write": -3,
    "read_ahead": -3,
    "url_name": -4,
}
NEVER = {("corpus", "ops"), ("revision", "pipeline")}  # downwards, and still not allowed
HEAVY = {
    "ray": "ray_engine",
    "pyarrow": "corpus",
    "fsspec": "url",
    "matplotlib": "report",
    "open_clip": "embed",
    "sklearn": "estimator",
    "transformers": ("embed", "revision"),
    "triton": "ops",
}
FACE = "__init__"  # the package's own __init__.py: the roof, which nothing inside may import


def parts_of(file):
    """``realign_fast/ops/reference.py`` -> ``("ops", "reference")``."""
    return file.relative_to(PACKAGE).with_suffix("").parts


def imports(source, parts):
    """(module inside the package or "", top package) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["realign_fast", *parts[:-1]]
            above = above[: len(above) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] != "realign_fast":
                yield "", name[0]
            elif name[1:] != ["__version__"]:
                inside = name[1] if len(name) > 1 else FACE
                yield inside if (len(name) > 2 or inside in FLOORS) else FACE, name[0]


def violations(source, parts):
    """What is wrong with the imports of one file, in words."""
    own = parts[0]
    if own == FACE:
        return []
    if own not in FLOORS:
        return [f"{own} has no floor; give it one here and in DESIGN.md"]
    found = []
    for inside, package in imports(source, parts):
        if not inside:
            doors = HEAVY.get(package, own)
            if own not in ((doors,) if isinstance(doors, str) else doors):
                found.append(f"{package} is imported in {own}, its door is {doors}")
        elif inside == FACE:
            found.append(f"{own} imports the package's public face; import the module itself")
        elif inside not in FLOORS:
            found.append(f"{own} imports {inside}, which has no floor")
        elif (own, inside) in NEVER or (inside != own and FLOORS[inside] >= FLOORS[own]):
            found.append(f"{own} (floor {FLOORS[own]}) imports {inside} (floor {FLOORS[inside]})")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(parts_of(file)))
def test_imports_go_downwards_and_heavy_packages_through_their_door(file):
    assert violations(file.read_text(), parts_of(file)) == []


@pytest.mark.parametrize(
    ("source", "parts", "words"),
    [
        ("from .align import ReAlign", ("moments",), "imports align"),
        ("from . import frame", ("metrics",), "imports frame"),
        ("import realign_fast.cli", ("demo", "__init__"), "imports cli"),
        ("from ..pipeline import Run", ("revision", "train"), "imports pipeline"),
        ("def f():\n    from . import ops", ("corpus",), "imports ops"),
        ("from realign_fast import ReAlign", ("pipeline",), "public face"),
        ("from . import ReAlign", ("pipeline",), "public face"),
        ("import realign_fast", ("align",), "public face"),
        ("from .. import moments", ("ops", "reference"), "imports moments"),
        ("from .helpers import x", ("align",), "helpers, which has no floor"),
        ("import os", ("helpers",), "no floor"),
        ("import matplotlib.pyplot as plt", ("demo", "__init__"), "its door is report"),
        ("from transformers import Trainer", ("report",), "its door is ('embed', 'revision')"),
    ],
)
def test_a_wrong_import_is_found(source, parts, words):
    (found,) = violations(source, parts)
    assert words in found


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from . import ops, __version__", ("pipeline",)),
        ("from .ops.reference import unit", ("metrics",)),
        ("from . import reference", ("ops", "__init__")),
        ("from ..align import ReAlign\nfrom .model import P", ("revision", "train")),
        ("import ray", ("ray_engine",)),
        ("import torch\nfrom torch import nn", ("corpus",)),
        ("from .cli import main", (FACE,)),
    ],
)
def test_a_right_import_is_left_alone(source, parts):
    assert violations(source, parts) == []


def test_importing_the_package_loads_no_heavy_package():
    code = "import sys, realign_fast; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = set(HEAVY) - {"triton"}  # torch imports it by itself, with its first custom op
    command = [sys.executable, "-c", code, *heavy]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60, check=True
    )
    assert ran.stdout.strip() == "[]"
