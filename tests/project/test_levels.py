"""Packages are on levels and import downwards only; a heavy package is imported in one place."""

import ast
import traceback
from pathlib import Path

import numpy as np
import pytest
from support import programs

from realign_fast.cli.main import main
from realign_fast.ops import functions

PACKAGE = Path(__file__).parents[2] / "realign_fast"
# A package, or a module of the root, by the level it is on: an import goes to a lower level.
LEVELS = (
    ("_libraries", "_extras", "_argument_checks", "interface"),
    (
        "ops",
        "storage",
        "_startup",
        "_one_thread",
        "_io",
    ),
    ("corpus", "covariance_sums", "seeded_noise", "whiten"),
    ("moments", "device_check"),
    ("frame", "metrics"),
    ("methods",),
    ("align", "shared_space"),
    ("pipeline", "embed", "revision", "integrations"),  # none imports another
    ("demo", "report"),
    ("cli",),
    ("__main__", "__init__", "_old_names"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
NEVER = {("corpus", "ops")}  # downwards, and still not allowed
# A heavy optional package, and the only places that may import it.
HEAVY = {
    "fsspec": "storage",
    "plotly": "report",
    "open_clip": "embed",
    "pyarrow": "corpus",
    "ray": "pipeline",
    "sklearn": "integrations",
    "transformers": ("embed", "revision"),
    "triton": "ops",
}


def parts_of(file):
    """``realign_fast/ops/reference.py`` -> ``("ops", "reference")``."""
    return file.relative_to(PACKAGE).with_suffix("").parts


def imports(source, parts):
    """(package inside this one or "", top package) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["realign_fast", *parts[:-1]]
            above = above[: len(above) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_extra":
            names = [ast.literal_eval(node.args[0]).split(".")]
        else:
            continue
        for name in names:
            if name[0] != "realign_fast":
                yield "", name[0]
            elif name[1:] != ["__version__"]:
                inside = name[1] if len(name) > 1 else "__init__"
                public = len(name) == 2 and inside not in LEVEL
                yield "__init__" if public else inside, name[0]


def violations(source, parts):
    """Every import of one file that the levels or the list of heavy packages forbid, in words."""
    own = parts[0]
    if own in LEVELS[-1]:
        return []
    if own not in LEVEL:
        return [f"{own} has no level; give it one here"]
    found = []
    for inside, package in imports(source, parts):
        if not inside:
            places = HEAVY.get(package, own)
            if own not in ((places,) if isinstance(places, str) else places):
                found.append(f"{package} is imported in {own}, its place is {places}")
        elif inside == "__init__":
            found.append(f"{own} imports the package's public names; import the module itself")
        elif inside not in LEVEL:
            found.append(f"{own} imports {inside}, which has no level")
        elif (own, inside) in NEVER or (inside != own and LEVEL[inside] >= LEVEL[own]):
            found.append(f"{own} (level {LEVEL[own]}) imports {inside} (level {LEVEL[inside]})")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(parts_of(file)))
def test_imports_go_downwards_and_heavy_packages_have_one_place(file):
    assert violations(file.read_text(), parts_of(file)) == []


@pytest.mark.parametrize(
    ("source", "parts", "words"),
    [
        ("from .align import ReAlign", ("moments",), "imports align"),
        ("from ..frame import FixedFrame", ("metrics", "cosines"), "imports frame"),
        ("import realign_fast.cli", ("demo", "__init__"), "imports cli"),
        ("from ..pipeline import Run", ("revision", "train"), "imports pipeline"),
        ("def f():\n    from .. import ops", ("corpus", "corpus"), "imports ops"),
        ("from realign_fast import ReAlign", ("pipeline", "passes"), "public names"),
        ("from .. import ReAlign", ("pipeline", "passes"), "public names"),
        ("import realign_fast", ("align",), "public names"),
        ("from .. import moments", ("ops", "reference"), "imports moments"),
        ("from .helpers import x", ("align",), "helpers, which has no level"),
        ("import os", ("helpers",), "no level"),
        ("import plotly.offline", ("demo", "__init__"), "its place is report"),
        ("from transformers import Trainer", ("cli", "main"), "its place is ('embed', 'revision')"),
        ("import_extra('ray', 'ray', 'it')", ("cli", "main"), "its place is pipeline"),
        ("def f():\n    from .integrations import v", ("moments",), "imports integrations"),
    ],
)
def test_a_wrong_import_is_found(source, parts, words):
    (found,) = violations(source, parts)
    assert words in found


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from .. import ops, __version__", ("pipeline", "align_run")),
        ("from ..ops.reference import unit", ("metrics", "cosines")),
        ("from . import reference", ("ops", "functions")),
        ("from ..align import ReAlign\nfrom .model import P", ("revision", "train")),
        ("import ray", ("pipeline", "engines", "ray_driver")),
        ("import torch\nfrom torch import nn", ("corpus", "corpus")),
        ("from .cli.main import main", ("__main__",)),
    ],
)
def test_a_right_import_is_left_alone(source, parts):
    assert violations(source, parts) == []


def test_the_root_of_the_package_is_small():
    modules = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert len(modules) <= 13
    assert len(LEVELS) <= 11


def test_importing_the_package_loads_no_heavy_package():
    code = "import sys, realign_fast; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = set(HEAVY) - {"triton"}  # torch imports it by itself, with its first custom op
    ran = programs.run("-c", code, *heavy, cwd=PACKAGE.parent)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_align_reaches_its_kernels_through_at_most_seven_files(tmp_path, monkeypatch):
    """Files of the package on the stack when rows are checked, right before an op is called."""
    stacks = {}

    def recorded(check, op):
        """Return a check of rows that records the stack of its calls."""

        def record(*args):
            files = (Path(frame.filename) for frame in traceback.extract_stack())
            inside = [file.relative_to(PACKAGE) for file in files if file.is_relative_to(PACKAGE)]
            stacks.setdefault(op or args[0], set()).update(map(str, inside))
            return check(*args)

        return record

    for name, op in (("_checked_rows", None), ("_may_call_kernel", "align_rows")):
        monkeypatch.setattr(functions, name, recorded(getattr(functions, name), op))
    np.save(tmp_path / "text.npy", np.eye(3, dtype=np.float32) + 1)
    np.save(tmp_path / "image.npy", np.eye(3, dtype=np.float32))
    sides = ["--text", str(tmp_path / "text.npy"), "--image", str(tmp_path / "image.npy")]
    assert main(["align", *sides, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert set(stacks) == {"sum_rows", "align_rows"}
    for op, files in stacks.items():
        assert len(files) <= 7, f"{op}: {sorted(files)}"
        assert {"cli/main.py", "ops/functions.py"} <= files
