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

SLOW = {
    "torch._dynamo",
    "sympy",
    "pyarrow",
    "transformers",
    "matplotlib",
    "ray",
    "sklearn",
    "fsspec",
}


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
LISTED = {*BASE, *SLOW, "rich", "PIL", "open_clip", "scipy", "faiss", "triton"}
IMPORTS = """
import json, sys
sys.orig_argv[:] = [sys.executable, "-m", "realign_fast"]
before, found = len(sys.modules), {}
from realign_fast.cli.main import main
for command in json.loads(sys.argv[1]):
    try:
        status = main(command.split())
    except SystemExit as done:
        status = done.code
    found[command] = [*sys.modules], len(sys.modules) - before, status
status = open("/proc/self/status").read()  # getrusage counts the parent's memory before exec
memory = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([found, memory]))
"""
SIDES = "--text text.npy --image image.npy"
COMMANDS = [
    "info",
    "convert text.npy converted --to npy",
    f"align {SIDES} --out aligned --dry-run",
    f"align {SIDES} --out aligned",
    f"fit {SIDES} --out fitted",
    "apply --aligner fitted --text text.npy --out applied",
    "verify aligned",
    f"unify {SIDES} --out unified",
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("--version", set()), ("--help", {"rich"}), ("align --help", {"pydantic", "rich"})],
)
def test_help_imports_no_torch(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.setenv("PYTHONPATH", str(Path(realign_fast.__file__).parents[1]))
    found, megabytes = answer("-c", IMPORTS, json.dumps([arguments]))
    modules, _, status = found[arguments]
    assert LISTED & set(modules) <= expected
    assert megabytes <= 60 and status == 0


def test_a_command_imports_what_it_needs(tmp_path, monkeypatch):
    """Commands in one process, after the 1,200 modules of torch: each may import those of BASE."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("text", "image")):
        np.save(f"{side}.npy", np.random.default_rng(seed).standard_normal((40, 4), "f4"))
    monkeypatch.setenv("PYTHONPATH", str(Path(realign_fast.__file__).parents[1]))
    quiet = [f"{command} --quiet" for command in COMMANDS]
    found, _ = answer("-c", IMPORTS, json.dumps(quiet), with_torch=True)
    for command, (modules, count, status) in found.items():
        assert (status, LISTED & set(modules) - BASE) == (0, set()), command
        assert count <= 250, command


END = """
import atexit, sys
{earlier}
from realign_fast import _startup
class Kept:
    def __del__(self):
        print("freed")
kept = Kept()
atexit.register(print, "later")
sys.stdout.write("begun ")
_startup.exit_status.append(5)
sys.exit(5)
"""


@pytest.mark.parametrize(
    ("earlier", "printed"),
    [("", "begun later\n"), ("atexit.register(print, 'first')", "begun later\nfirst\nfreed\n")],
)
def test_our_command_ends_without_freeing_its_objects(tmp_path, monkeypatch, earlier, printed):
    """Unless something was to be done after us, such as the report of a profiler."""
    monkeypatch.setenv("PYTHONPATH", str(Path(realign_fast.__file__).parents[1]))
    (script := tmp_path / "realign-fast").write_text(END.format(earlier=earlier))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (5, printed, "")


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
