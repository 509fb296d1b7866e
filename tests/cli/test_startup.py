"""The start of a process: what is imported, and how OpenMP waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import programs

import realign_fast

SLOW = {"torch._dynamo", "pyarrow", "transformers", "matplotlib", "ray", "sklearn", "fsspec"}


def answer(*command: str, with_torch: bool = False, **environment: str):
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if with_torch:
        done = programs.run(*command, env=clean | environment)
    else:
        done = subprocess.run(
            [sys.executable, *command], env=clean | environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BASE = {"numpy", "pydantic", "safetensors", "torch", "tqdm"}
LISTED = {*BASE, *SLOW, "rich", "PIL", "open_clip", "pydantic"} - {"torch._dynamo"}
IMPORTS = """
import json, sys
sys.orig_argv[:] = [sys.executable, "-m", "realign_fast"]
from realign_fast.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
status = open("/proc/self/status").read()  # getrusage counts the parent's memory before exec
memory = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([[*sys.modules], memory]))
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version"], set()),
        (["--help"], {"rich"}),
        (["align", "--help"], {"pydantic", "rich"}),
        (["info", "--quiet"], BASE - {"safetensors"}),
        (["inspect", "rows.npy", "--quiet"], BASE),
        (["convert", "rows.npy", "out", "--to", "npy", "--quiet"], BASE),
        (["align", "--text", "rows.npy", "--image", "rows.npy", "--out", "o", "--quiet"], BASE),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs(tmp_path, monkeypatch, arguments, expected):
    """torch._dynamo alone takes longer than torch itself."""
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", np.random.default_rng(0).standard_normal((9, 4)).astype("f4"))
    monkeypatch.setenv("PYTHONPATH", str(Path(realign_fast.__file__).parents[1]))
    modules, megabytes = answer("-c", IMPORTS, *arguments, with_torch="torch" in expected)
    assert LISTED & set(modules) <= expected and "torch._dynamo" not in modules
    assert megabytes <= 60 or "torch" in expected


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


def test_too_little_memory_for_torch_is_one_error():
    root = str(Path(realign_fast.__file__).parents[1])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 300000; {sys.executable} -m realign_fast info --json"],
        env=os.environ | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] == 8
    assert done.stderr == f"realign-fast: error: {error['message']}\n"
