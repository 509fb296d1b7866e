"""The package is typed: type checkers find no error in it, nor in a program of all public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "public_names.py"
MODULES = ("realign_fast", *(f"realign_fast.{name}" for name in (
    "corpus", "embed", "metrics", "ops", "pipeline", "report", "revision", "whiten",
)))  # fmt: skip


def run_checker(*command):
    """Run a type checker in the root, where it reads pyproject.toml; return its code and output."""
    pytest.importorskip(command[0], reason=f"{command[0]} is not installed (extra dev)")
    checker = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    return checker.returncode, checker.stdout[-4000:] + checker.stderr[-1000:]


@pytest.mark.parametrize("module", MODULES)
def test_the_program_uses_every_public_name(module):
    """A new public name is typed by use."""
    nodes = list(ast.walk(ast.parse(PROGRAM.read_text())))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert public_names(importlib.import_module(module)) <= used


def public_names(module):
    """Return the names in ``__all__``, or those that are imported as themselves: exports too."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    body = ast.parse(Path(module.__file__).read_text()).body
    names = [name for node in body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert all(name.asname == name.name for name in names) and names
    return {name.name for name in names}


def test_mypy_finds_no_error():
    """The program names errors that mypy must find: an ignore without an error is an error."""
    build = ("setup.py", "build_backend.py", "build_steps.py", "build_cuda.py", "build_wheels.py")
    code, output = run_checker("mypy", "realign_fast", *build, str(PROGRAM))
    assert code == 0, output


def test_pyright_finds_no_error_in_the_program():
    code, output = run_checker("pyright", "--pythonpath", sys.executable, str(PROGRAM))
    assert code == 0, output
