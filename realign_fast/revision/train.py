"""Both stages of ReVision on transformers' Trainer (arXiv 2602.07026, section 5).

Trainer, accelerate and PEFT do the training: bf16, accumulation, checkpoints, FSDP and DeepSpeed
(through accelerate's configuration), logging. Here are the paper's settings and what they are
applied to; `trainer.py` has the little that Trainer must be told.

On many devices: `accelerate launch --config_file FILE -m realign_fast pretrain ...`
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..storage.paths import write_whole
from .dataset import Collator, Conversations, Part
from .model import ReVisionModel, transformers
from .overrides import made
from .preparation import FAULTS, prepare
from .projector import CONFIG, ReVisionConfig, read_config
from .templates import Chat, Plain

BOTH = {
    "num_train_epochs": 1.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of all steps
    "bf16": True,
    "seed": 0,
    "logging_steps": 10,
    "eval_steps": 0.1,  # of all steps
    "save_steps": 0.1,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    "report_to": "none",
}
# Of a model that begins here, by default; a trained one has its own.
FRESH = {n: getattr(ReVisionConfig, n) for n in ("projector", "visual_tokens", "normalize")}
PRESETS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "template": "plain",
        "train": ("projector",),
        "batch": 256,
        "trainer": BOTH | {"learning_rate": 5e-4},
    },
    # The paper's batch of stage 2 is not known to us; 128 is LLaVA's.
    "finetune": {
        "template": "chat",
        "train": ("projector", "language_model"),
        "batch": 128,
        "trainer": BOTH | {"learning_rate": 1e-5},
    },
}


@dataclass
class Run:
    """What one training is made of; None takes the stage's preset."""

    conversations: str  # a file of lists.py
    rows: Corpus  # aligned text rows in stage 1, image rows in stage 2
    out: str  # directory for checkpoints and the result
    start: str  # a language model, or a directory that pretrain wrote
    ids: str | None = None  # where the rows have their ids (ids.py)
    aligner: ReAlign | None = None  # moves raw text rows on the way
    projector: str | None = None  # of a fresh model, as the next two; None: as in FRESH
    visual_tokens: int | None = None
    normalize: bool | None = None
    template: str | None = None  # "plain" or "chat"
    chat_template: str | None = None  # Jinja, where the tokenizer has none
    train: tuple[str, ...] | None = None  # of model.PARTS
    lora: dict[str, Any] = field(default_factory=dict)  # fields of PEFT's LoraConfig
    batch: int | None = None  # samples a step, over all devices
    micro_batch: int = 8  # samples at a time on one device
    max_length: int = 2048  # tokens of a sample
    max_skipped: float = 0.01  # share of samples that may be unusable
    held_out: int | None = None  # samples; None: a hundredth, 512 at most
    test: str | None = None  # a list to measure on instead: in stage 1, say, real images
    test_rows: Corpus | None = None  # its rows, taken as they are, with ids beside them
    generations: int = 3  # held-out samples answered at each evaluation
    resume: bool = False  # from the last checkpoint in `out`, if there is one
    trainer: dict[str, Any] = field(default_factory=dict)  # any of TrainingArguments


def pretrain(run: Run) -> dict[str, Any]:
    """Stage 1: aligned captions stand for images, the caption is the target; returns a summary."""
    return _train("pretrain", run)


def finetune(run: Run) -> dict[str, Any]:
    """Stage 2: image rows and conversations, loss on the answers; returns a summary."""
    return _train("finetune", run)


def _train(stage: str, run: Run) -> dict[str, Any]:
    from .trainer import Epochs, Generations, ReVisionTrainer

    preset = PRESETS[stage]
    parts = run.train or preset["train"]
    if run.lora and "lora" not in parts:
        want = f"--train projector,lora; what trains is {', '.join(parts)}"
        raise ValueError(
            f"lora: got {', '.join(run.lora)} for an adapter that is not trained; {want}"
        )
    arguments = _arguments(preset, run)
    old = _saved_config(run)
    tokenizer = transformers().AutoTokenizer.from_pretrained(run.start)
    kind = run.template or preset["template"]
    tokens = old.visual_tokens if old else run.visual_tokens or FRESH["visual_tokens"]
    chat = {"template": run.chat_template} if kind == "chat" else {}
    template = {"plain": Plain, "chat": Chat}[kind](tokenizer, tokens, **chat)
    if run.chat_template:
        tokenizer.chat_template = run.chat_template  # saved with the result
    with arguments.main_process_first(local=False):
        options = {"max_length": run.max_length, "max_skipped": run.max_skipped}
        whole = prepare(
            run.conversations, run.rows, template, Path(run.out) / "data", ids=run.ids, **options
        )
        train, held, moved = _parts(whole, run, template)
    model = _model(run, old, parts, arguments)
    model.revision_config.template = kind
    if held is None:
        arguments.eval_strategy = "no"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer = ReVisionTrainer(
        model,
        arguments,
        data_collator=Collator(pad, run.aligner),
        test_collator=Collator(pad, moved),
        train_dataset=train,
        eval_dataset=held,
        processing_class=tokenizer,
    )
    trainer.add_callback(Epochs(trainer))
    if held is not None and run.generations:
        trainer.add_callback(Generations(trainer, template, run.generations, moved))
    _say(trainer, whole.report, model)
    last = last_checkpoint(Path(run.out)) if run.resume else None
    if run.resume and last is None and trainer.is_world_process_zero():
        print(f"{run.out}: holds no checkpoint to resume from; training starts from the beginning")
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    trainer.save_state()
    return _summary(stage, run, trainer, whole.report, result, resumed=last is not None)


def _arguments(preset: dict[str, Any], run: Run) -> Any:
    """TrainingArguments of the preset, with what was given over it."""
    out = Path(run.out)
    if not run.resume and last_checkpoint(out):
        want = "go on with it (--resume), or name another directory"
        raise ValueError(f"{out}: holds checkpoints of an earlier training; {want}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch, at_once = run.batch or preset["batch"], run.micro_batch * world
    if batch % at_once:
        want = f"micro batch {run.micro_batch} x {world} devices; choose a multiple"
        raise ValueError(f"batch: got {batch}, expected a multiple of {at_once}, {want}")
    settings = preset["trainer"] | {
        "output_dir": run.out,
        "per_device_train_batch_size": run.micro_batch,
        "per_device_eval_batch_size": run.micro_batch,
        "gradient_accumulation_steps": batch // at_once,
        "eval_strategy": "steps",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # or bf16 would be refused
    }
    arguments = made(transformers().TrainingArguments, "setting of Trainer", settings | run.trainer)
    if arguments.n_gpu > 1:  # DataParallel would cut image rows as if each sample had one
        arguments._n_gpu = 1
    return arguments


def last_checkpoint(out: Path) -> str | None:
    """The newest in a directory of a training; None without any."""
    return transformers().trainer_utils.get_last_checkpoint(str(out)) if out.is_dir() else None


def _saved_config(run: Run) -> ReVisionConfig | None:
    """Of the model that training goes on from; None where it starts from a language model."""
    start = Path(run.start)
    if not (start / CONFIG).is_file():
        if run.start.startswith(("/", "./", "../", "~")) and not start.is_dir():
            want = "give a language model's name or directory, or a directory that pretrain wrote"
            raise FileNotFoundError(f"{start}: no such directory; {want}")
        return None
    config = read_config(start)
    for name in FRESH:
        asked, has = getattr(run, name), getattr(config, name)
        if asked not in (None, has):
            what = f"the model was made with {has}; leave it out, or pretrain another one"
            raise ValueError(f"{start}: got {name} {asked}, and {what}")
    return config


def _model(run: Run, old: Any, parts: tuple[str, ...], arguments: Any) -> ReVisionModel:
    bf16 = arguments.bf16 and "language_model" not in parts
    dtype = torch.bfloat16 if bf16 else torch.float32
    transformers().set_seed(arguments.seed)  # of a fresh projector, of a fresh adapter
    if old:
        model = ReVisionModel.from_pretrained(run.start, dtype=dtype)
        if old.row_dimension != run.rows.dimension:
            got = f"rows have {run.rows.dimension} columns, the model was trained on"
            raise ValueError(f"{run.rows.path}: {got} {old.row_dimension}; embed with its encoder")
    else:
        given = {name: getattr(run, name) for name in FRESH}
        options = FRESH | {name: one for name, one in given.items() if one is not None}
        model = ReVisionModel.start(run.start, run.rows.dimension, dtype=dtype, **options)
    model.train_only(parts, **run.lora)
    return model


def _parts(
    whole: Conversations, run: Run, template: Plain | Chat
) -> tuple[Conversations | Part, Conversations | Part | None, ReAlign | None]:
    """What is trained on, what is measured on, and what moves the rows of the latter."""
    if (run.test is None) != (run.test_rows is None):
        raise ValueError("test, test_rows: got one of them; give a list and its rows, or neither")
    if run.test is not None:
        options = {"max_length": run.max_length, "max_skipped": run.max_skipped}
        held = prepare(run.test, run.test_rows, template, Path(run.out) / "data", **options)
        return whole, held, None
    count = min(512, len(whole) // 100) if run.held_out is None else run.held_out
    return (*whole.split(count), run.aligner) if count else (whole, None, None)


def _say(trainer: Any, report: dict[str, Any], model: ReVisionModel) -> None:
    """What will be trained, on what; once."""
    if not trainer.is_world_process_zero():
        return
    skipped = ", ".join(f"{report[name]:,} {what}" for name, what in FAULTS.items() if report[name])
    print(
        f"{report['used']:,} of {report['samples']:,} samples"
        + (f" ({skipped})" if skipped else "")
    )
    counts: dict[str, list[int]] = {}
    for name, one in model.named_parameters():
        part = "lora" if "lora_" in name else name.split(".")[0]
        both = counts.setdefault(part, [0, 0])
        both[0] += one.numel() * one.requires_grad
        both[1] += one.numel()
    parts = [f"{part} {some:,} of {every:,}" for part, (some, every) in counts.items()]
    print(f"parameters that train: {', '.join(parts)}")


def _logged_loss(trainer: Any) -> float | None:
    """The mean of the logged losses of all steps, those before a resumption too."""
    logged = [one for one in trainer.state.log_history if "loss" in one]
    if not logged:
        return None
    steps = [0, *(one["step"] for one in logged)]
    sums = (one["loss"] * (to - by) for one, by, to in zip(logged, steps, steps[1:], strict=False))
    return sum(sums) / steps[-1]


def _summary(
    stage: str, run: Run, trainer: Any, report: dict[str, Any], result: Any, resumed: bool
) -> dict[str, Any]:
    evaluations = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    config: ReVisionConfig = trainer.accelerator.unwrap_model(trainer.model).revision_config
    summary = {
        "stage": stage,
        "out": run.out,
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "train_loss": (resumed and _logged_loss(trainer)) or result.training_loss,
        "held_out_losses": evaluations,
        "samples_per_second": result.metrics.get("train_samples_per_second") or None,
        "data": report,
        "model": dataclasses.asdict(config),
    }
    if trainer.is_world_process_zero():
        write_whole(Path(run.out) / "training.json", json.dumps(summary, indent=2).encode())
    return summary
