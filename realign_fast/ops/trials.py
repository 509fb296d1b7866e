"""Trials of a backend: an op on random rows, held against the float64 reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

ROWS = 203
Op = Callable[..., Any]


class Trial(NamedTuple):
    """A call of an op, and its right results with the error that each entry may have."""

    name: str  # such as "float16, D = 65, to float32"
    rows: Tensor  # [N, D]
    outputs: Sequence[Tensor]  # what the op writes to, as it is before
    arguments: Sequence[Any]  # those after the rows
    truth: Sequence[Tensor] = ()  # float64, on the CPU
    relative_error: float = 0.0
    absolute_error: float = 0.0

    def run(self, op: Op, rows: Tensor | None = None) -> list[Tensor]:
        """Return the results of the op for these rows, or for others in their place."""
        written = [tensor.clone() for tensor in self.outputs]
        returned = op(*written, self.rows if rows is None else rows, *self.arguments)
        return [*written, *([returned] if isinstance(returned, Tensor) else returned or ())]

    def check(self, results: Sequence[Tensor]) -> None:
        """Raise an AssertionError that says how far results are off, if they are wrong."""
        for result, truth in zip(results, self.truth, strict=True):
            value = result.cpu().double()
            close = value.isclose(truth, self.relative_error, self.absolute_error, equal_nan=True)
            if result.shape != truth.shape or not bool(close.all()):
                error = (value - truth).abs().nan_to_num(torch.inf)[~close].max()
                wrong = f"{int((~close).sum())} of {close.numel()} entries are off"
                raise AssertionError(f"{self.name}: {wrong} by up to {error:.1e}")


def trials(
    op: str, dtype: torch.dtype, results: Sequence[torch.dtype], columns: int, device: torch.device
) -> Iterator[Trial]:
    """Yield trials of an op for rows [N, columns] of ``dtype``, maps to each dtype of ``results``.

    A row is zero and two are not finite; the others have 1e-3 to 100 times the usual length.
    """
    generator = torch.Generator("cpu").manual_seed(columns)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    rows = (random(ROWS, columns) + 0.3).to(dtype)
    rows[2], rows[3, -1], rows[5, 0] = 0, torch.nan, torch.inf
    rows[7] *= 100
    rows[11] *= 1e-3
    sent = rows.to(device)
    for label, outputs, arguments, result, share, size in _calls(op, rows, results, random):
        wide = [torch.float64 if value is result else value for value in arguments]
        exact = Trial("", rows.double(), [tensor.double() for tensor in outputs], wide)
        truth = [tensor.double() for tensor in exact.run(getattr(reference, op))]
        values = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
        name = f"{dtype}, D = {columns}, {label}".replace("torch.", "")
        limits = torch.finfo(result)
        errors = limits.eps + share, limits.eps * limits.smallest_normal + share * size
        yield Trial(name, sent, [tensor.to(device) for tensor in outputs], values, truth, *errors)


def _calls(op: str, rows: Tensor, results: Sequence[torch.dtype], random: Op) -> Iterator[Any]:
    """Yield name, outputs, arguments and dtype of calls, and their errors, as a share of a size."""
    count, columns = rows.shape
    is_exact = rows.dtype == torch.float64
    shift, recentre = (size * random(columns) / columns**0.5 for size in (0.8, 0.05))
    linear = torch.full_like(shift[0], 0.983)
    maps: list[Any] = [(dtype, recentre, 1.0, "") for dtype in results]
    maps.append((rows.dtype, None, None, " without the last step"))
    if op == "sum_rows":
        for name, row_map in (("directions", [None] * 3), ("mapped", [linear, shift, recentre])):
            share = 1e-14 if is_exact else 5e-7
            yield name, [], [*row_map, True], torch.float64, share, count
        yield "rows", [], [None, None, None, False], torch.float64, 1e-14, count
    elif op == "align_rows_backward":
        size = rows.double().square().mean(dim=1, keepdim=True).sqrt().nan_to_num(1, 1)
        for dtype, last, length, name in maps:
            grad = (size.clamp(min=1e-3) * random(count, columns)).to(dtype)
            share = 1e-13 if is_exact else 2e-6
            arguments = [grad, linear, shift, last, length]
            yield f"of {dtype}{name}", [], arguments, rows.dtype, share, 4 / columns**0.5
    elif op == "add_scatter_":  # which reads and writes the upper triangle only
        scatter = torch.full((columns, columns), torch.nan).to(shift).tril(-1) + 1
        outputs, weights = [scatter, torch.ones_like(shift)], random(count).abs()
        centre, size = 0.1 * shift.float().double(), 1 + count / columns**0.5
        for name, row_weights, variant, share in (
            ("two terms", None, 0, 6e-6),
            ("weighted", weights, 0, 6e-6),
            ("accurate", weights, 0, 1e-14),
            ("fast", None, 1, 1e-3),
        ):
            arguments = [centre, row_weights, True, name == "accurate", variant]
            yield name, outputs, arguments, torch.float64, 1e-14 if is_exact else share, size
    else:
        if has_products := "map" in op:
            linear = torch.eye(columns).to(shift) + 0.3 * random(columns, columns) / columns**0.5
        for dtype, last, length, name in maps:
            share = 1e-14 if dtype == torch.float64 else 1e-6
            if has_products:
                share = 1e-13 if is_exact or dtype == torch.float64 else 4e-6
            outputs = [torch.full_like(rows, torch.nan, dtype=dtype)] * op.endswith("_")
            arguments = [linear, shift, last, *([] if outputs else [dtype]), length]
            yield f"to {dtype}{name}", outputs, arguments, dtype, share, 3 / columns**0.5


def fault_of(error: Exception) -> str:
    """Return an error as one line: what is wrong with a backend that raised it."""
    message = " ".join(str(error).split())
    return message if isinstance(error, AssertionError) else f"{type(error).__name__}: {message}"
