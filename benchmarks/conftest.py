"""Collects the cases' tables, prints them at the end and writes them with machine and date."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path

import pytest
import timing
import torch

from realign_fast import __version__, ops

CASES: list[timing.Case] = []


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write every case to this json file")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(timing.THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def table():
    """Call it with a finished case to have it printed and written."""
    return CASES.append


def _machine() -> dict[str, object]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    return {
        "processor": name,
        "isa": ops.cpu_isa(),
        "threads": timing.THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "realign_fast": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def pytest_terminal_summary(terminalreporter, config):
    if not CASES:
        return
    machine = _machine()
    terminalreporter.section("realign_fast: medians over interleaved rounds")
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in machine.items()))
    for case in CASES:
        for line in case.lines():
            terminalreporter.write_line(line)
    if path := config.getoption("--results"):
        path.parent.mkdir(parents=True, exist_ok=True)
        cases = [case.summary() for case in CASES]
        path.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
