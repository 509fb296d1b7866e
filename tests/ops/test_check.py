"""``realign-fast check``: right and wrong backends in processes of their own, and the verdict.

The backends are the compiled CPU kernels, the CUDA kernels on the machine for PTX, the Triton
kernels in the interpreter, and wrong ones. test_chooser.py tests what is done with a verdict.
"""

import importlib
import json
import os
import signal
import time
from contextlib import nullcontext
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from support import ptx_machine
from support.op_checks import require_compiled

from realign_fast import device_check
from realign_fast.cli.main import main
from realign_fast.ops import DTYPES, OPS, reference
from realign_fast.ops.chooser import key_of, path_of, verdict_of
from realign_fast.ops.trials import trials

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """A cache of its own, and processes that begin with torch."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    monkeypatch.setattr(device_check, "CONTEXT", context)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verdict_of.cache_clear()
    yield
    verdict_of.cache_clear()
    assert signal.alarm(0) == 0  # it would end this process within later tests


class Right:
    sum_rows = staticmethod(reference.sum_rows)


class Off:
    """Sums that are off by a thousandth of a row."""

    @staticmethod
    def sum_rows(*arguments):
        total, energy, counts = reference.sum_rows(*arguments)
        return total + 1e-3, energy, counts


class OffLater:
    """Sums that are right at first."""

    calls = 0

    @classmethod
    def sum_rows(cls, *arguments):
        total, energy, counts = reference.sum_rows(*arguments)
        cls.calls += 1
        return total, energy * (1 + 1e-15 * (cls.calls % 2 == 0)), counts


class Unwritten:
    """A map that leaves the last row as it was."""

    @staticmethod
    def align_rows_(out, rows, *row_map):
        reference.align_rows_(out[:-1], rows[:-1], *row_map)


class Raises:
    @staticmethod
    def sum_rows(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


class Aborts:
    @staticmethod
    def sum_rows(*arguments):
        os.abort()


class Hangs:
    @staticmethod
    def sum_rows(*arguments):
        time.sleep(600)


def test_a_backend_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(device_check, "LIMIT_SECONDS", 1)
    fault = device_check._apart(device_check._try, Hangs, "sum_rows", CPU, [5])
    assert fault == "the process died, or took 1 seconds"


def test_wrong_backends_are_named_and_right_ones_are_timed():
    planted = {kind.__name__: kind for kind in (Right, Off, OffLater, Raises, Aborts)}
    facts = device_check.check(CPU, planted, ("sum_rows",), (1, 5))
    faults = {**facts["ops"]["sum_rows"]}
    assert faults.pop("Right") == ""
    assert "float16, D = 1, directions: 1 of 1 entries are off by up to 1.0e-03" in faults["Off"]
    assert faults["OffLater"].endswith("other bytes in a second run")
    assert faults["Raises"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert faults["Aborts"] == "the process died, or took 300 seconds"
    assert set(facts["rates"]["sum_rows"]) == {"Right", "copy", "product"}
    assert min(facts["rates"]["sum_rows"].values()) > 0
    assert facts["faults"] == [f"sum_rows of {name}: {fault}" for name, fault in faults.items()]
    table = device_check.table_of(facts)
    assert table.count("WRONG") == 4 and all(fault in table for fault in faults.values())
    assert verdict_of(CPU) == facts == json.loads(path_of(key_of(CPU)).read_bytes())


def test_an_entry_that_is_not_written_is_a_fault():
    with pytest.raises(AssertionError, match="off by up to inf"):
        device_check._try(Unwritten, "align_rows_", CPU, [7])


def test_the_backends_of_the_cpu_are_right_in_every_op():
    require_compiled()
    for name in ("cpu", "reference"):
        for op in OPS:
            device_check._try(name, op, CPU, [65])


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_digit_anywhere_is_seen(op):
    """Every result of every trial is moved by four times what is allowed, in one entry."""
    for dtype in DTYPES:
        for trial in trials(op, dtype, DTYPES, 6, CPU):
            for place, truth in enumerate(trial.truth):
                results = [tensor.clone() for tensor in trial.truth]
                trial.check(results)
                allowed = trial.relative_error * truth.abs() + trial.absolute_error
                flat = results[place].reshape(-1)
                entry = int(flat.isfinite().nonzero()[-1])
                flat[entry] += 4 * allowed.reshape(-1)[entry]
                with pytest.raises(AssertionError, match="1 of"):
                    trial.check(results)


class Ptx:
    """The CUDA kernels on the machine for PTX, which is built where it is unpickled."""

    def __reduce__(self):
        return ptx_machine.load, ()


class Triton:
    """The Triton kernels in the interpreter, where ``TRITON_INTERPRET`` is set."""

    def __reduce__(self):
        return interpreted, ()


def interpreted():
    importlib.import_module("support.triton_interpreter")
    return importlib.import_module("realign_fast.ops.triton_ops")


@pytest.mark.skipif(bool(ptx_machine.why_not()), reason=ptx_machine.why_not())
def test_the_cuda_kernels_on_the_machine_for_ptx():
    assert device_check._apart(device_check._try, Ptx(), "sum_rows", CPU, [1]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU that is here")
def test_the_triton_kernels_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device_check, "CONTEXT", get_context("spawn"))
    assert device_check._apart(device_check._try, Triton(), "sum_rows", CPU, [1]) is None


class Graph:
    """A graph whose replay computes its results again, or not."""

    computes, results = True, ()

    def replay(self):
        for tensor in self.results if self.computes else ():
            tensor.fill_(7)


@pytest.mark.parametrize(("computes", "late"), [(True, True), (False, True), (True, False)])
def test_a_side_stream_and_a_graph(monkeypatch, computes, late):
    """Fake streams: what is on another stream runs before the rows come, so it reads NaN."""
    graph, seen = Graph(), []
    graph.computes = computes
    fakes = {"Stream": lambda: "side", "stream": lambda _: nullcontext(), "_sleep": seen.append}
    fakes |= {"synchronize": lambda: None, "CUDAGraph": lambda: graph}
    for name, fake in {**fakes, "graph": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    stale = torch.full((3, 2), torch.nan)

    class Rows(torch.Tensor):
        is_cuda = True

    def run(self, function, rows=None):
        results = [torch.full((3,), 7.0)]
        if rows is not None and (not late or bool(rows.isnan().any())):
            results = [stale[:, 0].clone()]
        graph.results = results
        return results

    monkeypatch.setattr(device_check.Trial, "run", run)
    trial = device_check.Trial("", torch.ones(3, 2).as_subclass(Rows), [], [])
    ways = {way: again[0].tolist() for way, again in device_check._repeats(trial, print, [])}
    right = [7.0] * 3
    assert ways["a second run"] == right and seen == [10_000_000]
    assert (ways["a run on a side stream"] == right) == late
    assert (ways["a graph"] == right) == computes


@pytest.mark.filterwarnings("ignore:whiten")
def test_algebra_that_is_off_is_a_fault(monkeypatch):
    device_check._try_algebra(CPU)
    eigh, calls = torch.linalg.eigh, []

    def off(matrix):
        calls.append(matrix)
        values, vectors = eigh(matrix)
        return values * (1 + 1e-6 * (len(calls) == 1)), vectors

    monkeypatch.setattr(torch.linalg, "eigh", off)
    with pytest.raises(AssertionError, match="not close"):
        device_check._try_algebra(CPU)


@pytest.mark.parametrize("fault", ("", "float16, D = 1: off"))
def test_the_command(monkeypatch, capsys, fault):
    def check(device):
        facts = {"key": key_of(device), "date": "2026-11-30", "rates": {}}
        facts["ops"] = {op: {"cpu": fault} for op in OPS}
        facts["faults"] = [f"{op} of cpu: {fault}" for op in OPS if fault]
        path_of(facts["key"]).parent.mkdir()
        path_of(facts["key"]).write_text(json.dumps(facts))
        return facts

    monkeypatch.setattr(device_check, "check", check)
    assert main(["info"]) == 0
    assert "cpu: none (realign-fast check)" in capsys.readouterr().out
    verdict_of.cache_clear()
    assert main(["check", "--device", "cpu", "--json"]) == (1 if fault else 0)
    assert json.loads(capsys.readouterr().out)["ops"]["sum_rows"]["cpu"] == fault
    assert main(["info"]) == 0
    said = f"sum_rows of cpu: {fault}" if fault else "2026-11-30, every result was right"
    assert said in capsys.readouterr().out


DAMAGED = {
    "cut off": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: b"\xff\x00",
    "a list": lambda text: b"[]",
    "another device": lambda text: text.replace(b'"device": "', b'"device": "not '),
    "nothing": lambda text: b"",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_verdict_is_ignored_with_one_warning(kind):
    path = path_of(key_of(CPU))
    path.parent.mkdir()
    text = json.dumps({"key": key_of(CPU), "date": "2026-11-30", "ops": {}}).encode()
    path.write_bytes(DAMAGED[kind](text))
    with pytest.warns(RuntimeWarning, match=r"check-\w+.json: .*run `realign-fast check` again"):
        assert verdict_of(CPU) == {"date": "", "ops": {}, "faults": []}
    assert verdict_of(CPU)["ops"] == {}  # without another warning


def test_a_verdict_is_of_one_device_and_program(monkeypatch):
    key = key_of(CPU)
    assert set(key) == {"device", "capability", "driver", "torch", "triton", "code"}
    properties = SimpleNamespace(name="NVIDIA T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = key_of(torch.device("cuda", 0))
    assert (gpu["device"], gpu["capability"]) == ("NVIDIA T4", "7.5")
    assert path_of(gpu) != path_of(key) == path_of(dict(key))
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert path_of(key_of(CPU)) != path_of(key)
