"""Options of a run that reads, measures or aligns shards."""

from __future__ import annotations

from dataclasses import dataclass

from ..interface.option_values import BATCH_BYTES, BadRows, Method
from ..methods import Shrinkage


@dataclass(frozen=True)
class Settings:
    """Options of a run, the same for each of its passes.

    Args:
        bad_rows: treatment of a row that is zero or not finite. ``"error"`` refuses it; ``"skip"``
            leaves it out of the statistics and writes a zero row; ``"keep"`` counts a zero row as
            data (``u = 0``) and writes NaN for a row that is not finite. Rows keep their positions
            in every case.
        batch_bytes: bytes of rows that are read at a time. The float64 sums are cut at the same
            rows, so another value may change their last bits.
        progress: show a progress bar on stderr.
        method, shrinkage: the map and its shrinkage, as :meth:`ReAlign.fit` takes them.
        workers: number of processes that share the shards.
        fit_rows: number of rows of each side to fit on, chosen by ``seed`` (:mod:`.sampling`). 0 is
            every row, as is None except in ``unify``.
        device: ``"cpu"``, ``"cuda"`` (each worker takes the next GPU) or ``"cuda:N"``. The sums of
            another type of device may differ in their last bits.
    """

    bad_rows: BadRows = "error"
    batch_bytes: int = BATCH_BYTES
    progress: bool = True
    method: Method = "realign"
    shrinkage: Shrinkage = None
    workers: int = 1
    fit_rows: int | None = None
    seed: int = 0
    device: str = "cpu"
