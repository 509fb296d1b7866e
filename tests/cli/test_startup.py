"""The start of a process: what is imported, and how OpenMP waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import realign_fast

SLOW = {"torch._dynamo", "pyarrow", "transformers", "matplotlib", "ray", "sklearn", "fsspec"}


def answer(*command: str, **environment: str):
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, *command], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_command_line_imports_nothing_that_it_may_not_need():
    """torch._dynamo alone takes longer than torch itself."""
    code = "import json, sys, realign_fast.cli.main; print(json.dumps([*sys.modules]))"
    assert not SLOW & set(answer("-c", code))


SHOW = "import json, os, realign_fast; print(json.dumps(os.environ.get('OMP_WAIT_POLICY')))"


@pytest.mark.parametrize(("name", "expected"), [("realign-fast", "passive"), ("train.py", None)])
def test_openmp_waits_passively_in_our_command_alone(tmp_path, name, expected):
    script = tmp_path / name
    script.write_text(SHOW)
    assert answer(str(script)) == expected
    assert answer(str(script), OMP_WAIT_POLICY="active") == "active"


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """A stand-in for torch sends the signal while it is imported."""
    (tmp_path / "realign-fast").write_text("import realign_fast.align\n")
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    root = str(Path(realign_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "realign-fast")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "realign-fast: stopped before it began\n")
