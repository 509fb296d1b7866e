"""gpu_check.py where there is no GPU: how it runs tests and keeps results, and its dry run."""

import json
import time
import types
from pathlib import Path

import gpu_check
import pytest
import torch
from support import programs

SCRIPT = Path(gpu_check.__file__)
TESTS = """
import os, time
import pytest

@pytest.fixture(params=["toy", "other"])
def kernel(request):
    return request.param

@pytest.mark.parametrize("number", range(4))
def test_is_right(kernel, number):
    assert kernel == "toy", "a test of another kernel was selected"

def test_is_off(kernel):
    error = 2e-6
    assert error <= 1e-6, f"error {error:.1e}, allowed 1e-06"

def test_dies(kernel):
    os.abort()

def test_loses_the_gpu(kernel):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_is_skipped(kernel):
    pytest.skip("not here")

@pytest.mark.parametrize("number", range(4, 8))
def test_is_right_afterwards(kernel, number):
    pass
"""


def run_toy_tests(tmp_path, monkeypatch, text, seconds):
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    monkeypatch.setattr(gpu_check, "PROCESSES", 2)
    file = tmp_path / "test_toy.py"
    file.write_text(text)
    gpu_check.run_tests("toy", [str(file)], gpu_check.Record("toy"), time.monotonic() + seconds)
    facts = json.loads((tmp_path / "gpu_check_toy.json").read_text())
    return facts, {line["test"].split("::")[1]: line for line in facts["tests"]}


def test_each_failure_is_kept_and_no_later_test_is_lost(tmp_path, monkeypatch, capsys):
    facts, tests = run_toy_tests(tmp_path, monkeypatch, TESTS, seconds=120)
    assert facts["finished"] and facts["restarts"] == 2
    assert facts["outcomes"] == {"passed": 8, "failed": 3, "skipped": 1}
    whys = {name: line["why"] for name, line in tests.items() if line["outcome"] == "failed"}
    assert "error 2.0e-06, allowed 1e-06" in whys["test_is_off[toy]"]
    assert whys["test_dies[toy]"] == "the process died in this test"
    assert "CUDA error: an illegal memory" in whys["test_loses_the_gpu[toy]"]
    printed = capsys.readouterr().out
    for name in whys:
        assert printed.count(f"::{name}: ") == 1


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path, monkeypatch):
    """Its time ends when one test has passed and another one, which takes minutes, has begun."""
    slow = TESTS.replace("os.abort()", "time.sleep(600)")
    begin, found = time.monotonic(), tmp_path / "gpu_check_toy.json"

    def clock():
        lines = json.loads(found.read_text()).get("tests", []) if found.exists() else []
        outcomes = {line["test"].split("::")[1]: line["outcome"] for line in lines}
        is_over = outcomes.get("test_dies[toy]") == "started" and "passed" in outcomes.values()
        return time.monotonic() + 1000 * is_over

    patched = types.SimpleNamespace(monotonic=clock, sleep=time.sleep, time=time.time)
    monkeypatch.setattr(gpu_check, "time", patched)
    facts, tests = run_toy_tests(tmp_path, monkeypatch, slow, seconds=60)
    assert time.monotonic() - begin < 60
    assert not facts["finished"]
    assert tests["test_dies[toy]"]["outcome"] == "started"
    assert "passed" in {line["outcome"] for line in tests.values()}


def test_unspent_time_goes_to_the_parts_that_follow():
    left, plan = 500.0, []
    for position in range(len(gpu_check.PARTS)):
        plan.append(gpu_check.most_seconds(position, left))
        left -= plan[-1]
    assert sum(plan) == pytest.approx(500) and left == pytest.approx(0)
    assert gpu_check.most_seconds(1, 495) > plan[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_names_the_parts_the_time_and_the_size(tmp_path):
    ran = programs.run(SCRIPT, "--limit", "500", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    skipped = [line.split()[1] for line in ran.stdout.splitlines() if "skipped:" in line]
    assert skipped == ["library", "cuda", "triton", "rates", "benchmarks"]
    (size,) = (line for line in ran.stdout.splitlines() if line.startswith("to carry: "))
    assert 1 < float(size.split()[2]) < 64
    assert not list(tmp_path.iterdir())
