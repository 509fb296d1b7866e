"""``realign-fast check``: which kernels are right on the device of this machine, and how fast.

A backend of an op is tried in a process of its own: an illegal access spoils all that its process
computes later, and a hang has to be ended. Only backends that are right are timed.
"""

from __future__ import annotations

import io
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from .. import whiten
from ..ops import DTYPES, OPS, reference
from ..ops.chooser import key_of, path_of
from ..ops.dispatch import CHOOSER, HAS_CPU_KERNELS
from ..ops.trials import Op, Trial, fault_of, trials
from ..storage.paths import write_json

COLUMNS = (1, 65, 768, 1024, 1280, 4096)
LIMIT_SECONDS = 300  # for a trial, which may have to compile
LOGGER = logging.getLogger("realign_fast")
CONTEXT = get_context("spawn")


def check(
    device: torch.device,
    backends: Mapping[str, Any] | None = None,
    ops: Sequence[str] = OPS,
    columns: Sequence[int] = COLUMNS,
) -> dict[str, Any]:
    """Try backends of the ops on a device, time those that are right, keep and return the verdict.

    ``backends`` are objects with the ops by name, which are pickled; by default all that are here.
    The verdict has, for each op and backend, what is wrong or "", the ``rates`` of each op in
    million rows of 1024 columns a second, and all ``faults``, those of ``whiten`` among them.
    """
    known = backends or {name: name for name in _own_backends(device)}
    facts: dict[str, Any] = {"key": key_of(device), "date": time.strftime("%Y-%m-%d")}
    facts |= {"ops": {}, "rates": {}, "faults": []}
    for op in ops:
        LOGGER.info("check of %s on %s: %s", op, device, ", ".join(known))
        wrong = {name: _apart(_try, known[name], op, device, columns) or "" for name in known}
        facts["ops"][op] = wrong
        facts["faults"] += [f"{op} of {name}: {wrong[name]}" for name in known if wrong[name]]
        if not op.endswith("rows_"):  # which are the kernels of the ops without "_"
            right = {name: known[name] for name in known if not wrong[name]}
            rates = _apart(_rates_of, right, op, device)
            facts["rates"][op] = rates if isinstance(rates, dict) else {"copy": rates}
    if fault := _apart(_try_algebra, device):
        facts["faults"].append(f"whiten: {fault}")
    write_json(path_of(facts["key"]), facts)
    return facts


def _own_backends(device: torch.device) -> dict[str, Any]:
    compiled = {"cpu": torch.ops.realign_fast} if HAS_CPU_KERNELS else {}
    known = CHOOSER.backends if device.type == "cuda" else {**compiled, "reference": reference}
    return {name: functions for name, functions in known.items() if not isinstance(functions, str)}


def _function(backend: Any, op: str, device: torch.device) -> Op:
    known = _own_backends(device)[backend] if isinstance(backend, str) else backend
    function: Op = getattr(known, op)
    return function


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call in a process of its own, or in words why there is none."""
    with ProcessPoolExecutor(1, CONTEXT, _set_alarm, (LIMIT_SECONDS,)) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            return f"the process died, or took {LIMIT_SECONDS} seconds"
        except Exception as error:
            return fault_of(error)


def _set_alarm(seconds: int) -> None:
    signal.alarm(seconds)  # which ends a process that hangs
    warnings.simplefilter("ignore")


def _try(backend: Any, op: str, device: torch.device, columns: Sequence[int]) -> None:
    """Raise an AssertionError for the first wrong result of an op of a backend."""
    function = _function(backend, op, device)
    for width, dtype in product(columns, DTYPES):
        for trial in trials(op, dtype, DTYPES, width, device):
            results = trial.run(function)
            trial.check(results)
            expected = _bytes(results)
            for way, repeated in _repeats(trial, function, results):
                if not all(map(torch.equal, _bytes(repeated), expected)):
                    raise AssertionError(f"{trial.name}: other bytes in {way}")
            if signal.alarm(0):  # of a process of its own, which has made progress
                signal.alarm(LIMIT_SECONDS)


def _repeats(
    trial: Trial, function: Op, earlier: list[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the results of a second run and, on a GPU, of one on a side stream and of a graph."""
    while earlier:
        earlier.pop().fill_(-1)  # memory that the next results are likely to get
    yield "a second run", trial.run(function)
    if trial.rows.is_cuda:
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        late = torch.full_like(trial.rows, torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]  # others read NaN
            late.copy_(trial.rows)
            results = trial.run(function, late)
        torch.cuda.synchronize()
        yield "a run on a side stream", results
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = trial.run(function)
        for tensor in results:
            tensor.fill_(-1)
        graph.replay()
        yield "a graph", results


def _bytes(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.cpu().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def _rates_of(backends: Mapping[str, Any], op: str, device: torch.device) -> dict[str, float]:
    """Return million rows a second of the backends, a copy and a product, measured in turns."""
    dtype, repeats = (torch.float16, 500) if device.type == "cuda" else (torch.float32, 20)
    trial = next(trials(op, dtype, (dtype,), 1024, device))
    rows = trial.rows.nan_to_num(0, 0).repeat(repeats, 1)
    for place, value in enumerate(arguments := list(trial.arguments)):
        if isinstance(value, Tensor) and value.shape == trial.rows.shape:
            arguments[place] = value.repeat(repeats, 1)
    trial = trial._replace(arguments=arguments)
    runs: dict[str, Callable[[], object]] = {"copy": rows.clone}
    runs["product"] = partial(torch.mm, rows, rows[:1024])
    for name, backend in backends.items():
        runs[name] = partial(trial.run, _function(backend, op, device), rows)
    rates: dict[str, float] = dict.fromkeys(runs, 0)
    for turn, (name, run) in product(range(6), runs.items()):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rate = len(rows) / (time.perf_counter() - start) / 1e6
        rates[name] = round(max(rates[name], rate * (turn > 0)), 3)  # the first turn warms up
    return rates


def _try_algebra(device: torch.device) -> None:
    """Raise an AssertionError if ``whiten`` on the device is off the CPU for awkward spectra."""
    steps = torch.linspace(1, 2, 300, dtype=torch.float64)
    basis, target_basis = torch.linalg.qr(torch.randn(2, 300, 300, dtype=torch.float64))[0]
    target = (target_basis * steps) @ target_basis.T
    for values in (steps.round(), (steps - 1.5).relu(), 1 + 1e-9 * steps):
        source = (basis * values) @ basis.T  # repeated, zero and clustered eigenvalues
        for function, matrices in (
            (whiten.inverse_root, [source]),
            (whiten.optimal_transport, [source, target]),
        ):
            result = function(*(matrix.to(device) for matrix in matrices))
            torch.testing.assert_close(result.cpu(), function(*matrices), rtol=0, atol=1e-8)


def table_of(facts: dict[str, Any]) -> str:
    """Return a verdict as a table of million rows a second, with a line for each fault."""
    from rich.console import Console
    from rich.table import Table

    key, names = facts["key"], next(iter(facts["ops"].values()))
    heads = [*names, "copy", "product"]
    table = Table("op", *heads, title=f"{key['device']}, torch {key['torch']}, {facts['date']}")
    for op, wrong in facts["ops"].items():
        cells = {name: "WRONG" if wrong[name] else "right" for name in names}
        cells |= facts["rates"].get(op, {})
        table.add_row(op, *(str(cells.get(head, "")) for head in heads))
    Console(file=(text := io.StringIO()), width=100).print(table)
    return "\n".join([text.getvalue().rstrip(), *(facts["faults"] or ["every result is right"])])
