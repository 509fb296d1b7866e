"""The chooser among the backends of a GPU: order, verdicts, smoke tests, overrides, one choice."""

import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from support import programs

from realign_fast.ops import OPS, backend_of, chosen_backends, dispatch, reference
from realign_fast.ops.chooser import VARIABLE, Chooser, key_of, path_of, verdict_of

CPU, ROWS = torch.device("cpu"), torch.tensor([[3.0, 4.0], [0.0, 2.0]])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    verdict_of.cache_clear()
    yield
    verdict_of.cache_clear()


def backend(factor=1.0, called=None):
    """A backend whose sums are multiplied by a factor; ``called`` collects its calls."""

    def sum_rows(*arguments):
        if called is not None:
            called.append(len(arguments[0]))
        total, energy, counts = reference.sum_rows(*arguments)
        return total * factor, energy, counts

    return SimpleNamespace(sum_rows=sum_rows)


def chooser(**backends):
    return Chooser({**backends, "reference": reference})


def keep_verdict(**faults):
    """Write the verdict of a check in which backends have faults, "" for a right one."""
    key = key_of(CPU)
    path_of(key).parent.mkdir()
    ops = {"sum_rows": faults}
    path_of(key).write_text(json.dumps({"key": key, "date": "2026-11-30", "ops": ops}))


def total(chooser):
    return chooser.call("sum_rows", ROWS, None, None, None, False)[0].tolist()


def test_the_best_backend_answers_after_one_smoke_test():
    called = []
    choosing = chooser(triton=backend(called=called))
    assert total(choosing) == [3, 6]
    tested = len(called)
    assert total(choosing) == [3, 6] and len(called) == tested + 1 > 3
    assert choosing.choose("sum_rows", -1) == ("triton", "it passed the smoke test")


@pytest.mark.parametrize("factor", (1.01, float("nan")))
def test_a_wrong_backend_is_named_once_and_replaced(factor):
    choosing = chooser(triton=backend(factor))
    with pytest.warns(
        RuntimeWarning, match="triton is disabled, sum_rows: float16, D = 65"
    ) as seen:
        assert total(choosing) == total(choosing) == [3, 6]
    assert len(seen) == 1
    name, why = choosing.choose("sum_rows", -1)
    assert name == "reference" and "not triton: sum_rows: float16, D = 65" in why


def test_a_backend_that_raises_is_replaced():
    choosing = chooser(triton=SimpleNamespace(sum_rows=lambda *_: 1 / 0))
    with pytest.warns(RuntimeWarning, match="disabled, sum_rows: ZeroDivisionError: division by"):
        assert total(choosing) == [3, 6]


def test_one_that_is_not_there_is_passed_over_without_another_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = chooser(triton="torch sees no GPU").choose("sum_rows", -1)
    assert choice == ("reference", "plain torch; not triton: torch sees no GPU")


def test_a_verdict_stands_for_the_smoke_test():
    called = []
    keep_verdict(first="error 1e-3", second="")
    choosing = chooser(first=backend(called=called), second=backend(2.0))
    with pytest.warns(RuntimeWarning, match="first is disabled, sum_rows: error 1e-3"):
        assert total(choosing) == [6, 12]  # (so nothing was tested again)
    why = "found right by the check of 2026-11-30; not first: sum_rows: error 1e-3"
    assert choosing.choose("sum_rows", -1) == ("second", why) and not called


def test_a_verdict_that_comes_later_changes_nothing_in_this_process():
    choosing = chooser(triton=backend())
    assert choosing.choose("sum_rows", -1).kernel == "triton"
    keep_verdict(triton="error 1e-3")
    assert choosing.choose("sum_rows", -1).kernel == "triton"
    assert chooser(triton=backend()).choose("sum_rows", -1).kernel == "triton"


def test_where_every_backend_is_wrong_no_result_is_given():
    keep_verdict(triton="error 1e-3", reference="error 2e-3")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(
            RuntimeError, match=f"no backend is left for sum_rows.*2e-3; run .*{VARIABLE}"
        ),
    ):
        total(chooser(triton=backend()))


def test_nothing_is_tested_without_leave_and_nothing_is_decided():
    called = []
    choosing = chooser(triton=backend(2.0, called))
    name, why = choosing.choose("sum_rows", -1, test=False)
    assert name == "triton" and "not tested yet" in why and not called
    with pytest.warns(RuntimeWarning, match="triton is disabled"):
        assert choosing.choose("sum_rows", -1).kernel == "reference"


def test_a_capture_is_no_place_for_a_test(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    called, rows = [], SimpleNamespace(get_device=lambda: 0)
    chooser(triton=SimpleNamespace(sum_rows=called.append)).call("sum_rows", rows)
    assert called == [rows]


def test_the_environment_overrides_a_verdict(monkeypatch):
    keep_verdict(triton="error 1e-3")
    monkeypatch.setenv(VARIABLE, "triton")
    choosing = chooser(triton=backend(2.0))
    assert total(choosing) == [6, 12]
    assert choosing.choose("sum_rows", -1) == ("triton", f"{VARIABLE}=triton")
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="not cuda: no nvcc"):
        total(chooser(cuda="no nvcc", triton=backend()))


def test_a_worker_keeps_the_choice_of_its_run():
    choosing = chooser(first=backend(), second=backend(2.0))
    keep_verdict(first="", second="")
    choosing.keep({"sum_rows": "second"})
    assert total(choosing) == [6, 12]
    choosing.keep({"sum_rows": "first"})
    assert total(choosing) == [3, 6]


def test_a_worker_whose_own_verdict_is_against_the_choice_refuses():
    keep_verdict(first="error 1e-3", second="")
    choosing = chooser(first=backend(), second=backend())
    choosing.keep({"sum_rows": "first"})
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="no backend is left"):
        total(choosing)


@pytest.mark.parametrize(("capability", "kernel"), [((9, 0), "cuda"), ((7, 5), "reference")])
def test_a_gpu_without_code_is_gated(monkeypatch, capability, kernel):
    major, minor = capability
    properties = SimpleNamespace(name="a GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("realign_fast.ops.chooser.build_info", lambda: {"cuda_archs": "80 90"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        choices = {Chooser({"cuda": backend(), "reference": reference}).choose(op, 0, test=False)
                   for op in OPS}  # fmt: skip
    (choice,) = choices
    assert choice.kernel == kernel
    text = "cuda is disabled, it is compiled for sm_80, sm_90, and a GPU here is sm_75"
    assert [text in str(warning.message) for warning in seen] == [True] * (kernel == "reference")


def run(code, **environment):
    ran = programs.run("-c", code, env=os.environ | environment)
    return ran.stdout, ran.stderr


SHOW = """
import torch
from realign_fast import ops
for device in ("cpu", "cuda"):
    print(*ops.backend_of("sum_rows", device), sep="|")
print(ops.sum_rows(torch.ones(2, 3)).counts.tolist(), ops.chosen_backends("cpu"))
"""


def test_the_environment_chooses_from_the_start():
    printed, warned = run(SHOW, **{VARIABLE: "reference"})
    cpu, cuda, sums = printed.splitlines()
    assert cpu == f"reference|plain torch: {VARIABLE}=reference"
    assert cuda == f"reference|{VARIABLE}=reference" and sums == "[2, 0, 0] {}"
    assert warned.count(f"runs on plain torch: {VARIABLE}=reference") == 1
    printed, warned = run(SHOW, **{VARIABLE: "cuda"})
    assert warned.count(f"{VARIABLE}=cuda chooses for GPUs") == 1
    _, warned = run(SHOW, **{VARIABLE: "cudda"})
    assert f"{VARIABLE}: expected cuda, triton, reference or cpu, got 'cudda'" in warned


def test_the_chooser_stands_before_the_kernels_of_gpus_alone():
    answers = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(answers(f"realign_fast::{op}", "CUDA") for op in OPS)
    assert backend_of("sum_rows", "cuda").kernel in dispatch.CHOOSER.backends
    assert chosen_backends("cpu") == {}
    dumped = torch._C._dispatch_dump("realign_fast::sum_rows")
    (cpu,) = (line for line in dumped.splitlines() if line.startswith("CPU"))
    assert dispatch.HAS_CPU_KERNELS == ("sum_rows.cpp" in cpu)


def test_the_compiled_cuda_kernels_are_behind_the_chooser():
    """Without a GPU they can be called all the same; they refuse rows on the CPU."""
    compiled = dispatch.CHOOSER.backends["cuda"]
    if isinstance(compiled, str):
        pytest.skip(compiled)
    with pytest.raises(RuntimeError, match=r"device|CUDA"):
        compiled.sum_rows(ROWS, None, None, None, True)
