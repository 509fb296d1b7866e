"""Progress of long work: a bar on a terminal, lines in a log, and events for monitoring."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

LOGGER = logging.getLogger("realign_fast.progress")  # events, at the level INFO
INTERVAL_SECONDS = 60.0  # between two events of one bar


class Progress(tqdm):  # type: ignore[misc]
    """A bar of tqdm on stderr that also logs events, at most one in ``INTERVAL_SECONDS``.

    The record of an event has the attribute ``event``, a dict: the name of the work, what is done
    and in all, the unit, the seconds since the start, and those that are left at the present rate.
    """

    def __init__(self, total: int, name: str = "", *, unit: str, shown: bool, **options: Any):
        log = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30, "delay": 30}
        self.began = self.reported = time.monotonic()
        self.facts: dict[str, Any] = {"event": "progress", "name": name, "done": 0}
        self.facts |= {"total": total, "unit": unit}
        options |= {"total": total, "desc": name or None, "unit": unit, "disable": not shown}
        super().__init__(file=sys.stderr, **log | options)

    def update(self, n: float | None = 1) -> bool | None:
        """Count ``n`` more."""
        done, total, now = self.facts["done"] + n, self.facts["total"], time.monotonic()
        self.facts["done"] = done
        if n and (now - self.reported >= INTERVAL_SECONDS or done == total):
            self.reported, seconds = now, now - self.began
            times = {"seconds": seconds, "seconds_left": (total - done) * seconds / max(done, 1)}
            event = self.facts | {key: round(value, 3) for key, value in times.items()}
            LOGGER.info("%s: %d of %d", event["name"], done, total, extra={"event": event})
        updated: bool | None = super().update(n)
        return updated
