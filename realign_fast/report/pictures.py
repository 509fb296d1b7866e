"""Pictures of an alignment (matplotlib, the ``report`` extra)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import import_extra
from ..metrics import matched_cosine, principal_axes
from ..ops.reference import unit
from ..storage.atomic import replaced

_TEXT, _IMAGE, _PAIR = "#d1495b", "#2e6f95", "#9a9a9a"
_POINTS = 1500  # points drawn of each cloud


def draw_alignment(
    path: str | os.PathLike[str],
    image: Tensor,
    text: tuple[Tensor, Tensor],
    held_out_image: Tensor,
    held_out_text: tuple[Tensor, Tensor],
    title: str,
) -> None:
    """Draw both clouds on two principal axes and the cosines of pairs, before and after, as a PNG.

    Rows are ``image`` [N, D], held-out pairs [P, D], and texts before and after the alignment. The
    axes are principal axes of images and unaligned texts together: of the first ten, the one along
    which the means are furthest apart, and the first of the others. A grey line joins a held-out
    text to its image. Without matplotlib it raises an ImportError.
    """
    import_extra("matplotlib", "report", "Drawing").use("Agg")
    pyplot = import_extra("matplotlib.pyplot", "report", "Drawing").pyplot
    centre, axes = principal_axes(torch.cat([image, text[0]]), 10)
    apart = (unit(image.double()).mean(0) - unit(text[0].double()).mean(0)) @ axes
    across = int(apart.abs().argmax())
    along = 1 if across == 0 else 0
    axes = axes[:, [across, along]]
    figure, panels = pyplot.subplots(
        2, 2, figsize=(11, 9), height_ratios=(2, 1), sharex="row", sharey="row"
    )
    for column, state in enumerate(("before", "after")):
        clouds, cosines = panels[0][column], panels[1][column]
        rows = (image, text[column], held_out_image, held_out_text[column])
        points = [(unit(side.double()) - centre) @ axes for side in rows]
        for cloud, colour, name in ((points[0], _IMAGE, "image"), (points[1], _TEXT, "text")):
            drawn = cloud[:: max(1, len(cloud) // _POINTS)]
            clouds.scatter(*drawn.T, s=4, color=colour, alpha=0.35, linewidths=0, label=name)
        ends = torch.stack(points[2:])
        clouds.plot(ends[:, :, 0], ends[:, :, 1], color=_PAIR, lw=0.4, alpha=0.4)
        clouds.legend(markerscale=4, loc="upper right")
        clouds.set_title(f"{state}: rows on principal axes {across + 1} and {along + 1}")
        _draw_cosines(cosines, held_out_image, held_out_text[column])
        cosines.set_title(f"{state}: cosine of held-out texts and images")
    figure.suptitle(title)
    figure.tight_layout()
    with replaced(Path(path)) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)


def _draw_cosines(panel: Any, image: Tensor, text: Tensor) -> None:
    images = (("matched", image, _TEXT), ("shuffled", image.roll(1, dims=0), _PAIR))
    for name, partner, colour in images:
        values = matched_cosine(text, partner)
        bins = torch.linspace(-0.4, 0.8, 49)
        panel.hist(values, bins=bins, density=True, alpha=0.6, color=colour, label=name)
    panel.set_yticks([])
    panel.legend()
