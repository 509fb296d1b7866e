"""The table, the plot and the verdicts of `text_instead_of_pairs.py`, from its result files."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from training_dynamics import processor

STAGES = ("stage 1", "stage 2")
# Of the arms in their order; colour-blind readers can tell them apart (Okabe and Ito, and grey).
COLORS = (
    "#999999",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
    "black",
    "gray",
)
# 1: more is better, -1: less is better.
FIGURES = {"loss": -1, "gain": 1, "choice": 1, "choice_by_gain": 1}
STEPS = ("mean shift (step 1)", "steps 1+2", "ReAlign")
ORDERINGS = {  # worse before better, with the averages that the paper gives
    "a stage 1 on text as it is helps (paper 43.58, 47.50)": ("no stage 1", "text as it is"),
    "a stage 1 on aligned text helps (paper 43.58, 50.16)": ("no stage 1", "ReAlign"),
    "none < C3 < ReAlign (paper 47.50, 48.06, 50.16)": ("text as it is", "C3", "ReAlign"),
    "step 1 < 1+2 < 1+2+3 (paper 46.68, 48.67, 50.16)": STEPS,
    "real pairs are the ceiling": ("ReAlign", "real pairs"),
    "more text beats fewer pairs, a quarter": ("real pairs, 1/4", "ReAlign"),
    "ReAlign beats CORAL (our question)": ("CORAL, shrunk", "ReAlign"),
}
Result = dict[str, Any]  # what `run_arm` returned
Results = dict[str, dict[int, Result]]  # by arm and seed


class Verdict(NamedTuple):
    """Whether one ordering of arms holds, by one figure, after one stage."""

    ordering: str
    stage: str
    figure: str
    means: list[float]
    holds: bool  # the means are in order
    seeds: tuple[int, int]  # the seeds in which the values are in order, and all seeds


def load(out: Path) -> Results:
    """Read the results of every finished arm and seed."""
    results: Results = {}
    for file in sorted((out / "results").glob("*.json")):
        result = json.loads(file.read_text())
        results.setdefault(result["arm"], {})[result["seed"]] = result
    return results


def values(by_seed: dict[int, Result], stage: str, figure: str) -> dict[int, float]:
    """Return a figure of an arm by seed; empty if the arm has no such stage."""
    return {
        seed: result[stage][figure]["value"] for seed, result in by_seed.items() if result[stage]
    }


def verdicts(results: Results) -> list[Verdict]:
    """Judge the orderings; those whose arms have not all run are left out."""
    judged = []
    for stage in STAGES:
        for ordering, arms in ORDERINGS.items():
            for figure, sign in FIGURES.items():
                sides = [values(results.get(arm, {}), stage, figure) for arm in arms]
                seeds = set.intersection(*(set(side) for side in sides))
                if not seeds:
                    continue
                table = np.array([[side[seed] for seed in sorted(seeds)] for side in sides])
                means = table.mean(1)
                holds = bool((sign * np.diff(means) > 0).all())
                ordered = int((sign * np.diff(table, axis=0) > 0).all(0).sum())
                within = (ordered, len(seeds))
                judged.append(Verdict(ordering, stage, figure, means.tolist(), holds, within))
    return judged


def table(results: Results, order: list[str]) -> list[str]:
    """Return a Markdown table with a row for each arm: mean and standard deviation over seeds."""
    heads = [f"{figure} {stage[-1]}" for stage in STAGES for figure in FIGURES]
    lines = [f"| arm | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for arm in order:
        cells = []
        for stage in STAGES:
            for figure in FIGURES:
                by_seed = list(values(results[arm], stage, figure).values())
                spread = f" ± {np.std(by_seed, ddof=1):.3f}" if len(by_seed) > 1 else ""
                cells.append(f"{np.mean(by_seed):.3f}{spread}" if by_seed else "")
        lines.append(f"| {arm} | {len(results[arm])} | {' | '.join(cells)} |")
    return lines


def verdict_line(verdict: Verdict) -> str:
    """Return a row of the Markdown table of verdicts."""
    means = ", ".join(f"{value:.3f}" for value in verdict.means)
    ordered, seeds = verdict.seeds
    holds = f"{'yes' if verdict.holds else '**no**'}, in {ordered} of {seeds} seeds"
    return f"| {verdict.ordering} | {verdict.figure} | {holds} | {means} |"


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
        "Held-out pictures of the demo corpus: the loss (nats a token), and how much higher it is "
        f"beside another picture (gain), on {settings['measured']}; the right title among "
        f"{settings['choices']}, by likelihood and by what the picture adds to it "
        f"(choice_by_gain) on {settings['chosen']}; after stage 1 and after stage 2; "
        "mean ± standard deviation over seeds.",
        "",
        *table(results, order),
    ]
    judged = verdicts(results)
    for stage in dict.fromkeys(verdict.stage for verdict in judged):
        lines += [
            "",
            f"Orderings after {stage}, by the means of the seeds, worse before better:",
            "",
        ]
        lines += ["| ordering | by | holds | means |", "|---|---|---|---|"]
        lines += [verdict_line(verdict) for verdict in judged if verdict.stage == stage]
    return "\n".join(lines) + "\n"


def draw(path: Path, results: Results, order: list[str]) -> None:
    """Draw the mean loss on held-out pictures against steps, and the seeds of ReAlign as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, 2, figsize=(16, 6), layout="constrained")
    for number, panel in enumerate(panels, 1):
        top = 0.0  # of the axis: the first steps are far above all later ones in every arm
        for color, arm in zip(COLORS, order, strict=False):
            curves = [result[f"curve {number}"] for result in results[arm].values()]
            if not curves[0]:
                continue
            steps = [step for step, _ in curves[0]]
            losses = [[loss for _, loss in curve] for curve in curves]
            style = {"color": color, "ls": "--" if "pairs" in arm else "-"}
            width = 4 if arm == "ReAlign" else 2
            panel.plot(steps, np.mean(losses, axis=0), label=arm, lw=width, **style)
            low, high = np.min(losses, axis=0), np.max(losses, axis=0)
            if arm == "ReAlign":
                panel.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
            top = max(top, *high[len(high) // 3 :])
        panel.set(xlabel="step", ylabel="loss on held-out pictures")
        panel.set_title(f"Stage {number}", loc="left", fontweight="bold")
        panel.set_ylim(top=top + 0.1 if top else None)
    handles = {
        label: line
        for panel in panels
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
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
        "date": min(result["date"] for result in finished),
        "machine": f"{processor()}, {platform.system()}",
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "minutes": round(sum(result["seconds"] for result in finished) / 60, 1),
        "settings": json.loads((out / "settings.json").read_text()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"text_instead_of_pairs_{about['date']}.json"
    content = about | {"verdicts": [verdict._asdict() for verdict in verdicts(results)]}
    path.write_text(json.dumps(content | {"results": finished}, indent=1) + "\n")
    text = page(results, order, about)
    path.with_suffix(".md").write_text(text)
    draw(path.with_suffix(".png"), results, order)
    print(f"{text}\nwrote {path}, .md and .png")
