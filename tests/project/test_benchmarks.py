"""The benchmark suite itself: wrong results have no speed, missing peers are named."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import inputs, memory, records, table, timing
from peers import covariance, four_pass_numpy, packages, row_ops
from support import programs
from support.benchmark_parts import F32, few_rounds, make_case, sleeping  # noqa: F401

BENCHMARKS = Path(timing.__file__).parents[1]


@pytest.mark.parametrize("wrong", [1.2, math.nan])
def test_a_wrong_result_has_no_speed(wrong):
    case = make_case(ours=lambda _: wrong)
    with pytest.raises(timing.ParityError, match="off float64"):
        case.run()
    (line,) = records.case_lines(case)
    assert "NO SPEED" in line and "rows/s" not in line and " ms" not in line
    assert records.summary(case)["candidates"] == []
    assert not any(one.seconds for one in case.candidates.values())


def test_every_result_is_checked_and_not_only_the_first():
    results = iter([1.0, 1.01, 1.02, 1.05, 1.2])  # two of the check, then three rounds
    case = make_case(ours=lambda _: next(results))
    with pytest.raises(timing.ParityError, match=r"op is off float64 by 2\.0e-01"):
        case.run()
    assert "NO SPEED" in records.case_lines(case)[0]
    assert case.candidates["op"].error == pytest.approx(0.2)


def test_a_buffer_that_is_not_written_again_is_found():
    buffer, calls = torch.empty(1), iter(range(9))

    def lazy(_: object) -> torch.Tensor:
        return buffer.fill_(1.0) if next(calls) < 3 else buffer

    with pytest.raises(timing.ParityError, match="off float64 by nan"):
        make_case(ours=lazy).run()


def test_a_wrong_variant_of_ours_has_no_speed_either():
    case = make_case()
    case.add("ours, another way", lambda _: 1.2, "variant")
    with pytest.raises(timing.ParityError, match="ours, another way is off float64"):
        case.run()
    assert "NO SPEED" in records.case_lines(case)[0]
    case = make_case()
    case.add("rough", lambda _: 1.2, "variant", tolerance=0.5)
    assert case.run().seconds("rough") > 0


def test_an_inexact_peer_keeps_its_speed_and_shows_its_error():
    case = make_case(peer=lambda _: 3.0).run()
    (line,) = (line for line in records.case_lines(case) if line.startswith("  peer"))
    assert "error 2.0e+00" in line and "rows/s" in line


def test_a_peer_that_fails_is_named_as_missing():
    def broken(_: object) -> float:
        raise RuntimeError("no kernel image")

    case = make_case(peer=broken).run()
    assert records.case_lines(case)[-1] == "  missing: peer (RuntimeError: no kernel image)"
    with pytest.raises(RuntimeError, match="no kernel image"):
        make_case(ours=broken).run()


def test_a_peer_that_is_not_installed_is_named_as_missing(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("raise RuntimeError('wants another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    given = {
        "here": ("numpy", "numpy", len),
        "absent": ("no-such", "no_such_package", len),
        "broken": ("breaks", "breaks_on_import", len),
    }
    found, missing = packages.installed(given)
    assert found == {f"here (numpy {np.__version__})": len}
    assert missing == ["absent (no-such: not installed)", "broken (breaks: wants another torch)"]


def test_rounds_take_turns_and_slow_peers_take_few(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 6)
    monkeypatch.setattr(timing, "SECONDS", 0.1)
    order: list[str] = []
    case = make_case(peer=sleeping(0.05))
    case.add("other", lambda _: 1.0)
    case.check()
    for name, one in case.candidates.items():
        call = one.call
        one.call = lambda x, call=call, name=name: (order.append(name), call(x))[1]
    case.run()
    assert [len(one.seconds) for one in case.candidates.values()] == [6, 6, 3, 6]
    assert order[:4] == ["copy", "peer", "other", "op"] and order[4:7] == ["peer", "other", "copy"]
    assert case.ratio("op", "peer") > 10


def test_cold_buffers_are_larger_than_the_cache_together(monkeypatch):
    monkeypatch.setattr(inputs, "BUFFER_BYTES", 1 << 20)
    rows = inputs.random_rows(torch.float16, 64, 1024)
    cold, warm = inputs.Rotation(rows), inputs.Rotation(rows, "warm")
    places = {cold().data_ptr() for _ in range(20)}
    assert len(places) * rows.nbytes == 1 << 20
    assert {warm().data_ptr() for _ in range(3)} == {rows.data_ptr()}
    assert all(torch.equal(cold(), rows) for _ in range(8))
    assert inputs.last_level_cache() >= 1 << 15


def test_the_table_has_every_op_and_no_case_twice():
    ops = {line.op for line in table.TABLE}
    assert {"sum_rows", "align_rows", "add_scatter_", "map_rows", "whitening"} <= ops
    assert {"align", "training_step"} <= ops
    assert len({line[:7] for line in table.TABLE}) == len(table.TABLE)
    for op in ops:
        assert (BENCHMARKS / f"bench_{op.rstrip('_')}.py").exists() or any(
            f'table.of("{op}"' in path.read_text() for path in BENCHMARKS.glob("bench_*.py")
        )


@pytest.mark.skipif(not memory.known(), reason="the system tells no peak memory")
def test_peak_memory_is_what_a_call_takes():
    assert memory.peak(lambda: np.ones(16 << 20)) >= 120 << 20
    assert memory.peak(lambda: None) < 8 << 20
    assert memory.available() > 1 << 20


def test_peers_of_rows_compute_what_ours_does(monkeypatch):
    monkeypatch.setattr(packages, "COMPILE", False)
    rows = inputs.random_rows(F32, 96, 1200)
    shift = inputs.random_map(96)
    matrix = torch.eye(96, dtype=torch.float64).roll(1, 0), *shift[1:]
    out = torch.empty_like(rows)
    for row_map in (shift, matrix):
        found, missing = row_ops.of_align_rows(row_map, lambda: out, F32, "cpu", True)
        assert len(found) == 2 and len(missing) == 2
        for call in found.values():
            out.fill_(math.nan)
            assert row_ops.align_rows_error(rows, row_map, call(rows)) < 4e-6
    truth = torch.nn.functional.normalize(rows.double(), dim=1).sum(dim=0)
    found, _ = row_ops.of_sum_rows(F32, "cpu", False)
    assert len(found) == 2
    for call in found.values():
        assert float((call(rows) - truth).abs().max()) < 1e-4
    out[5] += 0.1
    assert row_ops.align_rows_error(rows, matrix, out) > 0.01


def test_peers_of_the_covariance_compute_it():
    rows = inputs.random_rows(F32, 30, 500)
    truth = np.cov(rows.double().numpy(), rowvar=False, bias=True)
    found, missing = covariance.installed()
    assert len(found) + len(missing) == 11 and len(found) >= 3
    for name, call in found.items():
        error = np.linalg.norm(np.asarray(call(rows)) - truth) / np.linalg.norm(truth)
        assert error < 1e-3, name


def test_the_four_passes_do_what_align_does(tmp_path):
    import bench_pipeline

    from realign_fast.pipeline.align_run import align

    rows = inputs.random_rows(torch.float16, 32, 600)
    bench_pipeline.write_side(tmp_path / "text", rows.roll(1, 1), 3)
    bench_pipeline.write_side(tmp_path / "image", rows[:200].roll(5, 1), 1)
    sides = tmp_path / "text", tmp_path / "image"
    count, passes = four_pass_numpy.align(*sides, tmp_path / "theirs")
    align(*sides, tmp_path / "ours")
    assert count == 600 and list(passes) == ["means", "traces", "drift", "apply"]
    assert bench_pipeline.error_of(tmp_path / "ours", tmp_path / "theirs") <= 2**-10
    assert bench_pipeline.error_of(tmp_path / "text", tmp_path / "theirs") > 0.01


WRONG = """
import torch
from harness import timing
def _case(ours):
    case = timing.Case("wrong_op", torch.float32, 4, 4, 64, 64, "bytes", abs, 0.1)
    case.add("wrong_op", lambda _: ours, "ours")
    case.add("copy", lambda _: None, "ceiling")
    return case
def bench_wrong(measure):
    measure(_case(5.0))
def bench_right(measure):
    measure(_case(0.0))
"""


def test_pytest_fails_prints_and_writes(tmp_path):
    """The suite's own conftest in a run of its own: one case is wrong, one right."""
    copied = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, copied, ignore=shutil.ignore_patterns("bench_*", "__pycache__"))
    (copied / "bench_wrong.py").write_text(WRONG)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_files = bench_*.py\npython_functions = bench_*"
    )
    words = ["-m", "pytest", "benchmarks", "--results", "found.json", "--rounds", "2"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, and so takes this run for one.
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment = own | {"PYTHONPATH": str(BENCHMARKS.parent)}
    ran = programs.run(*words, "-p", "no:cacheprovider", cwd=tmp_path, env=environment)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.lstrip().startswith("wrong_op")]
    refused = [line for line in lines if "NO SPEED" in line]
    assert len(refused) == 1 and "rows/s" not in refused[0]
    assert sum("rows/s" in line for line in lines) == 1
    assert "1 failed, 1 passed" in ran.stdout
    wrong, right = json.loads((tmp_path / "found.json").read_text())["results"]
    assert wrong["candidates"] == [] and "off float64" in wrong["failed"]
    assert len(right["candidates"][0]["all_seconds"]) == 2
    words = [*words[:3], "--compare", "found.json", "-k", "right"]
    again = programs.run(*words, cwd=tmp_path, env=environment)
    assert "ratios are where they were" in again.stdout and again.returncode == 0
