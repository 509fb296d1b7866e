"""Table, plot and verdicts of `text_instead_of_pairs.py`, from the results it left on disk."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from training_dynamics import processor

STAGES = ("stage 1", "stage 2")
FIGURES = {"loss": -1, "gain": 1, "choice": 1, "choice_by_gain": 1, "cider": 1}  # 1: more is better
STEPS = ("mean shift (step 1)", "steps 1+2", "ReAlign")
ORDERINGS = {  # worse before better; the paper's own averages where it gives them
    "a stage 1 on text as it is helps (paper 43.58, 47.50)": ("no stage 1", "text as it is"),
    "a stage 1 on aligned text helps (paper 43.58, 50.16)": ("no stage 1", "ReAlign"),
    "none < C3 < ReAlign (paper 47.50, 48.06, 50.16)": ("text as it is", "C3", "ReAlign"),
    "step 1 < 1+2 < 1+2+3 (paper 46.68, 48.67, 50.16)": STEPS,
    "real pairs are the ceiling": ("ReAlign", "real pairs"),
    "more text beats fewer pairs, a quarter": ("real pairs, 1/4", "ReAlign"),
    "ReAlign beats CORAL (our question)": ("CORAL, shrunk", "ReAlign"),
}
Results = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> what run_arm returned


class Verdict(NamedTuple):
    """One ordering, by one figure, after one stage."""

    ordering: str
    stage: str
    figure: str
    means: list[float]
    holds: bool  # the means are in order
    seeds: tuple[int, int]  # in how many of how many seeds they are


def load(out: Path) -> Results:
    """Every finished (arm, seed)."""
    found: Results = {}
    for file in sorted((out / "results").glob("*.json")):
        one = json.loads(file.read_text())
        found.setdefault(one["arm"], {})[one["seed"]] = one
    return found


def values(of_arm: dict[int, dict[str, Any]], stage: str, figure: str) -> dict[int, float]:
    """Seed -> figure; empty where an arm has no such stage."""
    return {seed: one[stage][figure]["value"] for seed, one in of_arm.items() if one[stage]}


def verdicts(results: Results) -> list[Verdict]:
    """Which orderings hold; those whose arms have not all run are left out."""
    found = []
    for stage in STAGES:
        for words, arms in ORDERINGS.items():
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
                found.append(Verdict(words, stage, figure, means.tolist(), holds, within))
    return found


def table(results: Results, order: list[str]) -> list[str]:
    """Markdown: an arm a row; mean and standard deviation over seeds."""
    heads = [f"{figure} {stage[-1]}" for stage in STAGES for figure in FIGURES]
    lines = [f"| arm | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for arm in order:
        cells = []
        for stage in STAGES:
            for figure in FIGURES:
                some = list(values(results[arm], stage, figure).values())
                spread = f" ± {np.std(some, ddof=1):.3f}" if len(some) > 1 else ""
                cells.append(f"{np.mean(some):.3f}{spread}" if some else "")
        lines.append(f"| {arm} | {len(results[arm])} | {' | '.join(cells)} |")
    return lines


def spoken(one: Verdict) -> str:
    """A line of the report."""
    means = ", ".join(f"{value:.3f}" for value in one.means)
    holds = f"{'yes' if one.holds else '**no**'}, in {one.seeds[0]} of {one.seeds[1]} seeds"
    return f"| {one.ordering} | {one.figure} | {holds} | {means} |"


def page(results: Results, order: list[str], about: dict[str, Any]) -> str:
    """The report in Markdown."""
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
        f"(choice_by_gain), and CIDEr on {settings['chosen']}; after stage 1 and after stage 2; "
        "mean ± standard deviation over seeds.",
        "",
        *table(results, order),
    ]
    found = verdicts(results)
    for stage in {one.stage: None for one in found}:
        lines += [
            "",
            f"Orderings after {stage}, by the means of the seeds, worse before better:",
            "",
        ]
        lines += ["| ordering | by | holds | means |", "|---|---|---|---|"]
        lines += [spoken(one) for one in found if one.stage == stage]
    return "\n".join(lines) + "\n"


def draw(path: Path, results: Results, order: list[str]) -> None:
    """Loss on held-out pictures against steps, both stages; bands reach over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5))
    for number, panel in enumerate(panels, 1):
        top = 0.0  # the first steps are far above the rest in every arm
        for place, arm in enumerate(order):
            curves = [one[f"curve {number}"] for one in results[arm].values()]
            if not curves[0]:
                continue
            steps, losses = [at for at, _ in curves[0]], [[y for _, y in one] for one in curves]
            style = {"color": f"C{place}", "ls": "--" if "pairs" in arm else "-"}
            panel.plot(steps, np.mean(losses, axis=0), label=arm, **style)
            low, high = np.min(losses, axis=0), np.max(losses, axis=0)
            panel.fill_between(steps, low, high, color=f"C{place}", alpha=0.12, lw=0)
            top = max(top, *high[len(high) // 3 :])
        panel.set(title=f"stage {number}", xlabel="step", ylabel="loss on held-out pictures")
        panel.set_ylim(top=top + 0.1 if top else None)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_report(out: Path, folder: Path, threads: int, order: list[str]) -> None:
    """`folder/text_instead_of_pairs_<date>` .md, .json and .png of what `out` holds; prints it."""
    from transformers import __version__ as transformers_version

    results = load(out)
    order = [arm for arm in order if arm in results]
    every = [one for arm in order for one in results[arm].values()]
    if not every:
        raise SystemExit(f"{out}: holds no results yet; run without --write first")
    about = {
        "date": min(one["date"] for one in every),
        "machine": f"{processor()}, {platform.system()}",
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "minutes": round(sum(one["seconds"] for one in every) / 60, 1),
        "settings": json.loads((out / "settings.json").read_text()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"text_instead_of_pairs_{about['date']}.json"
    found = [one._asdict() for one in verdicts(results)]
    path.write_text(json.dumps(about | {"verdicts": found, "results": every}, indent=1) + "\n")
    text = page(results, order, about)
    path.with_suffix(".md").write_text(text)
    draw(path.with_suffix(".png"), results, order)
    print(f"{text}\nwrote {path}, .md and .png")
