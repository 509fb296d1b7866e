"""Draw the pictures of the concept pages from the built-in embeddings.

    python docs/pictures.py            # writes docs/images/*.png, in half a minute

Texts are blue and images are vermilion in every picture, as in the report of a run. Colour-blind
readers can tell these two colours apart (Okabe and Ito).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from realign_fast import Corpus, Moments, ReAlign, SharedSpace, metrics
from realign_fast.demo import DATA
from realign_fast.ops.reference import unit

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

IMAGES = Path(__file__).resolve().parent / "images"
TEXT, IMAGE, GREY = "#0072B2", "#D55E00", "#6b6b6b"
BEFORE, AFTER = "#6b6b6b", "#009E73"  # in pictures that do not show modalities
STYLE = {
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 100,
}
MAPS = {  # the name in the picture, and the method
    "mean-shift": "mean-shift",
    "ReAlign": "realign",
    "CORAL": "coral",
    "optimal transport": "optimal-transport",
}


def load_rows(path: Path, modality: str) -> Tensor:
    """Return all rows of one side of the built-in corpus, float64 of unit length."""
    corpus = Corpus(path, modality)
    return unit(corpus.take(range(corpus.num_rows)).double())


def draw_plane(panel: Axes, sides: dict[str, Tensor], axes: Tensor, centre: Tensor) -> None:
    """Draw some 240 rows of each side in a plane, with an ellipse of two standard deviations."""
    for name, colour in (("text", TEXT), ("image", IMAGE)):
        places = (sides[name] - centre) @ axes.T
        spread, mean = torch.cov(places.T), places.mean(dim=0)
        variances, directions = torch.linalg.eigh(spread)
        width, height = (4 * variances.sqrt()).tolist()
        angle = float(torch.rad2deg(torch.atan2(directions[1, 0], directions[0, 0])))
        shown = places[:: len(places) // 240]
        panel.scatter(shown[:, 0], shown[:, 1], s=9, color=colour, alpha=0.25, linewidths=0)
        ellipse = Ellipse(tuple(mean.tolist()), width, height, angle=angle, fill=False)
        ellipse.set(edgecolor=colour, linewidth=2.5)
        panel.add_patch(ellipse)
        panel.plot(*mean, "o", color=colour, markersize=10, markeredgecolor="white")
    panel.set_aspect("equal")


def gap_plane(text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return two axes [2, D] and a centre [D]: the line of the centroids, and the widest across."""
    line = unit(image.mean(dim=0) - text.mean(dim=0))
    across = torch.cat([side - side.mean(dim=0) for side in (text, image)])
    across = across - (across @ line)[:, None] * line
    widest = torch.linalg.eigh(across.T @ across)[1][:, -1]
    return torch.stack([line, widest]), (text.mean(dim=0) + image.mean(dim=0)) / 2


def draw_density(panel: Axes, values: Tensor, colour: str, label: str, **options: object) -> None:
    """Draw a smoothed density of values, filled."""
    low, high = float(values.min()) - 0.1, float(values.max()) + 0.1
    counts, edges = np.histogram(values.numpy(), bins=200, range=(low, high), density=True)
    weights = np.exp(-0.5 * (np.arange(-20, 21) / 6.0) ** 2)
    density = np.convolve(counts, weights / weights.sum(), mode="same")
    panel.fill_between((edges[1:] + edges[:-1]) / 2, density, color=colour, alpha=0.45, lw=0)
    panel.plot((edges[1:] + edges[:-1]) / 2, density, color=colour, lw=2, label=label, **options)


def draw_gap(text: Tensor, image: Tensor, pairs: dict[str, Tensor]) -> None:
    """Draw the two clouds, and the cosines that the gap makes misleading."""
    figure, (plane, cosines) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1.15, 1))
    axes, centre = gap_plane(text, image)
    axes = axes.flip(0)  # the line between the centroids is vertical here
    draw_plane(plane, {"text": text, "image": image}, axes, centre)
    ends = [((side.mean(dim=0) - centre) @ axes.T).tolist() for side in (text, image)]
    arrow = {"arrowstyle": "<->", "lw": 2.5, "shrinkA": 6, "shrinkB": 6}
    plane.annotate("", ends[0], ends[1], arrowprops=arrow)
    gap = float((text.mean(dim=0) - image.mean(dim=0)).norm())
    label = {"fontsize": 16, "fontweight": "bold", "va": "center"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    plane.text(0.04, 0.0, f"gap {gap:.2f}", bbox=box, **label)
    for place, name, colour in ((-0.45, "texts", TEXT), (0.45, "images", IMAGE)):
        plane.text(-0.78, place, name, color=colour, fontsize=17, fontweight="bold", va="center")
    plane.set(ylabel="between the centroids", xlabel="widest direction across", xlim=(-0.8, 0.85))
    plane.set_title("One space, two clouds")
    different = ~torch.eye(len(pairs["text"]), dtype=torch.bool)
    for kind, colour, label, place in (
        ("image", GREY, "any image", (-0.3, 2.7)),
        ("text", TEXT, "any other text", (-0.33, 1.9)),
    ):
        values = (pairs["text"] @ pairs[kind].T)[different][::7]
        draw_density(cosines, values, colour, label)
        cosines.text(*place, label, color=colour, fontweight="bold", ha="center")
    draw_density(cosines, (pairs["text"] * pairs["image"]).sum(dim=1), IMAGE, "its own image")
    cosines.text(0.5, 2.7, "its own image", color=IMAGE, fontweight="bold")
    cosines.set(xlabel="cosine of a text and ...", yticks=[], xlim=(-0.6, 0.95), ylim=(0, None))
    cosines.spines["left"].set_visible(False)
    cosines.set_title("To a text, every text looks close")
    figure.savefig(IMAGES / "gap.png")


def draw_maps(text: Tensor, image: Tensor) -> None:
    """Draw what each map does to the cloud of the texts, with three figures below each panel."""
    figure, panels = pyplot.subplots(1, 5, figsize=(16, 5.2), sharex=True, sharey=True)
    axes, centre = gap_plane(text, image)
    shown, few = {"before": text}, text[::7]
    shown |= {name: ReAlign.fit(text, image, method=way)(text) for name, way in MAPS.items()}
    target = Moments(covariance=True).update(image)
    for panel, (name, rows) in zip(panels, shown.items(), strict=True):
        draw_plane(panel, {"text": rows, "image": image}, axes, centre)
        source = Moments(covariance=True).update(rows)
        lines = [
            f"gap {float(metrics.centroid_gap(source, target)):.4f}",
            f"spread {float(metrics.trace_ratio(source, target)):.2f}",
            f"shape {metrics.covariance_distance(source, target):.2f}",
            f"neighbours {float(metrics.knn_overlap(few, rows[::7])):.0%}",
        ]
        panel.set_title(name, loc="center")
        panel.set_xlabel("\n".join(lines), linespacing=1.4)
        panel.set(xticks=[], yticks=[])
        panel.spines[["left", "bottom"]].set_visible(False)
    figure.savefig(IMAGES / "maps.png")


def draw_scores(pairs: dict[str, Tensor]) -> None:
    """Draw the scores of text queries against both kinds of documents, before and after."""
    text, image = pairs["text"], pairs["image"]
    space = SharedSpace.fit(text=text, image=image)
    stored = (
        ("As the encoder gives them", text, text, image),
        ("In a SharedSpace", space.query(text), space.text(text), space.image(image)),
    )
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.2))
    for panel, (title, queries, texts, images) in zip(panels, stored, strict=True):
        others = ~torch.eye(len(text), dtype=torch.bool)
        draw_density(panel, (queries @ texts.T)[others][::7], TEXT, "texts")
        draw_density(panel, (queries @ images.T)[others][::7], IMAGE, "images")
        answers = (queries * images).sum(dim=1)
        draw_density(panel, answers, "black", "the right image", linestyle="--")
        panel.collections[-1].set_alpha(0)
        panel.set_title(title)
        panel.set(xlabel="score of a text query", yticks=[])
        panel.spines["left"].set_visible(False)
    panels[1].legend(frameon=False, loc="upper right")
    figure.savefig(IMAGES / "scores.png")


def recall_by_map(
    fitted: dict[str, Tensor], pairs: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield each way to store rows, and its share of texts with their image among the first 10."""
    text, image = pairs["text"], pairs["image"]
    space = SharedSpace.fit(**fitted)

    def recall(queries: Tensor, documents: Tensor) -> float:
        """Return the share of queries with their own document among the first 10."""
        nearest = (queries @ documents.T).topk(10).indices
        return float((nearest == torch.arange(len(text))[:, None]).any(dim=1).double().mean())

    yield "encoder's rows", recall(text, image)
    for name, method in MAPS.items():
        aligned = ReAlign.fit(fitted["text"], fitted["image"], method=method)(text)
        yield name, recall(aligned, image)
    yield "SharedSpace", recall(space.query(text), space.image(image))


def draw_search(fitted: dict[str, Tensor], pairs: dict[str, Tensor]) -> None:
    """Draw recall among images alone: aligning texts does not help a search."""
    figure, panel = pyplot.subplots(figsize=(9, 4.2))
    names, recalls = zip(*recall_by_map(fitted, pairs), strict=True)
    colours = [BEFORE, *["#0072B2"] * len(MAPS), AFTER]
    panel.barh(names, [100 * recall for recall in recalls], color=colours)
    for place, recall in enumerate(recalls):
        panel.text(100 * recall - 1, place, f"{recall:.0%}", color="white", ha="right", va="center")
    panel.axvline(100 * recalls[0], color="black", linestyle="--", linewidth=1.5)
    panel.invert_yaxis()
    panel.set_xlabel("texts that find their image among 400 images, first 10, %")
    panel.set_title("Maps of one side do not improve search")
    figure.savefig(IMAGES / "search.png")


def draw_floor(text: Tensor, image: Tensor, repeats: int = 8) -> None:
    """Draw the gap after ReAlign against the number of fitting rows, beside the floor."""
    counts = [25, 50, 100, 200, 400, 800, 1600]
    generator = torch.Generator().manual_seed(0)
    text, image = (side[torch.randperm(len(side), generator=generator)] for side in (text, image))
    new_text, new_image = text[3345:], image[1676:]
    gaps: dict[str, list[float]] = {"fitted": [], "new": [], "floor": []}
    for count in counts:
        runs = []
        for _ in range(repeats):
            some = [
                side[torch.randperm(size, generator=generator)[:count]]
                for side, size in ((text, 3345), (image, 1676))
            ]
            aligner = ReAlign.fit(*some)
            moments = Moments().update(aligner(new_text)), Moments().update(new_image)
            runs.append((aligner.residual_gap, metrics.centroid_gap(*moments)))
        fitted, new = torch.tensor(runs, dtype=torch.float64).square().mean(dim=0).sqrt().tolist()
        gaps["fitted"].append(fitted)
        gaps["new"].append(new)
        trace = moments[1].trace
        sizes = count, count, len(new_text), len(new_image)
        gaps["floor"].append(metrics.sampling_gap(trace, *sizes))
    figure, panel = pyplot.subplots(figsize=(9, 4.6))
    lines = (
        ("new", "new rows", AFTER, "o-"),
        ("floor", "statistical floor", "black", "--"),
        ("fitted", "the rows that it was fitted on", BEFORE, "s-"),
    )
    for key, label, colour, style in lines:
        panel.loglog(counts, gaps[key], style, color=colour, label=label, lw=2.5, markersize=8)
    panel.legend(frameon=False, loc="center right")
    panel.set_xticks(counts, [f"{count:,}" for count in counts])
    panel.minorticks_off()
    panel.set(xlabel="rows of each side that the map was fitted on", ylabel="gap after ReAlign")
    panel.set_title("What remains is sampling")
    figure.savefig(IMAGES / "floor.png")


def draw_quantised() -> None:
    """Draw the table of `examples/quantised_search.py` in shared_space_method.md."""
    figure, panel = pyplot.subplots(figsize=(9, 4.2))
    spreads = ("small (.05)", "medium (.15)", "large (.30)")
    found = {"encoder's rows": (0.854, 0.684, 0.196), "SharedSpace": (0.990, 0.982, 0.736)}
    for shift, colour, (name, recalls) in zip(
        (-0.2, 0.2), (BEFORE, AFTER), found.items(), strict=True
    ):
        places = [place + shift for place in range(len(spreads))]
        panel.bar(places, recalls, 0.38, color=colour, label=name)
        for place, recall in zip(places, recalls, strict=True):
            panel.text(place, recall + 0.02, f"{recall:.2f}", ha="center")
    panel.set_xticks(range(len(spreads)), spreads)
    panel.set(
        xlabel="spread of the images along the mean of the texts", ylabel="R@10", ylim=(0, 1.1)
    )
    panel.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    figure.savefig(IMAGES / "quantised.png")


def draw_job_array() -> None:
    """Draw the rounds of a job array and the job that ends them."""
    figure, panel = pyplot.subplots(figsize=(9, 2.6))
    steps = {"statistics": 4, "drift": 4, "apply": 4, "end": 1}
    for place, (step, jobs) in enumerate(steps.items()):
        for job in range(jobs):
            left, bottom = 2 * place + 0.09 * job, 0.12 * job
            colour = BEFORE if jobs == 1 else AFTER
            box = pyplot.Rectangle((left, bottom), 1.2, 0.8, facecolor=colour, edgecolor="white")
            panel.add_patch(box)
        label = {"ha": "center", "va": "center", "color": "white", "fontweight": "bold"}
        panel.text(left + 0.6, bottom + 0.4, step, **label)
        if place:
            arrow = {"arrowstyle": "->", "lw": 2.5}
            panel.annotate("", (2 * place - 0.05, 0.4), (2 * place - 0.42, 0.4), arrowprops=arrow)
    panel.text(0, -0.35, "green: an array of jobs, each with its part of the shards", color=AFTER)
    panel.text(4.5, -0.35, "grey: one job without a part", color=BEFORE)
    panel.set(xlim=(-0.1, 7.4), ylim=(-0.5, 1.4), aspect="auto")
    panel.axis("off")
    figure.savefig(IMAGES / "job_array.png")


def main() -> None:
    """Draw every picture into docs/images/."""
    IMAGES.mkdir(exist_ok=True)
    text, image = load_rows(DATA, "text"), load_rows(DATA, "image")
    pairs = {name: load_rows(DATA / "heldout", name) for name in ("text", "image")}
    with pyplot.rc_context(STYLE):
        draw_gap(text, image, pairs)
        draw_maps(text, image)
        draw_scores(pairs)
        draw_search({"text": text, "image": image}, pairs)
        draw_floor(text, image)
        draw_quantised()
        draw_job_array()


if __name__ == "__main__":
    main()
