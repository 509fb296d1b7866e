"""Judgement of CI: the ratios of a case against the committed ones, remeasured if one fell."""

from __future__ import annotations

from pathlib import Path

from harness import records, timing

COMMITTED = Path(__file__).parents[1] / "results" / "ci.json"
FALL = 0.3  # of a ratio against the committed one: more fails
TRIES = 3  # a ratio has fallen if it has in every one of them


class Fallen(AssertionError):
    """Raised when a ratio to the ceiling or to a peer has fallen."""


def judge(case: timing.Case, committed: dict[str, object]) -> list[str]:
    """Return notes on ratios that were not judged or were measured again.

    Raises:
        Fallen: a ratio of the case is more than FALL below the committed one, TRIES times over.
    """
    if differs := records.other_machine(committed["machine"], records.machine()):
        return [f"ratios are not judged: {COMMITTED.name} is of another machine ({differs})"]
    notes, fell = [], None
    for _ in range(TRIES):
        if fell is not None:
            notes.append(f"measured again: {'; '.join(map(str, fell))}")
            case.run()
        found = records.fallen(committed["results"], [records.summary(case)], FALL)
        before = {one.candidate for one in found if fell is None}
        before |= {one.candidate for one in fell or ()}
        fell = [one for one in found if one.candidate in before]
        if not fell:
            return notes
    words = "\n".join(map(str, fell))
    raise Fallen(f"ratios fell by more than {FALL:.0%}, {TRIES} times over:\n{words}")
