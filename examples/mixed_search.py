"""Texts and images in one vector index: recall of each way to store and to query them.

A caption is the query; the gallery holds the images and all other captions. Statistics come from
one half of the pairs without their pairing, the search is among the other half, over several
splits. The same is done with images as queries. From the root of the repository:

    python examples/mixed_search.py                       # the built-in corpus, seconds
    python examples/mixed_search.py --pairs rows.npy      # your own: [2, N, D], texts first
    python examples/mixed_search.py --plot mixed.png

A second table shows what text queries lose whose right answer is a text (the other caption that the
encoder places nearest), and what changes if a number is subtracted from the scores of all images.

Each line shows the mean over the splits and, in brackets, its standard error in the last digit
that is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import realign_fast
from realign_fast import ReAlign, SharedSpace, metrics

DEMO = Path(realign_fast.__file__).parent / "demo" / "data" / "heldout"
BLUE, VERMILION = "#0072B2", "#D55E00"  # told apart by colour-blind readers (Okabe and Ito)
OTHER = {"text": "image", "image": "text"}
Rows = dict[str, Tensor]  # by modality
# The rows fitted on, the rows searched and the role of the queries; returns queries and documents.
Way = Callable[[Rows, Rows, str], tuple[Tensor, Rows]]


def as_they_are(fitted: Rows, searched: Rows, role: str) -> tuple[Tensor, Rows]:
    """Rows as the encoder gives them."""
    return searched[role], searched


def transported(fitted: Rows, searched: Rows, role: str) -> tuple[Tensor, Rows]:
    """Rows of the queries' modality moved to the other by optimal transport, shrunk by OAS."""
    options = dict(method="optimal-transport", shrinkage="oas", residual=False)
    aligner = ReAlign.fit(fitted[role], fitted[OTHER[role]], **options)
    moved = aligner(searched[role])
    return moved, searched | {role: moved}


def in_a_space(**options: str) -> Way:
    """Rows of a `SharedSpace`; `blocks` serves both roles, a single index one."""

    def way(fitted: Rows, searched: Rows, role: str) -> tuple[Tensor, Rows]:
        space = SharedSpace.fit(**fitted, query_role=role, **options)
        stored = {name: space.documents(name, rows) for name, rows in searched.items()}
        return space.query(searched[role], role), stored

    return way


def z_scores(fitted: Rows, searched: Rows, role: str) -> tuple[Tensor, Rows]:
    """Rows whose inner products are the z-scores of each query: two searches, merged by score."""
    space = SharedSpace.fit(**fitted, query_role=role, method="calibrate")
    queries, stored = [], {}
    for number, (name, rows) in enumerate(searched.items()):
        side = space.sides[name]
        deviations = ((searched[role] @ side.covariance) * searched[role]).sum(dim=1).sqrt()
        queries.append(searched[role] / deviations[:, None])
        blocks = [torch.zeros_like(rows)] * len(searched)
        blocks[number] = rows - side.centre
        stored[name] = torch.cat(blocks, dim=1)
    return torch.cat(queries, dim=1), stored


WAYS: dict[str, Way] = {
    "as the encoder gives them": as_they_are,
    "optimal transport, OAS": transported,
    "z-scores of each query (two searches)": z_scores,
    "centred (GR-CLIP)": in_a_space(method="center"),
    "calibrated": in_a_space(method="calibrate"),
    "centred and calibrated": in_a_space(method="center-calibrate"),
    "chosen by SharedSpace (auto)": in_a_space(),
    "one index for both roles (blocks)": in_a_space(layout="blocks"),
}


def figures(way: Way, rows: Rows, role: str, seed: int) -> list[float]:
    """Return R@1 and R@10 in the mixed gallery and in that of the other modality, of one split."""
    order = torch.randperm(len(rows["text"]), generator=torch.Generator().manual_seed(seed))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    fitted, searched = ({name: side[half] for name, side in rows.items()} for half in halves)
    queries, stored = way(fitted, searched, role)
    number = torch.arange(len(queries))
    found = metrics.mixed_gallery(queries, stored, {OTHER[role]: number}, own={role: number})
    pure = found.pure_recall
    return [found.recall[1], found.recall[10], pure[1], pure[10]]


def measure(rows: Rows, splits: int) -> dict[str, dict[str, Tensor]]:
    """Return the figures [splits, 4] of each way for each role of the queries."""
    return {
        name: {
            role: torch.tensor([figures(way, rows, role, seed) for seed in range(splits)])
            for role in OTHER
        }
        for name, way in WAYS.items()
    }


def balance(rows: Rows, splits: int, offsets: tuple[float, ...] = (0, 0.25, 0.5, 1)) -> str:
    """Return a table of text queries whose images score less by an offset, one line for each.

    An index of inner products subtracts it by one more column: 1 in the queries, 0 in the texts and
    the negative offset in the images.
    """
    found: dict[float, list[list[float]]] = {offset: [] for offset in offsets}
    for seed in range(splits):
        order = torch.randperm(len(rows["text"]), generator=torch.Generator().manual_seed(seed))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        fitted, searched = ({name: side[half] for name, side in rows.items()} for half in halves)
        space, number = SharedSpace.fit(**fitted), torch.arange(len(halves[1]))
        cosines = searched["text"] @ searched["text"].T
        nearest = cosines.fill_diagonal_(-2).argmax(dim=1)
        one = torch.ones(len(number), 1, dtype=torch.float64)
        queries = torch.cat([space.query(searched["text"]), one], dim=1)
        for offset, results in found.items():
            stored = {
                name: torch.cat([space.documents(name, side), column * one], dim=1)
                for (name, side), column in zip(searched.items(), (0, -offset), strict=True)
            }
            text, image = (
                metrics.mixed_gallery(queries, stored, {name: rows}, own={"text": number})
                for name, rows in (("text", nearest), ("image", number))
            )
            results.append([text.recall[10], image.recall[10], image.shares["image"]])
    lines = ["| offset | R@10, nearest caption | R@10, image | images of the first ten |"]
    lines.append("|---" * 4 + "|")
    for offset, results in found.items():
        means = torch.tensor(results).mean(dim=0).tolist()
        lines.append(f"| {offset:g} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def table(results: dict[str, dict[str, Tensor]]) -> str:
    """Return a table in Markdown: a line for each way, four figures for each role."""
    heads = ["mixed R@1", "mixed R@10", "pure R@1", "pure R@10"]
    columns = [f"{role} queries, {head}" for role in OTHER for head in heads]
    lines = [f"| documents | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, by_role in results.items():
        cells = []
        for values in by_role.values():
            errors = values.std(dim=0) / len(values) ** 0.5
            cells += [
                f"{mean:.3f} ({1000 * error:.0f})"
                for mean, error in zip(values.mean(dim=0), errors, strict=True)
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Draw R@10 in the mixed gallery, a panel for each role, beside that of one modality alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 15
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    places = np.arange(len(results))
    for panel, role in zip(panels, OTHER, strict=True):
        values = torch.stack([by_role[role] for by_role in results.values()])
        means, errors = values.mean(1), values.std(1) / values.shape[1] ** 0.5
        colours = ["#999999" if name == "as the encoder gives them" else BLUE for name in results]
        panel.barh(places, means[:, 1], 0.7, xerr=2 * errors[:, 1], color=colours)
        for place, mean in zip(places, means[:, 1].tolist(), strict=True):
            panel.text(
                0.02, place, f"{mean:.2f}", va="center", color="white" if mean > 0.2 else "k"
            )
        pure = float(means[0, 3])
        panel.axvline(pure, color=VERMILION, linestyle="--", linewidth=2.5)
        panel.text(pure, -0.75, f"{OTHER[role]}s alone", color=VERMILION, ha="right")
        panel.set_title(f"{role} queries", loc="left", pad=30)
        panel.set(xlabel="R@10 among texts and images", xlim=(0, 1))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, list(results))
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure the ways on the rows that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=Path, help="[2, N, D] .npy of N pairs, texts first")
    parser.add_argument("--splits", type=int, default=10, help="number of splits, default 10")
    parser.add_argument("--plot", type=Path, help="write a picture to this file")
    options = parser.parse_args()
    paths = [DEMO / f"{side}_emb" / f"{side}_emb_0.npy" for side in ("text", "img")]
    arrays = np.load(options.pairs) if options.pairs else [np.load(path) for path in paths]
    rows = {
        name: torch.nn.functional.normalize(torch.from_numpy(array).double(), dim=1)
        for name, array in zip(OTHER, arrays, strict=True)
    }
    results = measure(rows, options.splits)
    print(table(results))
    print(balance(rows, options.splits))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
