"""Pictures of an alignment (matplotlib, the ``report`` extra)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._extras import import_extra
from ..ops.reference import unit
from ..storage.atomic import replaced

# Told apart by colour-blind readers (Okabe and Ito).
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#8a8a8a"
_TITLE: dict[str, Any] = {"loc": "left", "pad": 18, "fontsize": 19, "fontweight": "bold"}


def draw_demo(
    path: str | os.PathLike[str],
    rows: Mapping[str, Tensor],
    aligned_text: Tensor,
    summary: Mapping[str, Any],
) -> None:
    """Draw the three answers of the demo as a PNG, a panel for each.

    Args:
        rows: unit rows [N, D] by modality, as the encoder gives them.
        aligned_text: the rows of the texts after the alignment.
        summary: the contents of ``demo.json``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import_extra("matplotlib", "report", "Drawing").use("Agg")
    pyplot = import_extra("matplotlib.pyplot", "report", "Drawing").pyplot
    with pyplot.rc_context({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(18, 5.6), layout="constrained")
        panels = figure.subplots(1, 3)
        _draw_clouds(panels[0], rows, aligned_text)
        _draw_search(panels[1], summary["search"])
        _draw_substitution(panels[2], summary["substitution"])
        with replaced(Path(path)) as partial:
            figure.savefig(partial, dpi=100)
        pyplot.close(figure)


def _draw_clouds(panel: Any, rows: Mapping[str, Tensor], aligned_text: Tensor) -> None:
    """Draw how texts and images lie along the line between their centroids, before and after."""
    centre = (rows["text"].mean(dim=0) + rows["image"].mean(dim=0)) / 2
    line = unit(rows["image"].mean(dim=0) - rows["text"].mean(dim=0))
    heights = {}
    for base, text in ((1.15, rows["text"]), (0.0, aligned_text)):
        for name, side, colour in (("images", rows["image"], BLUE), ("texts", text, VERMILION)):
            density, edges = _density((side - centre) @ line)
            heights[base, name] = edges[int(density.argmax())]
            panel.fill_between(edges, base, base + density, color=colour, alpha=0.55, lw=0)
    for name, colour, align in (("texts", VERMILION, "right"), ("images", BLUE, "left")):
        place = heights[1.15, name]
        panel.text(place, 2.22, name, color=colour, ha=align, fontweight="bold")
    panel.set_title("1. The gap is closed", **_TITLE)
    panel.set(
        yticks=[1.15, 0.0],
        xlim=(-0.6, 0.65),
        xlabel="position along the line between the centroids",
    )
    panel.set_yticklabels(["before", "after"], va="bottom")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def _density(values: Tensor) -> tuple[Any, Any]:
    """Return a smoothed density of values [N], at most 1, and the places that it is given at."""
    import numpy as np

    counts, edges = np.histogram(values.numpy(), bins=160, range=(-0.8, 0.8))
    weights = np.exp(-0.5 * (np.arange(-12, 13) / 3.0) ** 2)
    density = np.convolve(counts, weights, mode="same")
    return density / density.max(), (edges[1:] + edges[:-1]) / 2


def _draw_search(panel: Any, search: Mapping[str, Any]) -> None:
    """Draw how often a text finds its image in one index of both modalities, before and after."""
    for place, stage in enumerate(("before", "after")):
        height, error = 100 * search[stage], 196 * search[f"{stage}_error"]
        panel.bar(place, height, 0.62, yerr=error, color=(GREY, BLUE)[place], capsize=5)
        panel.text(place, height + error + 1.5, f"{height:.0f}%", ha="center", fontweight="bold")
    alone = 100 * search["images_alone"]
    panel.axhline(alone, color=VERMILION, linestyle="--", linewidth=2)
    panel.text(-0.45, alone + 1.5, "images alone", color=VERMILION)
    panel.set_title("2. One index finds both", **_TITLE)
    panel.set(xlim=(-0.5, 1.5), ylim=(0, alone * 1.25), ylabel="texts that find their image, %")
    panel.set_xticks([0, 1], ["encoder's rows", "SharedSpace"])


def _draw_substitution(panel: Any, substitution: Mapping[str, Any]) -> None:
    """Draw the share of the distance from texts to real images that centred texts close."""
    share, (low, high) = 100 * substitution["share_closed"], substitution["interval"]
    panel.barh([0], [share], 0.5, color=BLUE)
    panel.errorbar([share], [0], xerr=[[share - 100 * low], [100 * high - share]], color="k", lw=2)
    panel.text(share / 2, 0, f"{share:.0f}%", color="white", ha="center", va="center", fontsize=24)
    for place, text, align in ((0, "texts\nas they are", "left"), (100, "real\nimages", "right")):
        panel.axvline(place, color=VERMILION, linestyle="--", linewidth=2)
        panel.text(place + (1 if align == "left" else -1), 0.62, text, color=VERMILION, ha=align)
    panel.set_title("3. Texts can stand for images", **_TITLE)
    panel.set(xlim=(-4, 104), ylim=(-0.6, 1.0), yticks=[])
    panel.set_xlabel("trained on texts, tested on images:\nshare of the distance closed, %")
    panel.spines["left"].set_visible(False)
