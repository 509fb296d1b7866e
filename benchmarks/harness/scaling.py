"""Series of measurements against a size, and the slope fitted to them on logarithmic axes."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

NOISE = 0.2  # by which a fitted slope may be off the theory's and still be called straight


@dataclass
class Series:
    """Time or memory of an op as one size grows and all others stay the same."""

    op: str
    what: str  # "seconds" or "bytes"
    against: str  # "N", "D", "threads", "shards" or "workers"
    fixed: str  # everything else, in words
    theory: float | None  # the slope that it should have; None where there is none
    sizes: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # medians

    def add(self, size: int, values: list[float]) -> None:
        self.sizes.append(size)
        self.values.append(statistics.median(values))

    @property
    def slope(self) -> float:
        """Slope of log value over log size by least squares."""
        return slope(self.sizes, self.values)

    @property
    def straight(self) -> bool | None:
        """True if it grows as the theory says; None if there is no theory."""
        return None if self.theory is None else abs(self.slope - self.theory) <= NOISE

    def lines(self) -> list[str]:
        verdict = {None: "", True: ", straight", False: ", NOT STRAIGHT"}[self.straight]
        theory = "" if self.theory is None else f" (theory {self.theory:g}{verdict})"
        points = ", ".join(
            f"{size}: {value:.3g}" for size, value in zip(self.sizes, self.values, strict=True)
        )
        head = f"{self.op}: {self.what} against {self.against}, {self.fixed}"
        fitted = "nothing grows" if math.isnan(self.slope) else f"slope {self.slope:.2f}{theory}"
        return [f"{head}: {fitted}", f"  {points}"]

    def summary(self) -> dict[str, object]:
        facts = {"record": "series", "name": f"{self.op} {self.what} against {self.against}"}
        return (
            facts
            | vars(self)
            | {"slope": None if math.isnan(self.slope) else self.slope, "straight": self.straight}
        )


def slope(sizes: list[float], values: list[float]) -> float:
    """Return the slope of the line through the logarithms, or nan if it is not defined."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y > 0]
    if len({x for x, _ in points}) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope
