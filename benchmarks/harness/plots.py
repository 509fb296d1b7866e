"""One page of plots from a json of the suite.

    python benchmarks/harness/plots.py benchmarks/results/cpu.json docs/performance.png

Speed against peers; the roofline, from the ceilings of the same run; error against speed; and time
against size. Only what the json holds is drawn, and machine and date stand at its foot.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OPS = ("sum_rows", "align_rows", "add_scatter_", "map_rows", "covariance", "whitening", "transport")
OPS += ("read", "apply", "align", "training_step", "embed")
_PALETTE = plt.get_cmap("tab20").colors
COLOURS = dict(zip(OPS, _PALETTE[::2] + _PALETTE[1::2], strict=False))
ROOFS = {"sum_rows": "read", "align_rows": "copy", "add_scatter_": "product", "map_rows": "product"}


def speed(axes: Axes, cases: list[dict]) -> None:
    """Draw a bar for each peer: the speed of ours relative to it, at D = 768."""
    bars = []
    for case in (one for one in cases if one["dimension"] == 768):
        words = case["op"], case["kind"], case["dtype"]
        label = " ".join(filter(None, words)) + (", cached" if case["cache"] == "cached" else "")
        for one in case["candidates"]:
            if one["role"] == "peer":
                name = one["name"].split(" (")[0]
                bars.append((one["ours_is"], f"{label}: {name}", COLOURS[case["op"]]))
    bars.sort(key=lambda bar: bar[0])
    places = range(len(bars))
    axes.barh(places, [bar[0] - 1 for bar in bars], left=1, color=[bar[2] for bar in bars])
    axes.set_yticks(places, [bar[1] for bar in bars], fontsize=5)
    axes.set_ylim(-1, len(bars))
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as the peer (left of 1: the peer is faster)")
    axes.set_title("Speed against peers")


def roofline(axes: Axes, cases: list[dict]) -> None:
    """Draw arithmetic rate over flops per byte, our ops under the measured ceilings."""
    points, bandwidth, peak = [], 0.0, 0.0
    for case in cases:
        if case["op"] not in ROOFS or case["cache"] != "cold" or not case["candidates"]:
            continue
        intensity = case["flops"] / case["bytes"]
        for one in case["candidates"]:
            if one["role"] == "ours":
                points.append((intensity, one["gf_s"], case["op"]))
            elif one["role"] == "ceiling" and ROOFS[case["op"]] == "product":
                peak = max(peak, one["gf_s"])
            elif one["role"] == "ceiling":
                bandwidth = max(bandwidth, one["gb_s"])
    for op in ROOFS:
        mine = [(x, y) for x, y, name in points if name == op]
        if mine:
            axes.scatter(*zip(*mine, strict=True), label=op, color=COLOURS[op], s=18)
    if bandwidth and peak and points:
        low, high = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
        ridge = peak / bandwidth
        xs = [low, ridge, high]
        label = f"{bandwidth:.0f} GB/s read or copied, {peak:.0f} GF/s multiplied"
        axes.plot(xs, [min(peak, x * bandwidth) for x in xs], color="black", label=label)
    axes.set(xscale="log", yscale="log", title="Roofline, from this run's fastest ceilings")
    axes.set(xlabel="multiplications and additions a byte", ylabel="GF/s")
    axes.legend(fontsize=6)


def error_and_speed(axes: Axes, cases: list[dict]) -> None:
    """Draw error against speed of the candidates, ours filled: right is faster, down more exact."""
    seen = set()
    for case in cases:
        for one in case["candidates"]:
            if one["error"] is None or case["op"] not in OPS[:7] or case["cache"] != "cold":
                continue
            ours = one["role"] in ("ours", "variant")
            colour = COLOURS[case["op"]]
            label = case["op"] if ours and case["op"] not in seen else None
            seen |= {case["op"]} if ours else set()
            face = colour if ours else "none"
            error = max(one["error"], 1e-17)
            axes.scatter(one["rows_s"], error, s=20, color=face, edgecolors=[colour], label=label)
    axes.set(xscale="log", yscale="log", title="Error against speed (filled: ours)")
    axes.set(xlabel="rows/s", ylabel="error against float64")
    axes.legend(fontsize=6)


def scaling(axes: Axes, series: list[dict]) -> None:
    """Draw relative time against relative size with the fitted slopes."""
    for one in series:
        if one["what"] != "seconds" or one["against"] not in ("N", "D") or not one["slope"]:
            continue
        xs = [x / one["sizes"][0] for x in one["sizes"]]
        ys = [y / one["values"][0] for y in one["values"]]
        style = "-o" if one["against"] == "N" else "--s"
        label = f"{one['op']} against {one['against']}: slope {one['slope']:.2f}"
        axes.plot(xs, ys, style, color=COLOURS[one["op"]], label=label, markersize=3, linewidth=1)
    axes.set(xscale="log", yscale="log", title="Time as the size grows")
    axes.set(xlabel="size, of the smallest", ylabel="time, of the smallest")
    axes.legend(fontsize=6)


def page(found: dict, out: Path) -> None:
    """Draw the four plots of a run's json."""
    results = found["results"]
    cases = [one for one in results if one["record"] == "case"]
    figure, axes = plt.subplots(2, 2, figsize=(13, 12), layout="constrained")
    speed(axes[0, 0], cases)
    roofline(axes[0, 1], cases)
    error_and_speed(axes[1, 1], cases)
    scaling(axes[1, 0], [one for one in results if one["record"] == "series"])
    machine = found["machine"]
    facts = ("processor", "isa", "threads", "gpu", "torch", "realign_fast", "date")
    words = ", ".join(f"{name} {machine[name]}" for name in facts if name in machine)
    figure.supxlabel(words, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(
            "plots: expected two paths, python benchmarks/harness/plots.py RUN.json OUT.png"
        )
    page(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
