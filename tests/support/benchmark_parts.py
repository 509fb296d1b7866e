"""What the tests of the benchmark suite share: a case of numbers, calls that take a known time."""

from __future__ import annotations

import time

import pytest
import torch
from harness import timing

F32 = torch.float32


def make_case(ours=lambda _: 1.0, peer=lambda _: 1.0, **changes) -> timing.Case:
    """A case whose results are numbers and whose truth is 1."""
    facts = {"op": "op", "dtype": F32, "dimension": 2, "rows": 3, "bytes": 24, "flops": 6}
    facts |= {"limit": "bytes", "error_of": lambda found: abs(found - 1), "tolerance": 0.1}
    case = timing.Case(**facts | changes)
    case.add("op", ours, "ours")
    case.add("copy", lambda _: None, "ceiling")
    case.add("peer", peer)
    return case


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)


def sleeping(seconds: float):
    def call(_: object) -> float:
        time.sleep(seconds)
        return 1.0

    return call
