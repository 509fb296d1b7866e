"""A number estimated from a sample, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


class Estimate(float):
    """A float that carries the standard error of its estimate; anywhere else a plain float.

    ``standard_error`` is NaN where the inputs do not determine it. Arithmetic gives plain floats.
    """

    standard_error: float

    def __new__(cls, value: float, standard_error: float = math.nan) -> Estimate:
        self = super().__new__(cls, value)
        self.standard_error = float(standard_error)
        return self

    @classmethod
    def of_mean(cls, values: Tensor) -> Estimate:
        """Return the mean of independent values [N], with ``std / sqrt(N)`` (NaN where N is 1)."""
        values = values.double()
        spread = float(values.std()) if len(values) > 1 else math.nan
        return cls(float(values.mean()), spread / math.sqrt(len(values)))

    def __repr__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}"
        return f"{float(self):.6g}{error}"


def plain(figures: Mapping[str, float | None]) -> dict[str, float | int | None]:
    """Return figures ready for json: an Estimate as two numbers, its error at NAME_error.

    NaN is None, except that of an error, which is left out.
    """
    numbers: dict[str, float | int | None] = {}
    for name, value in figures.items():
        numbers[name] = float(value) if isinstance(value, Estimate) else value
        if value is not None and math.isnan(value):
            numbers[name] = None
        error = getattr(value, "standard_error", math.nan)
        if not math.isnan(error):
            numbers[f"{name}_error"] = error
    return numbers
