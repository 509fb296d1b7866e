"""One page of plots from a json of the suite.

    python benchmarks/harness/plots.py benchmarks/results/cpu.json docs/performance.png

Speed against the fastest peer; the share of the ceiling that ran in the same rounds; time against
size; and error against time for a covariance. Only what the json holds is drawn, and machine and
date stand at its foot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Colours that colour-blind readers tell apart (Okabe and Ito); markers tell them apart as well.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#6b6b6b"
MARKS = {
    "sum_rows": ("#0072B2", "o"),
    "align_rows": ("#D55E00", "s"),
    "add_scatter_": ("#009E73", "^"),
    "map_rows": ("#CC79A7", "D"),
    "whitening": ("#000000", "v"),
    "align": ("#E69F00", "P"),
}
STYLE = {
    "font.size": 13,
    "axes.titlesize": 16,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def name_of(case: dict) -> str:
    """Return the name of a case: op, kind, number type, and whether its files were cached."""
    words = " ".join(filter(None, (case["op"], case["kind"], case["dtype"])))
    return words + (", cached" if case["cache"] == "cached" else "")


def speed(axes: Axes, cases: list[dict]) -> None:
    """Draw a bar for each case at D = 768: the speed of ours relative to its fastest peer."""
    bars = []
    for case in cases:
        peers = [one for one in case["candidates"] if one["role"] == "peer"]
        if case["dimension"] == 768 and peers and case["cache"] != "warm":
            fastest = min(peers, key=lambda one: one["ours_is"])
            bars.append((fastest["ours_is"], name_of(case), fastest["name"].split(" (")[0]))
    bars.sort(key=lambda bar: bar[0])
    places = range(len(bars))
    colours = [BLUE if bar[0] >= 1 else VERMILION for bar in bars]
    axes.barh(places, [bar[0] - 1 for bar in bars], left=1, color=colours)
    for place, (ratio, _, peer) in enumerate(bars):
        axes.text(max(ratio, 1) * 1.05, place, peer, va="center", fontsize=12)
    axes.set_yticks(places, [bar[1] for bar in bars])
    axes.set_ylim(-0.7, len(bars) - 0.3)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min([1, *(bar[0] for bar in bars)]), 60)
    ticks = (0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the peer (vermilion: the peer is faster)")
    axes.set_title("Speed against the fastest peer")


def share_of_ceiling(axes: Axes, cases: list[dict]) -> None:
    """Draw the speed of each op relative to the ceiling of the same rounds, a mark for each D."""
    shares: dict[str, list[float]] = {}
    for case in cases:
        ceilings = [one for one in case["candidates"] if one["role"] == "ceiling"]
        if case["op"] in MARKS and case["cache"] == "cold" and ceilings and case["kind"] != "npy":
            shares.setdefault(name_of(case), []).append(ceilings[0]["ours_is"])
    for place, (name, values) in enumerate(reversed(shares.items())):
        colour, mark = MARKS[name.split()[0]]
        axes.plot(values, [place] * len(values), mark, color=colour, markersize=9, alpha=0.8)
    axes.set_yticks(range(len(shares)), list(reversed(shares)))
    axes.axvline(1, color="black", linewidth=1.5)
    axes.set(xlabel="share of the ceiling (a mark for each D)", xlim=(0, None))
    axes.set_title("How close to the limit")


def time_and_error(axes: Axes, cases: list[dict]) -> None:
    """Draw error against time of every way to compute a covariance, each with its name."""
    case = next((one for one in cases if one["op"] == "covariance"), None)
    shown = [one for one in case["candidates"] if one["error"] is not None] if case else []
    shown.sort(key=lambda one: one["error"])
    for place, one in enumerate(shown):
        ours = one["role"] in ("ours", "variant")
        axes.plot(one["error"], place, "o", color=BLUE if ours else GREY, markersize=9)
        label = f"  {one['ours_is']:.1f} x"
        axes.text(one["error"], place, label, va="center", fontweight="bold" if ours else None)
    axes.set_yticks(range(len(shown)), [one["name"].split(" (")[0] for one in shown])
    axes.set(xscale="log", xlabel="relative error (and time, if Moments takes 1)")
    axes.margins(x=0.15)
    axes.set_title("Error and time of a covariance")


def scaling(axes: Axes, series: list[dict]) -> None:
    """Draw relative time against relative size with the fitted slopes."""
    for one in series:
        if one["what"] != "seconds" or one["against"] not in ("N", "D") or not one["slope"]:
            continue
        xs = [x / one["sizes"][0] for x in one["sizes"]]
        ys = [y / one["values"][0] for y in one["values"]]
        colour, mark = MARKS[one["op"]]
        line = "-" if one["against"] == "N" else "--"
        label = f"{one['op']} against {one['against']}: {one['slope']:.2f}"
        axes.plot(xs, ys, mark + line, color=colour, label=label, markersize=6, linewidth=1.5)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="size, relative to the smallest", ylabel="time, relative to the smallest")
    axes.set_ylim(None, axes.get_ylim()[1] ** 2.2)  # room for the legend
    axes.legend(fontsize=12, frameon=False, title="slope on these axes", loc="upper left")
    axes.set_title("Time as the size grows")


def page(found: dict, out: Path) -> None:
    """Draw the four plots of a run's json."""
    results = found["results"]
    cases = [one for one in results if one["record"] == "case"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(16, 15), layout="constrained")
        speed(axes[0, 0], cases)
        share_of_ceiling(axes[0, 1], cases)
        scaling(axes[1, 0], [one for one in results if one["record"] == "series"])
        time_and_error(axes[1, 1], cases)
        machine = found["machine"]
        facts = ("processor", "isa", "threads", "gpu", "torch", "realign_fast", "date")
        words = ", ".join(f"{name} {machine[name]}" for name in facts if name in machine)
        figure.supxlabel(words, fontsize=11)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=90)
        plt.close(figure)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(
            "plots: expected two paths, python benchmarks/harness/plots.py RUN.json OUT.png"
        )
    page(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
