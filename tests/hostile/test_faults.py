"""Calls of the system that fail on an output: a short form of ``hostile.faults``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hostile.faults import KINDS
from hostile.surroundings import CHANGES

ROOT = Path(__file__).parents[2]


def attack(*arguments, module="hostile.faults"):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    results = [line for line in lines if line.startswith("{")]
    assert results, done.stderr
    return json.loads(results[-1]), "\n".join(lines)


preloads = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a compiler"
)


@preloads
@pytest.mark.parametrize(
    "command, sites",
    [("align", "2"), pytest.param("unify", "60", marks=pytest.mark.slow)],
)
def test_failed_calls_leave_whole_shards_and_a_run_that_continues(command, sites):
    result, faults = attack("--command", command, "--sites", sites)
    assert not result["faults"], faults
    assert result["sites"] > 150 and result["tried"] == len(KINDS) * int(sites)


@preloads
def test_surroundings_that_change_leave_the_bytes_of_a_run_and_one_that_continues():
    _, said = attack("--sites", "2", module="hostile.surroundings")
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert not any(line.get("faults") for line in lines), said
    tried = {line["change"]: line["tried"] for line in lines}
    assert set(tried) == set(CHANGES)
    assert all(count == 2 for change, count in tried.items() if change != "a full disk"), said


@preloads
@pytest.mark.slow
def test_runs_that_fail_in_one_process_leave_neither_memory_nor_descriptors():
    result, faults = attack("--seconds", "150", module="hostile.soak")
    assert not result["faults"], faults
    assert result["rounds"] > 60 and result["failed_calls"] > 50
