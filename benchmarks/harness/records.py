"""Results of a run as json and csv with machine, versions and date; comparison of two runs."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from harness import inputs, timing
from realign_fast import __version__, ops

PACKAGES = ("numpy", "scipy", "scikit-learn", "transformers", "pyarrow")  # beside torch and ours
LEAST_CHANGE = 1.1  # of a ratio; between two runs of one machine less than that is no news
SAME = ("processor", "isa", "threads", "gpu")  # what makes ratios of two runs comparable


def machine() -> dict[str, object]:
    """Return the facts that the numbers depend on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": name,
        "isa": ops.cpu_instruction_set(),
        "threads": timing.THREADS,
        "cache_mib": inputs.last_level_cache() / 2**20,
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "realign_fast": __version__,
        **{one: found for one in PACKAGES if (found := _version(one))},
        "rounds": timing.ROUNDS,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def case_lines(case: timing.Case) -> list[str]:
    """Return the lines of a case for the terminal; a failed case has a reason and no speed."""
    if case.failed:
        return [f"{case.name}: NO SPEED: {case.failed}"]
    head = f"{case.name}: {case.bytes / 1e6:.4g} MB and {case.flops / 1e9:.4g} GF a call"
    lines = [f"{head}; error of ours may be {case.tolerance:.1e}"]
    for one in summary(case)["candidates"]:
        rate, unit = (one["gb_s"], "GB/s") if case.limit == "bytes" else (one["gf_s"], "GF/s")
        share = one["share_of_ceiling"]
        spread = "" if one["spread"] is None else f"+-{one['spread']:4.0%}"
        error = "" if one["error"] is None else f"   error {one['error']:.1e}"
        name = one["name"] + (" (the ceiling)" if one["role"] == "ceiling" else "")
        lines.append(
            f"  {name:44} {one['seconds'] * 1e3:10.3f} ms {spread:6}"
            f" {one['rows_s']:9.4g} rows/s {rate:8.4g} {unit}"
            + (f" {share:7.3f} of ceiling" if share else "")
            + f"   ours is {one['ours_is']:7.3g}x{error}"
        )
    return lines + [f"  missing: {one}" for one in case.missing]


def summary(case: timing.Case) -> dict[str, object]:
    """Return a case for the json file; a failed case has no times."""
    facts = {
        "record": "case",
        "name": case.name,
        "op": case.op,
        "kind": case.kind,
        "device": case.device,
        "dtype": timing.case_name(case.dtype),
        "dimension": case.dimension,
        "rows": case.rows,
        "cache": case.cache,
        "bytes": case.bytes,
        "flops": case.flops,
        "limit": case.limit,
        "tolerance": case.tolerance,
        "missing": case.missing,
    }
    if case.failed:
        return facts | {"failed": case.failed, "candidates": []}
    return facts | {"candidates": [_candidate(case, name) for name in case.candidates]}


def _candidate(case: timing.Case, name: str) -> dict[str, object]:
    one, seconds = case.candidates[name], case.seconds(name)
    share = case.ratio(name, case.ceiling) if case.ceiling else None
    return {
        "name": name,
        "role": one.role,
        "seconds": seconds,
        "spread": timing.spread(one.seconds) if len(one.seconds) > 1 else None,
        "rows_s": case.rows / seconds,
        "gb_s": case.bytes / seconds / 1e9,
        "gf_s": case.flops / seconds / 1e9,
        "share_of_ceiling": share,
        "ours_is": case.ratio(case.ours, name),
        "error": one.error,
        "ratios": case.ratios(case.ours, name),
        "all_seconds": one.seconds,
    }


def write(path: Path, found: list[dict[str, object]]) -> None:
    """Write a json with everything and a csv with a line for each candidate of each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = machine()
    text = json.dumps({"machine": where, "results": found}, indent=1)
    numbers = re.compile(r"\[\s+([-+.\deE,\s]+?)\s+\]")  # a list of them on one line
    text = numbers.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    path.write_text(text + "\n")
    lists = ("ratios", "all_seconds", "candidates", "missing", "record", "name")
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = None
        for case in (one for one in found if one["record"] == "case"):
            for one in case["candidates"]:
                line = {"case": case["name"], "candidate": one["name"]}
                line |= {k: v for part in (case, one) for k, v in part.items() if k not in lists}
                line |= {k: where[k] for k in ("processor", "threads", "torch", "date")}
                if writer is None:
                    writer = csv.DictWriter(file, list(line), lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)


FIELDS = {"name": str, "role": str, "ratios": list, "all_seconds": list}  # of a candidate


def load(path: Path) -> dict[str, object]:
    """Load a file that :func:`write` wrote.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        found = json.loads(path.read_text())
        machine, results = found["machine"], found["results"]
        whole = isinstance(machine, dict) and all(map(_is_record, results))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: is damaged, or no json of `pytest benchmarks/ --results FILE`; measure again"
        )
    return found


def _is_record(one: dict[str, object]) -> bool:
    """Return whether a result is a series or the like, or a case with the times of candidates."""
    return one["record"] != "case" or all(
        isinstance(candidate[name], kind) and candidate[name]
        for candidate in one["candidates"]
        for name, kind in FIELDS.items()
    )


class Change(NamedTuple):
    """Ratio of ours to a candidate in an earlier run and now."""

    case: str
    candidate: str
    before: float
    now: float
    noise: float  # the factor that chance explains, 1 and more

    @property
    def beyond_noise(self) -> bool:
        return abs(math.log(self.now / self.before)) > math.log(self.noise)

    def __str__(self) -> str:
        word = "faster" if self.now > self.before else "SLOWER"
        return (
            f"{word}: {self.case}: ours is {self.now:.3g}x {self.candidate}, was "
            f"{self.before:.3g}x (noise explains a factor of {self.noise:.2f})"
        )


def changes(before: list[dict], now: list[dict]) -> list[Change]:
    """Return every ratio that both runs have; versions in the names of peers may differ."""

    def ratios(found: list[dict]) -> dict[tuple[str, str], list[float]]:
        return {
            (case["name"], one["name"].split(" (")[0]): one["ratios"]
            for case in found
            if case["record"] == "case"
            for one in case["candidates"]
            if one["role"] != "ours"
        }

    old, new = ratios(before), ratios(now)
    return [
        Change(*key, *map(statistics.median, (old[key], new[key])), noise(old[key], new[key]))
        for key in new
        if key in old
    ]


def noise(*runs: list[float]) -> float:
    """Return the factor by which such medians differ by chance, at least LEAST_CHANGE.

    Three standard errors of the difference of the medians of the logarithms; a median's is 1.25
    of a mean's, and the spread is told by the median deviation, 1.48 of which is a deviation.
    """
    variance = 0.0
    for ratios in runs:
        logs = [math.log(one) for one in ratios]
        middle = statistics.median(logs)
        deviation = 1.48 * statistics.median(abs(one - middle) for one in logs)
        variance += (1.25 * deviation) ** 2 / len(logs)
    return max(LEAST_CHANGE, math.exp(3 * math.sqrt(variance)))


def fallen(before: list[dict], now: list[dict], by: float) -> list[Change]:
    """Return the ratios that fell below ``1 - by`` of their earlier value, median and fastest.

    Neighbours on a machine move medians of rounds; the fastest rounds are those that they spared.
    A kernel that became slower is slower in both.
    """
    old, new = fastest(before), fastest(now)
    return [
        one
        for one in changes(before, now)
        if one.now < (1 - by) * one.before
        and new[one.case, one.candidate] < (1 - by) * old[one.case, one.candidate]
    ]


def fastest(found: list[dict]) -> dict[tuple[str, str], float]:
    """Return the ratios of the fastest rounds by case and candidate."""
    ratios = {}
    for case in (one for one in found if one["record"] == "case" and one["candidates"]):
        (ours,) = (one for one in case["candidates"] if one["role"] == "ours")
        for one in case["candidates"]:
            ratio = min(one["all_seconds"]) / min(ours["all_seconds"])
            ratios[case["name"], one["name"].split(" (")[0]] = ratio
    return ratios


def other_machine(before: dict[str, object], now: dict[str, object]) -> str:
    """Return the differences of two runs' machines, or "" if their ratios can be compared."""
    return ", ".join(
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in SAME
        if before.get(name) != now.get(name)
    )


def comparison(before: dict[str, object], now: list[dict[str, object]]) -> list[str]:
    """Return the lines of ``--compare``: the changes beyond noise and the number of ratios."""
    found = changes(before["results"], now)
    differs = other_machine(before["machine"], machine())
    flagged: Callable[[Change], bool] = lambda one: one.beyond_noise  # noqa: E731
    lines = [f"(another machine: {differs})"] if differs else []
    lines += [str(one) for one in sorted(filter(flagged, found), key=lambda c: c.now / c.before)]
    still = sum(not one.beyond_noise for one in found)
    return [*lines, f"{still} of {len(found)} ratios are where they were"]
