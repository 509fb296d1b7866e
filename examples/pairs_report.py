"""The table, the plot and the verdicts of `text_instead_of_pairs.py`, from its result files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from substitution_study import STUDENT, verdict

# Of the arms in their order; colour-blind readers can tell them apart (Okabe and Ito, and grey).
COLORS = ("#999999", "#E69F00", "#D55E00", "#0072B2", "#009E73", "black")
FIGURES = {"gain": 1, "loss": -1}  # 1: more is better, -1: less is better
ENDS = ("blind", "real pairs")  # differences are judged beside the distance of these two
KNOWN = 0.05  # of that distance: the half width of a difference that is known well enough
ORDERINGS = {  # worse and better arm
    "paper: a training on text helps": ("blind", "text as it is"),
    "paper: text as it is < ReAlign": ("text as it is", "ReAlign"),
    "paper: ReAlign < real pairs": ("ReAlign", "real pairs"),
    "ours: ReAlign < optimal transport": ("ReAlign", "optimal transport"),
    "ours: ReAlign < both sides centred": ("ReAlign", "both sides centred"),
    "ours: text as it is < optimal transport": ("text as it is", "optimal transport"),
    "ours: text as it is < both sides centred": ("text as it is", "both sides centred"),
    "ours: optimal transport < both sides centred": ("optimal transport", "both sides centred"),
    "real pairs are the ceiling": ("both sides centred", "real pairs"),
    "real pairs are the ceiling, with the best map": ("optimal transport", "real pairs"),
    "paper: text as it is < real pairs": ("text as it is", "real pairs"),
    "4 times as long: text as it is < both sides centred": (
        "text as it is, 4 times",
        "both sides centred, 4 times",
    ),
    "4 times as long: text as it is < real pairs": (
        "text as it is, 4 times",
        "real pairs, 4 times",
    ),
    "4 times as long: both sides centred < real pairs": (
        "both sides centred, 4 times",
        "real pairs, 4 times",
    ),
}
Result = dict[str, Any]  # what `run_arm` returned
Results = dict[str, dict[int, Result]]  # by arm and seed
Vector = NDArray[np.float64]


def load(out: Path) -> Results:
    """Read the results of every finished arm and seed."""
    results: Results = {}
    for file in sorted((out / "results").glob("*.json")):
        result = json.loads(file.read_text())
        results.setdefault(result["arm"], {})[result["seed"]] = result
    return results


def mean_and_width(values: Vector) -> tuple[float, float]:
    """Return the mean of values [seeds] and the half width of its 95% interval (Student)."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), error * STUDENT[min(len(values) - 1, len(STUDENT)) - 1]


def improvement(results: Results, worse: str, better: str, figure: str) -> Vector:
    """Return by how much one arm is better than another, [seeds], for the seeds of both."""
    sides = [results.get(arm, {}) for arm in (worse, better)]
    seeds = sorted(set.intersection(*map(set, sides)))
    values = [[side[seed][figure]["value"] for seed in seeds] for side in sides]
    return FIGURES[figure] * (np.array(values[1]) - np.array(values[0]))


def judge(results: Results, worse: str, better: str, figure: str) -> str | None:
    """Say whether one arm is better than another; None if no seed has both."""
    values = improvement(results, worse, better, figure)
    if not len(values):
        return None
    mean, width = mean_and_width(values)
    said = verdict(mean, width)
    if said.startswith("not decided") and width <= KNOWN * distance(results, figure):
        said += f", which is known to {KNOWN:.0%} of the distance"
    return said


def distance(results: Results, figure: str) -> float:
    """Return by how much real pairs are better than a blind training, nan without both."""
    values = improvement(results, *ENDS, figure)
    return float(values.mean()) if len(values) else math.nan


def table(results: Results, order: list[str]) -> list[str]:
    """Return a Markdown table with a row for each arm: mean, and half width over seeds."""
    head = "| arm | seeds | gain | loss | loss of the training | best checkpoint, step |"
    lines = [head, "|---" * 6 + "|"]
    for arm in order:
        cells = []
        for figure in FIGURES:
            values = [result[figure]["value"] for result in results[arm].values()]
            mean, width = mean_and_width(np.array(values))
            cells.append(f"{mean:.3f}" + (f" ± {width:.3f}" if len(values) > 1 else ""))
        cells.append(f"{np.mean([one['training_loss'] for one in results[arm].values()]):.3f}")
        best = [
            min(result["curve"], key=lambda point: point[1])[0] for result in results[arm].values()
        ]
        cells.append(", ".join(map(str, best)))
        lines.append(f"| {arm} | {len(best)} | {' | '.join(cells)} |")
    return lines


def page(results: Results, order: list[str], about: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    settings = about["settings"]
    lines = [
        f"# Text in place of pairs, {about['date']}",
        "",
        f"{about['machine']}, threads a process: {about['threads']}, torch {about['torch']}, "
        f"transformers {about['transformers']}; {about['minutes']:.0f} minutes of all runs "
        f"together (others used the machine too). Settings: {json.dumps(settings)}.",
        "",
        "New pictures of the demo corpus after stage 1: how much higher the loss is beside another "
        f"picture (gain) and the loss, in nats a token, on {settings['measured']}; the checkpoint "
        "is the best on the others. Mean ± half width of the 95% interval over seeds.",
        "",
        *table(results, order),
    ]
    for figure in FIGURES:
        apart = distance(results, figure)
        shown = "unknown" if math.isnan(apart) else f"{apart:.3f}"
        lines += [
            "",
            f"Differences by {figure}, paired over seeds, with 95% intervals. The distance from a "
            f"blind training to real pairs is {shown}.",
            "",
            "| ordering, worse < better | seeds | verdict |",
            "|---|---|---|",
        ]
        for ordering, arms in ORDERINGS.items():
            if said := judge(results, *arms, figure):
                seeds = len(improvement(results, *arms, figure))
                lines.append(f"| {ordering} | {seeds} | {said} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, results: Results, order: list[str]) -> None:
    """Draw the loss on watched pictures against steps, as means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False})
    figure, panel = pyplot.subplots(figsize=(11, 6), layout="constrained")
    short = [arm for arm in order if "times" not in arm]
    colors, tops = dict(zip(short, COLORS, strict=False)), []
    for arm in order:
        curves = [result["curve"] for result in results[arm].values()]
        losses = np.array([[loss for _, loss in curve] for curve in curves])
        steps = [step for step, _ in curves[0]]
        color = colors.get(arm.split(",")[0], "black")
        style = {"color": color, "ls": "--" if "times" in arm else "-"}
        panel.plot(steps, losses.mean(0), label=arm, lw=2, **style)
        panel.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.12, lw=0)
        tops.append(losses.mean(0)[min(2, len(steps) - 1)])
    panel.set(xlabel="step", ylabel="loss on watched pictures", xscale="log")
    panel.set_xticks(steps, map(str, steps))
    panel.minorticks_off()
    panel.set_ylim(top=max(tops) + 0.2)  # without the first steps, where it is far higher
    panel.legend(frameon=False)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def write_report(out: Path, folder: Path, threads: int, order: list[str]) -> None:
    """Print the report of the results in `out`; write `folder/text_instead_of_pairs_<date>.*`."""
    from transformers import __version__ as transformers_version

    results = load(out)
    order = [arm for arm in order if arm in results]
    finished = [result for arm in order for result in results[arm].values()]
    if not finished:
        raise SystemExit(f"{out}: holds no results yet; run without --write first")
    about = {
        "date": max(result["date"] for result in finished),
        "machine": ", ".join(sorted({result["machine"] for result in finished})),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "minutes": round(sum(result["seconds"] for result in finished) / 60, 1),
        "settings": json.loads((out / "settings.json").read_text()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"text_instead_of_pairs_{about['date']}.json"
    path.write_text(json.dumps(about | {"results": finished}, indent=1) + "\n")
    text = page(results, order, about)
    path.with_suffix(".md").write_text(text)
    draw(path.with_suffix(".png"), results, order)
    print(f"{text}\nwrote {path}, .md and .png")
