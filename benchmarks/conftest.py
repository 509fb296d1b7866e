"""Options and fixtures of the benchmarks, and the output at the end of a run.

pytest benchmarks/                                     # everything, the table, no file
pytest benchmarks/ --results mine.json                 # and a json and a csv, which are new files
pytest benchmarks/ --compare benchmarks/results/cpu.json   # ratios that changed beyond noise
pytest benchmarks/ --ci                                # CI's subset, against results/ci.json
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Threads that wait by spinning would take a core from the next candidate.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from harness import ci, records, timing
from peers import packages

FOUND: list[object] = []  # cases and other records, each with lines() and summary()
NOTES: list[str] = []  # printed at the end


class CaseRecord:
    """Final state of a case."""

    def __init__(self, case: timing.Case) -> None:
        self.lines = lambda: records.case_lines(case)
        self.summary = lambda: records.summary(case)


def pytest_addoption(parser):
    group = parser.getgroup("realign_fast")
    group.addoption("--results", type=Path, help="write everything to this json, and a csv")
    group.addoption("--overwrite", action="store_true", help="--results may replace its files")
    group.addoption("--compare", type=Path, help="flag ratios that changed since this json")
    group.addoption("--rounds", type=int, help=f"of every case (default: {timing.ROUNDS})")
    group.addoption("--threads", type=int, help="default: every processor this may run on")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    help_ci = f"the subset of CI: fails where a ratio fell by {ci.FALL:.0%}% of {ci.COMMITTED.name}"
    group.addoption("--ci", action="store_true", help=help_ci)
    group.addoption("--commit", action="store_true", help="with --ci: judge nothing, write anew")


def pytest_configure(config):
    config.option.benchmark_quiet = True  # our table has what its table has
    in_ci = config.getoption("--ci")
    if config.getoption("--commit") and not in_ci:
        raise pytest.UsageError("--commit writes the ratios of the subset: give --ci with it")
    _check_paths(config)  # before anything is measured
    timing.ROUNDS = config.getoption("--rounds") or (5 if in_ci else timing.ROUNDS)
    timing.THREADS = config.getoption("--threads") or timing.THREADS
    timing.SECONDS = 1.0 if in_ci else timing.SECONDS
    packages.COMPILE = not (config.getoption("--no-compile") or in_ci)


def _check_paths(config: pytest.Config) -> None:
    """Refuse a file of another format to compare with, and a path that cannot be written."""
    try:
        if path := config.getoption("--compare"):
            records.load(path)
        if path := config.getoption("--results"):
            if path.suffix != ".json" or path.is_dir():
                raise ValueError(f"{path}: expected the name of a .json file")
            if not config.getoption("--overwrite"):
                for old in filter(Path.exists, (path, path.with_suffix(".csv"))):
                    raise ValueError(f"{old}: is there already; give another name or --overwrite")
            path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--compare, --results: {error}") from error


def pytest_collection_modifyitems(config, items):
    if config.getoption("--ci"):
        config.hook.pytest_deselected(items=[one for one in items if not _in_ci(one)])
        items[:] = filter(_in_ci, items)


def _in_ci(item: pytest.Item) -> bool:
    line = item.callspec.params.get("line") if hasattr(item, "callspec") else None
    return line is not None and line.ci


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(timing.THREADS)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # (it comes with scikit-learn)
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(timing.THREADS))
        yield
    torch.set_num_threads(before)


@pytest.fixture
def show():
    """Return a function that prints and records an object with `lines()` and `summary()`."""
    return FOUND.append


@pytest.fixture
def measure(benchmark, request):
    """Return a function that checks, times and shows a case and, in CI, judges its ratios."""

    def run(case: timing.Case) -> timing.Case:
        FOUND.append(CaseRecord(case))
        try:
            case.run(benchmark)
            if request.config.getoption("--ci") and not request.config.getoption("--commit"):
                NOTES.extend(ci.judge(case, records.load(ci.COMMITTED)))
            benchmark.extra_info.update(records.summary(case))
        except (timing.ParityError, ci.Fallen) as error:
            pytest.fail(str(error), pytrace=False)
        except BaseException as error:  # (an interrupt, too, leaves half a case)
            case.failed = case.failed or f"{type(error).__name__}: {error}"
            raise
        finally:
            case.release()
        return case

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not FOUND:
        return
    write = terminalreporter.write_line
    terminalreporter.section("realign_fast: medians over interleaved rounds")
    write(", ".join(f"{key} {value}" for key, value in records.machine().items()))
    if not torch.cuda.is_available():
        write("missing: a CUDA device, and with it the cases of the GPU, cuML and CuPy")
    for one in FOUND:
        for line in one.lines():
            write(line)
    summaries = [one.summary() for one in FOUND]
    if path := config.getoption("--compare"):
        terminalreporter.section(f"compared with {path}")
        for line in records.comparison(records.load(path), summaries):
            write(line)
    for note in dict.fromkeys(NOTES):
        write(note)
    if path := config.getoption("--results") or (config.getoption("--commit") and ci.COMMITTED):
        records.write(path, summaries)
        write(f"written: {path} and {path.with_suffix('.csv')}")
