"""Which map of texts serves a reader of images best? The study of docs/text_instead_of_pairs.md.

Small readers (`metrics.substitution`) are trained on text rows that a map moved, and tested on
image rows. The share closed says how much of the distance between unmoved texts (0) and as many
images (1) a map closes. One command measures every map of the family and its steps, both sides
centred, a calibrated space, noise, shrinkages, samples from 25 rows to all and the closed-form
start of AnisoAlign (arXiv 2605.07825), on the demo corpus, on COCO pairs, on checkpoints of
`training_dynamics.py` and on synthetic rows whose gap is known exactly.

    python examples/substitution_study.py OUT                        # demo corpus, synthetic rows
    python examples/substitution_study.py OUT --pairs coco.npy       # [2, N, D]: images, texts
    python examples/substitution_study.py OUT --checkpoints dynamics/rows
    python examples/substitution_study.py OUT --only "demo" --seeds 2
    python examples/substitution_study.py OUT --jobs 2                  # two processes

Each task and seed writes OUT/cells/TASK/SEED.json and is not measured again, so a stopped run
continues with the same command. OUT/study.md holds the tables, OUT/study.json their numbers.

Every reader is checked on a tenth of the images that are not tested, and keeps its best weights
(`Reader.held_out`). The tasks `stop` show why: with a fixed number of steps, the share depends on
that number. The tasks `own rows` show that held-out texts would not do: their loss still falls when
that on images has long been rising.

A demo row is labelled by the hashed words of its caption. Rows of pairs without captions are
labelled by the 32 leading principal components of the sum of both sides, each centred. That is what
a pair has in common, and it favours maps that keep directions as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from realign_fast import Corpus, Moments, ReAlign, SharedSpace
from realign_fast.demo import DATA
from realign_fast.metrics import Reader, hashed_words, substitution

RowMap = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, Tensor], tuple[RowMap, RowMap | None]]
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5%, from 1 degree
SHARED_COMPONENTS = 32  # labels of pairs without captions
READER = Reader(steps=4000, batch=64, held_out=0.1)
TRANSPORT: dict[str, Any] = {"method": "optimal-transport", "shrinkage": "oas"}
FIXED_STEPS = (100, 200, 400, 800, 1600, 3200)
SEEDS, FEWER_SEEDS = 5, 2  # of the tasks that decide an ordering, and of the others


def unit(rows: Tensor) -> Tensor:
    """Return rows [N, D] of length 1."""
    return torch.nn.functional.normalize(rows, dim=1)


@dataclass(frozen=True)
class Data:
    """Unit rows of both sides with labels of one kind; what is tested is the argument `test`."""

    text: Tensor  # [N, D]
    image: Tensor  # [M, D]
    text_labels: Tensor
    image_labels: Tensor
    test: float | Tensor = 0.2
    partners: Tensor | None = None
    maps: Mapping[str, RowMap] = field(default_factory=dict)  # the gap itself, where it is known


@dataclass(frozen=True)
class Task:
    """Readers that are compared with each other."""

    data: Callable[[int], Data]  # of a seed
    arms: Mapping[str, Fit]
    reader: Reader = READER
    seeds: int = FEWER_SEEDS  # unless --seeds says how many


# --- the maps -------------------------------------------------------------------------------------


def family(
    last_step: bool = True, rows: int | None = None, images: int | None = None, **options: Any
) -> Fit:
    """Return the fit of a map of the family; the last step is optional.

    It is fitted on `rows` of each side, or on all texts and this number of `images`.
    """

    def fit(text: Tensor, image: Tensor) -> tuple[RowMap, None]:
        text, image = some(text, rows), some(image, rows or images)
        if last_step:
            return ReAlign.fit(text, image, residual=False, **options), None
        sides = (Moments().update(side) for side in (text, image))
        return ReAlign.from_moments(*sides, **options), None

    return fit


def space(method: Any, rows: int | None = None) -> Fit:
    """Return the fit of a space, which moves both sides.

    One factor makes the mean square length of images 1, since readers learn faster from long rows.
    """

    def fit(text: Tensor, image: Tensor) -> tuple[RowMap, RowMap]:
        fitted = SharedSpace.fit(text=some(text, rows), image=some(image, rows), method=method)
        factor = float(fitted.image(image).square().sum(1).mean()) ** -0.5
        return lambda rows: factor * fitted.text(rows), lambda rows: factor * fitted.image(rows)

    return fit


def some(rows: Tensor, count: int | None) -> Tensor:
    """Return `count` rows, spread evenly, or all."""
    if count is None or count >= len(rows):
        return rows
    return rows[torch.arange(count) * len(rows) // count]


def aniso_start(
    energy: float = 0.9, ridge: float = 1e-6, epsilon: float = 1e-12, neighbours: bool = True
) -> Fit:
    """Return the fit of AnisoAlign's closed-form start (arXiv 2605.07825).

    In the leading eigenvectors of `S_text + S_image + ridge I`, pairs of coordinates of the
    anchored row keep their phase, and their radius takes the place in the images' radii that it has
    in the texts'. The other coordinates are scaled to the images' standard deviations. Then come
    the sphere, the centroid step and the sphere.

    The paper leaves open: how many directions lead (here those of `energy`, an even number), the
    ridge, and which coordinates make a pair (`neighbours`: 1 with 2, 3 with 4; else 1 with the
    first of the second half). Quantiles between rows are interpolated.
    """

    def fit(text: Tensor, image: Tensor) -> tuple[RowMap, None]:
        y, x = unit(text.double()), unit(image.double())
        text_mean, image_mean = y.mean(0), x.mean(0)
        total = torch.cov(y.T) + torch.cov(x.T) + ridge * torch.eye(y.shape[1], dtype=y.dtype)
        values, vectors = torch.linalg.eigh(total)
        values, vectors = values.flip(0), vectors.flip(1)
        rank = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
        rank = min(rank + rank % 2, len(values) // 2 * 2)
        frame = vectors[:, :rank]
        order = torch.arange(rank).view(-1, 2).T if neighbours else torch.arange(rank).view(2, -1)
        first, second = order

        def radii(coordinates: Tensor) -> Tensor:
            pairs = coordinates[:, first].square() + coordinates[:, second].square()
            return (pairs + epsilon).sqrt()

        text_radii = radii((y - text_mean + image_mean) @ frame).sort(0).values
        image_radii = radii(x @ frame).sort(0).values
        shares = [np.linspace(0, 1, len(side)) for side in (text_radii, image_radii)]
        rest = vectors[:, rank:]
        ratio = (x @ rest).std(0, correction=0) / ((y @ rest).std(0, correction=0) + epsilon)

        def start(rows: Tensor) -> Tensor:
            centred = unit(rows.double()) - text_mean
            lead, moved = (centred + image_mean) @ frame, torch.empty(len(rows), rank).double()
            old = radii(lead)
            new = torch.stack(
                [
                    torch.from_numpy(
                        np.interp(
                            np.interp(old[:, pair], text_radii[:, pair], shares[0]),
                            shares[1],
                            image_radii[:, pair],
                        )
                    )
                    for pair in range(rank // 2)
                ],
                1,
            )
            for part in (first, second):
                moved[:, part] = lead[:, part] * new / old
            others = image_mean @ rest + ratio * (centred @ rest)
            return unit(moved @ frame.T + others @ rest.T)

        shift = image_mean - start(text).mean(0)
        return lambda rows: unit(start(rows) + shift).to(rows.dtype), None

    return fit


STEPS: dict[str, Fit] = {
    "anchor": family(False, method="mean-shift"),
    "anchor + scale": family(False),
    "anchor + scale + centroid (ReAlign)": family(),
    "anchor + centroid": family(method="mean-shift"),
}
CENTRED: dict[str, Fit] = {
    "both sides centred": space("center"),
    "calibrate": space("calibrate"),
    "centre and calibrate": space("center-calibrate"),
}
ANISO: dict[str, Fit] = {
    "AnisoAlign's start": aniso_start(),
    "AnisoAlign's start, other pairs": aniso_start(neighbours=False),
}
SHRUNK = {
    f"{method}, {'unshrunk' if shrinkage is None else shrinkage}": family(
        method=method, shrinkage=shrinkage
    )
    for method in ("coral", "optimal-transport", "blockwise")
    for shrinkage in (None, 0.1, 0.5, "oas", "ledoit-wolf")
}
DIAGONAL: dict[str, Fit] = {"diagonal": family(method="diagonal")}
NOISE = {f"noise {share:g}": family(method="noise", noise=share) for share in (0.05, 0.25, 1.0)}
ARMS = STEPS | DIAGONAL | CENTRED | ANISO | SHRUNK | NOISE
FEW = {
    name: ARMS[name]
    for name in (
        "anchor",
        "anchor + scale + centroid (ReAlign)",
        "diagonal",
        "optimal-transport, oas",
        "both sides centred",
        "calibrate",
    )
}
THEORY = {*STEPS, *DIAGONAL, "both sides centred", "calibrate", "optimal-transport, oas"}
# Statements of the papers, and then ours: the first arm is worse than the second.
ORDERINGS = (
    ("source", "anchor"),
    ("anchor", "anchor + scale"),
    ("anchor + scale", "anchor + scale + centroid (ReAlign)"),
    ("source", "noise 0.25"),
    ("noise 0.25", "anchor + scale + centroid (ReAlign)"),
    ("coral, unshrunk", "anchor + scale + centroid (ReAlign)"),
    ("blockwise, unshrunk", "anchor + scale + centroid (ReAlign)"),
    ("AnisoAlign's start", "anchor + scale + centroid (ReAlign)"),
    ("anchor + scale + centroid (ReAlign)", "target"),
    ("source", "both sides centred"),
    ("anchor + scale + centroid (ReAlign)", "both sides centred"),
    ("optimal-transport, oas", "both sides centred"),
    ("coral, oas", "both sides centred"),
    ("diagonal", "optimal-transport, oas"),
    ("both sides centred", "calibrate"),
    ("noise 0.25", "anchor"),
)


# --- the data -------------------------------------------------------------------------------------


def demo_captions(folder: Path, first: int, last: int | None) -> list[str]:
    """Return the captions in files `first` to `last` (not included) of `metadata/`."""
    files = sorted((folder / "metadata").glob("*.jsonl"))[first:last]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return [json.loads(line)["caption"] for line in lines]


def demo(_: int) -> Data:
    """Return the demo corpus; its held-out images are tested."""
    text, image, held_out = (
        torch.cat([batch.rows.float() for batch in Corpus(folder, side).batches()])
        for folder, side in ((DATA, "text"), (DATA, "image"), (DATA / "heldout", "image"))
    )
    count = len(Corpus(DATA, "text").shards)
    captions = demo_captions(DATA, 0, count), demo_captions(DATA, count, None)
    text_labels, image_labels, tested = (
        hashed_words(side, 256) for side in (*captions, demo_captions(DATA / "heldout", 0, None))
    )
    test = torch.arange(len(image), len(image) + len(held_out))
    images = unit(torch.cat([image, held_out]))
    return Data(unit(text), images, text_labels, torch.cat([image_labels, tested]), test)


def own_rows(seed: int) -> Data:
    """Return aligned texts as both sides: the loss of `source` is that on held-out texts."""
    data = demo(seed)
    moved = ReAlign.fit(data.text, data.image, residual=False)(data.text)
    labels = data.text_labels
    return Data(moved, moved, labels, labels, 0.1, torch.arange(len(moved)))


def paired(image: Tensor, text: Tensor) -> Data:
    """Return rows of pairs, labelled by what both rows of a pair have in common."""
    image, text = unit(image.float()), unit(text.float())
    common = (image - image.mean(0) + text - text.mean(0)).double()
    count = min(SHARED_COMPONENTS, image.shape[1])
    labels = common @ torch.linalg.svd(common, full_matrices=False).Vh[:count].T
    labels = (labels / labels.std()).float()
    return Data(text, image, labels, labels, partners=torch.arange(len(image)))


def synthetic(
    anisotropic: bool, drifts: bool, scale: float, diagonal: bool
) -> Callable[[int], Data]:
    """Return data whose gap is `A u + b`, with A = `scale` I or a diagonal.

    Texts are `unit(mu + z W + e)`: the latent z [N, 8] is the label, and one direction of W holds
    most of the variance if `anisotropic`. Images are `unit(A t + b)` of other texts t. Normalised
    rows have a mean that drifts by `S a / r^2` (phantom drift, arXiv 2602.07026, theorem B.14). If
    it `drifts`, the variance is .5 of the squared length and mu lies half in the first direction of
    W, so that S a is not parallel to a; else the variance is .05 and mu is orthogonal to W.
    """

    def draw(seed: int) -> Data:
        columns, latents, count = 64, 8, 2000
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        basis = torch.linalg.qr(normal(columns, columns)).Q
        spectrum = torch.ones(latents).double()
        if anisotropic:
            spectrum = 0.6 ** torch.arange(latents).double() * 2
        mean, trace = basis[:, -1], 0.5 if drifts else 0.05
        if drifts:
            mean = (mean + basis[:, 0]) * 0.5**0.5
        loadings = basis[:, :latents].T * spectrum.sqrt()[:, None]
        energy = spectrum.sum() + 0.25 * latents  # of the latents and of the noise
        loadings, noise = ((trace / energy).sqrt() * part for part in (loadings, torch.tensor(1.0)))
        noise = noise * math.sqrt(0.25 * latents / columns)

        def texts() -> tuple[Tensor, Tensor]:
            z = normal(count, latents)
            return unit(mean + z @ loadings + noise * normal(count, columns)), z.float()

        factor = torch.full((columns,), scale, dtype=torch.float64)
        if diagonal:
            factor = scale * torch.exp(0.5 * normal(columns))
        shift = basis[:, -2] * 0.8 + mean * (1 - scale)  # so that lengths stay about 1
        (text, text_labels), (others, image_labels) = texts(), texts()

        def gap(rows: Tensor) -> Tensor:
            return unit(rows.double() * factor + shift).float()

        maps = {"the gap itself": gap}
        return Data(text.float(), gap(others), text_labels, image_labels, maps=maps)

    return draw


def few_rows(count: int) -> dict[str, Fit]:
    """Return maps that are fitted on `count` rows of each side."""
    return {
        "anchor": family(False, count, method="mean-shift"),
        "anchor + scale + centroid (ReAlign)": family(rows=count),
        "diagonal": family(rows=count, method="diagonal"),
        "optimal-transport, oas": family(rows=count, **TRANSPORT),
        "both sides centred": space("center", count),
        "calibrate": space("calibrate", count),
    }


def tasks(options: argparse.Namespace) -> dict[str, Task]:
    """Return the tasks by name, in the order in which they are measured."""
    found: dict[str, Task] = {}
    found["demo"] = Task(demo, ARMS, seeds=SEEDS)
    if options.pairs:
        rows = torch.from_numpy(np.load(options.pairs))
        found["pairs"] = Task(lambda _: paired(*rows), ARMS, seeds=SEEDS)
        for count in (25, 50, 100, 200):
            arms = few_rows(count) | {
                "few images: ReAlign": family(images=count),
                "few images: optimal-transport, oas": family(images=count, **TRANSPORT),
            }
            found[f"rows of pairs, {count}"] = Task(lambda _: paired(*rows), arms)
    for count in (64, 100, 128, 200, 300, 1000, 3000):
        found[f"rows, {count}"] = Task(demo, few_rows(count))
    for drifts in (False, True):
        for anisotropic in (False, True):
            for gap, scale, diagonal in (
                ("shift", 1.0, False),
                ("shift and scale", 0.5, False),
                ("shift and diagonal", 0.7, True),
            ):
                spread = "anisotropic" if anisotropic else "isotropic"
                name = f"synthetic, {spread}, drift {'on' if drifts else 'off'}, {gap}"
                draw = synthetic(anisotropic, drifts, scale, diagonal)
                arms = {name: arm for name, arm in ARMS.items() if name in THEORY}
                found[name] = Task(draw, arms, seeds=SEEDS)
    for path in sorted(options.checkpoints.glob("step_*")) if options.checkpoints else ():
        rows = load_file(path)
        sides = rows["trained.image"], rows["trained.text"]
        found[f"checkpoint, {path.stem}"] = Task(lambda _, sides=sides: paired(*sides), FEW)
    for steps in FIXED_STEPS:
        reader = Reader(steps=steps, batch=64)
        found[f"stop, {steps} steps"] = Task(demo, FEW, reader)
        found[f"own rows, {steps} steps"] = Task(own_rows, {}, reader)
    if options.only:
        found = {name: task for name, task in found.items() if name.startswith(options.only)}
    return found


# --- measuring ------------------------------------------------------------------------------------


def measure(task: Task, seed: int) -> dict[str, Any]:
    """Return the losses of all readers of a task with one seed."""
    began, data = time.time(), task.data(seed)
    arms = dict(task.arms)
    arms |= {name: lambda *_, known=row_map: (known, None) for name, row_map in data.maps.items()}
    result = substitution(
        data.text,
        data.image,
        data.text_labels,
        data.image_labels,
        aligned=arms,
        test=data.test,
        partners=data.partners,
        seeds=[seed],
        reader=task.reader,
    )
    tested = 0 if isinstance(data.test, Tensor) else data.test
    cell: dict[str, Any] = {"seed": seed}
    cell["loss"] = {name: float(run[0]) for name, run in result.runs.items()}
    cell |= {"overlap": tested / (1 - tested), "reader": vars(task.reader)}
    if data.maps:
        cell["centroid"] = {name: centroid_distance(data, fit) for name, fit in arms.items()}
    return cell | {"seconds": round(time.time() - began, 1)}


def centroid_distance(data: Data, fit: Fit) -> float:
    """Return the distance of the centroids of moved texts and of images, fitted on all rows."""
    text_map, image_map = fit(data.text, data.image)
    image = image_map(data.image) if image_map else data.image
    return float((text_map(data.text).double().mean(0) - image.double().mean(0)).norm())


@dataclass(frozen=True)
class Table:
    """The losses of a task, by reader and seed."""

    loss: Mapping[str, Any]  # [seeds]
    overlap: float  # of the splits of two seeds
    centroid: Mapping[str, float]  # mean distances of centroids, where they were measured

    @property
    def distance(self) -> float:
        """The mean loss of texts as they are minus that of images."""
        return float((self.loss["source"] - self.loss["target"]).mean())

    def difference(self, worse: str, better: str) -> tuple[float, float]:
        """Return how much more of the distance `better` closes than `worse`, and the half width.

        The interval is 95% (delta method, Student), where splits overlap with the correction of
        Nadeau and Bengio (2003).
        """
        closed = self.loss[worse] - self.loss[better]
        distances = self.loss["source"] - self.loss["target"]
        share = float(closed.mean()) / self.distance
        count = len(closed)
        if count < 2:
            return share, math.nan
        residual = (closed - share * distances) / self.distance
        error = residual.std(ddof=1) * math.sqrt(1 / count + self.overlap)
        return share, float(error) * STUDENT[min(count, 10) - 2]


def table_of(folder: Path) -> Table | None:
    """Read the cells of a task; None without any."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not cells:
        return None
    names = cells[0]["loss"]
    losses = {name: np.array([cell["loss"][name] for cell in cells]) for name in names}
    centroids = cells[0].get("centroid", {})
    means = {name: float(np.mean([cell["centroid"][name] for cell in cells])) for name in centroids}
    return Table(losses, cells[0]["overlap"], means)


def verdict(share: float, width: float) -> str:
    """Say whether a positive difference holds."""
    if math.isnan(width):
        return f"not decided, {share:+.3f} with one seed"
    interval = f"{share:+.3f} ({share - width:+.3f} to {share + width:+.3f})"
    if share - width > 0:
        return f"holds, {interval}"
    if share + width < 0:
        return f"does not hold, {interval}"
    return f"not decided, interval {interval}"


def report(out: Path, names: list[str]) -> str:
    """Write the tables of the tasks that have cells; return the text."""
    lines, numbers = ["# Text rows in place of image rows: what each map closes", ""], {}
    for name in names:
        table = table_of(out / "cells" / name)
        if table is None:
            continue
        first = next(iter(table.loss.values()))
        source, target = (float(table.loss[side].mean()) for side in ("source", "target"))
        if len(table.loss) == 2:  # the two sides of `own_rows`
            lines += [
                f"## {name}",
                "",
                f"Loss on new texts: {source:.4f}; seeds: {len(first)}.",
                "",
            ]
            continue
        lines += [f"## {name}", "", f"Loss on images: readers of texts as they are {source:.4f}, "]
        lines[-1] += f"of images {target:.4f}; seeds: {len(first)}."
        lines += ["", "| map | loss | share closed, 95% | centroids apart |", "|---|---|---|---|"]
        if table.distance <= 0:
            lines += ["", "Readers of images are no better here, so no share exists."]
            continue
        for arm, losses in table.loss.items():
            share, width = table.difference("source", arm)
            interval = f"{share:.3f} ({share - width:.3f} to {share + width:.3f})"
            if math.isnan(width):
                interval = f"{share:.3f}"
            if arm not in ("source", "target"):
                apart = f"{table.centroid[arm]:.4f}" if arm in table.centroid else ""
                lines.append(f"| {arm} | {losses.mean():.4f} | {interval} | {apart} |")
            numbers[f"{name}: {arm}"] = [float(losses.mean()), share, width]
        judged = [
            f"| {worse} < {better} | {verdict(*table.difference(worse, better))} |"
            for worse, better in ORDERINGS
            if worse in table.loss and better in table.loss
        ]
        if len(judged) > 2:
            lines += ["", "| ordering | difference of the shares, 95% |", "|---|---|", *judged]
        lines.append("")
    text = "\n".join(lines)
    (out / "study.md").write_text(text, "utf-8")
    (out / "study.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return text


def measure_cell(options: argparse.Namespace, name: str, seed: int) -> None:
    """Measure a task with a seed, and write its cell."""
    torch.set_num_threads(1)
    task = tasks(options)[name]
    if options.steps:
        task = replace(task, reader=replace(task.reader, steps=options.steps))
    cell, path = measure(task, seed), cell_path(options, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell, indent=1))
    os.replace(partial, path)
    print(f"{name}, seed {seed}: {cell['seconds']} s", flush=True)


def cell_path(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.out, "cells", name, f"{seed}.json")


def main() -> None:
    """Measure the cells that are missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=Path, help="npy file [2, N, D] of images and their texts")
    parser.add_argument("--checkpoints", type=Path, help="OUT/rows of training_dynamics.py")
    parser.add_argument("--only", help="tasks whose names begin so")
    parser.add_argument(
        "--seeds", type=int, help=f"(default: {SEEDS}, of most tasks {FEWER_SEEDS})"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--steps", type=int, help="of every reader, to try the script")
    parser.add_argument("--list", action="store_true", help="print the tasks")
    options = parser.parse_args()
    found = tasks(options)
    if options.list:
        print("\n".join(found))
        return
    missing = [  # a seed is finished before the next begins
        (name, seed)
        for seed in range(options.seeds or SEEDS)
        for name, task in found.items()
        if seed < (options.seeds or task.seeds) and not cell_path(options, name, seed).exists()
    ]
    if options.jobs == 1:
        for cell in missing:
            measure_cell(options, *cell)
    else:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            for result in [pool.submit(measure_cell, options, *cell) for cell in missing]:
                result.result()
    print(report(options.out, list(found)))


if __name__ == "__main__":
    main()
