"""A pytest plugin for gpu_check.py: it selects the tests of one kernel and writes each result.

PYTHONPATH=benchmarks pytest -p harness.gpu_plugin --gpu-kernel triton --gpu-results FILE
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

WHOLE_FILES = {"cuda": "test_cuda.py", "triton": "test_triton_kernels.py"}
CUDA_FAILED = 70  # exit code: the process ended itself because CUDA fails from here on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-kernel", help="select the tests of this kernel")
    parser.addoption("--gpu-share", default="0/1", help="K/N: every Nth test from the Kth on")
    parser.addoption("--gpu-results", type=Path, help="append lines of json for each test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(config.getoption("--gpu-results")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this process's share of the tests, without those that an earlier process ran."""
    kernel = config.getoption("--gpu-kernel")
    number, count = map(int, config.getoption("--gpu-share").split("/"))
    selected = [item for item in items if kernel in _kernels(item)]
    done = {line["test"] for line in read_lines(config.getoption("--gpu-results"))}
    items[:] = [item for item in selected[number::count] if item.nodeid not in done]


def _kernels(item: pytest.Item) -> list[str | None]:
    """Return the kernels that a test runs on."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    kernels = [parameters.get(name) for name in ("kernel", "compiled_kernel")]
    return kernels + [kernel for kernel, name in WHOLE_FILES.items() if item.path.name == name]


def read_lines(path: Path) -> list[dict]:
    """Return the last line that was written of each test; a line without an end is left out."""
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return list({line["test"]: line for line in lines}.values())


class Reporter:
    """Writes when each test starts and how it ends; the first error of CUDA ends the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for line in read_lines(path):
            if line["outcome"] == "started":
                self.write(line["test"], "failed", why="the process died in this test")

    def write(self, test: str, outcome: str, **facts: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome, **facts}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr or "")
        seconds = round(report.duration, 3)
        self.write(report.nodeid, report.outcome, why=why[:600], seconds=seconds)
        if report.failed and ("CUDA error" in why or "CUDA says" in why):
            os._exit(CUDA_FAILED)
