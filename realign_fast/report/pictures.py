"""Pictures of an alignment (matplotlib, the ``report`` extra)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .._extras import import_extra
from ..metrics import matched_cosine, principal_axes
from ..ops.reference import unit

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

    The axes are principal axes of the image rows and the unaligned text rows together: of the
    first ten, the one along which the two means are furthest apart, and the first of the others.
    Both pictures have the same axes. A grey line joins a held-out text to its image.

    Args:
        path: the file to write.
        image: image rows `[N, D]`.
        text: text rows `[M, D]` before and after the alignment.
        held_out_image: image rows `[P, D]` of held-out pairs.
        held_out_text: text rows `[P, D]` of the same pairs, before and after.
        title: the title of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
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
        _draw_clouds(clouds, *((unit(side.double()) - centre) @ axes for side in rows))
        clouds.set_title(f"{state}: rows on principal axes {across + 1} and {along + 1}")
        _draw_cosines(cosines, held_out_image, held_out_text[column])
        cosines.set_title(f"{state}: cosine of held-out texts and images")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_clouds(
    panel: Any, image: Tensor, text: Tensor, pair_image: Tensor, pair_text: Tensor
) -> None:
    """Draw points `[N, 2]` of both sides, and lines between those of pairs `[P, 2]`."""
    for points, colour, name in ((image, _IMAGE, "image"), (text, _TEXT, "text")):
        drawn = points[:: max(1, len(points) // _POINTS)]
        panel.scatter(*drawn.T, s=4, color=colour, alpha=0.35, linewidths=0, label=name)
    ends = torch.stack([pair_image, pair_text])
    panel.plot(ends[:, :, 0], ends[:, :, 1], color=_PAIR, lw=0.4, alpha=0.4)
    panel.legend(markerscale=4, loc="upper right")


def _draw_cosines(panel: Any, image: Tensor, text: Tensor) -> None:
    images = {"matched": image, "shuffled": image.roll(1, dims=0)}
    for (name, partner), colour in zip(images.items(), (_TEXT, _PAIR), strict=True):
        values = matched_cosine(text, partner)
        bins = torch.linspace(-0.4, 0.8, 49)
        panel.hist(values, bins=bins, density=True, alpha=0.6, color=colour, label=name)
    panel.set_yticks([])
    panel.legend()


def _pyplot() -> Any:
    matplotlib = import_extra("matplotlib", "report", "Drawing")
    matplotlib.use("Agg")
    return import_extra("matplotlib.pyplot", "report", "Drawing").pyplot
