"""Both stages of ReVision on the Trainer of transformers (arXiv 2602.07026, section 5).

`TrainingConfig` says what a training is made from, and `PRESETS` holds the paper's settings.
Trainer, accelerate and PEFT do the training: bf16, gradient accumulation, checkpoints, FSDP and
DeepSpeed (through the configuration of accelerate), logging. `trainer.py` adapts Trainer.

For several devices: `accelerate launch --config_file FILE -m realign_fast pretrain ...`
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..align import ReAlign
from ..corpus.corpus import Corpus, common_encoder
from ..interface import option_values as values
from ..interface.devices import has_bf16
from ..shared_space import SharedSpace
from ..storage.paths import write_json, write_whole
from .model import (
    CONFIG,
    LANGUAGE_MODEL_FOLDER,
    SPACE,
    ReVisionConfig,
    ReVisionModel,
    TrainablePart,
    build_dataclass,
    load_pretrained,
    position_limit,
    read_config,
    space_digest,
    transformers,
)
from .templates import FAULTS, TEMPLATES, Template
from .training_data import Collator, Conversations, check_inputs, check_rows, prepare

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .trainer import ReVisionTrainer

Stage = Literal["pretrain", "finetune"]
_MAX_HELD_OUT = 512  # samples, by default
_SUMMARY, _INPUTS = "training.json", "inputs.json"
TRAINER_SETTINGS = {  # of both stages, beside the learning rate
    "num_train_epochs": 1.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # the share of all steps
    "seed": 0,
    "logging_steps": 10,
    "eval_steps": 0.1,  # the share of all steps, as the next
    "save_steps": 0.1,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    "report_to": "none",
}
MODEL_FIELDS = ("projector", "visual_tokens", "normalize")  # of a new model; others have their own
RATES: dict[Stage, float] = {"pretrain": 5e-4, "finetune": 1e-5}  # of the paper
_BOTH = ("projector", "language_model")
# The paper's settings, fields of TrainingConfig; its batch of stage 2 is not known, 128 is LLaVA's.
PRESETS: dict[Stage, dict[str, Any]] = {
    "pretrain": {"side": "text", "template": "plain", "train": ("projector",), "batch": 256},
    "finetune": {"side": "image", "template": "chat", "train": _BOTH, "batch": 128},
}


@dataclass
class TrainingConfig:
    """The data, the model and the settings of one training.

    Where a field may be None, None takes the preset of the stage (`PRESETS`), and for `projector`,
    `visual_tokens` and `normalize` the default of `ReVisionConfig`; a trained model keeps
    its own.
    """

    conversations: str  # a file as conversation_files.py describes it
    rows: Corpus  # text rows in stage 1, aligned or with a space; image rows in stage 2
    out: str  # the directory of checkpoints and of the trained model
    start: str  # a language model, or a directory that pretrain wrote
    ids: str | None = None  # where the ids of the rows are (`prepare`)
    aligner: ReAlign | None = None  # maps raw text rows in every batch
    space: SharedSpace | str | None = None  # (a path) that rows go through; None: the model's own
    side: values.Modality | None = None  # of `rows` in the space: text in stage 1, else image
    projector: values.ProjectorName | None = None
    visual_tokens: int | None = None  # of an image
    normalize: bool | None = None  # rows to unit length
    template: values.TemplateName | None = None
    chat_template: str | None = None  # a Jinja text, where the tokenizer has none
    train: tuple[TrainablePart, ...] | None = None
    lora: dict[str, Any] = field(default_factory=dict)  # fields of PEFT's LoraConfig
    batch: int | None = None  # samples a step, over all devices
    micro_batch: int = 8  # samples at a time on one device, at most
    max_length: int = 2048  # tokens of a sample
    max_skipped: float = 0.01  # the share of samples that may be unusable
    held_out: int | None = None  # samples; None: a hundredth of them, at most 512
    test: str | None = None  # a list to evaluate on instead: in stage 1, say, real images
    test_rows: Corpus | None = None  # its rows, not aligned, with ids of their own or `ids` "row"
    resume: bool = False  # continue from the last checkpoint in `out`, if there is one
    trainer: dict[str, Any] = field(default_factory=dict)  # any fields of TrainingArguments


def pretrain(config: TrainingConfig) -> dict[str, Any]:
    """Train stage 1: the aligned row of a caption stands for the image, the caption is the target.

    Returns the summary that is also written to `training.json`: steps, losses, data and model.
    FileNotFoundError if an input is missing, ValueError if a setting or the data is wrong.
    """
    return _train("pretrain", config)


def finetune(config: TrainingConfig) -> dict[str, Any]:
    """Train stage 2: image rows and conversations, with the loss on the answers; as `pretrain`."""
    return _train("finetune", config)


def _train(stage: Stage, config: TrainingConfig) -> dict[str, Any]:
    if (config.test is None) != (config.test_rows is None):
        raise ValueError("test, test_rows: got one of them; give a list and its rows, or neither")
    check_inputs(config.conversations, config.rows, config.ids)
    if config.test is not None and config.test_rows is not None:
        check_inputs(config.test, config.test_rows, "row" if config.ids == "row" else None)
    space, out = config.space, Path(config.out)
    if space is not None and not isinstance(space, SharedSpace):
        space = SharedSpace.from_pretrained(space)
    saved = _saved_config(config, space_digest(space))
    if saved and saved.space:
        space = SharedSpace.load(Path(config.start) / SPACE)
    for rows in filter(None, (config.rows, config.test_rows)):
        check_rows(space, rows, config.aligner)
    checkpoint = last_checkpoint(out)
    if checkpoint and not config.resume:
        advice = "go on with it (--resume), or name another directory"
        raise ValueError(f"{out}: holds checkpoints of an earlier training; {advice}")
    config = _with_preset(stage, replace(config, space=space))
    arguments = _training_arguments(config)
    template = _template(config, saved)
    with arguments.main_process_first(local=False):
        samples, held_out = _prepare_data(config, template)
    if held_out is None:
        arguments.eval_strategy = "no"
    epochs = arguments.num_train_epochs * math.ceil(len(samples) / (config.batch or 1))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epochs)
    for name in ("logging_steps", "eval_steps", "save_steps"):  # a share, as Trainer counts it
        if (interval := getattr(arguments, name)) is not None and interval < 1:
            setattr(arguments, name, math.ceil(steps * interval))
    inputs = samples.digests()
    if config.test is not None and held_out:
        inputs |= {f"test {name}": digest for name, digest in held_out.digests().items()}
    if checkpoint and (summary := _ended(out, checkpoint, inputs, steps)):
        return summary
    model = _build_model(config, saved, arguments)
    model.revision_config.template = template.name
    model.revision_config.encoder = saved.encoder if saved else config.rows.encoder

    from .trainer import ReVisionTrainer  # a subclass of Trainer, which transformers holds

    trainer = ReVisionTrainer(
        model,
        arguments,
        data_collator=Collator(template.pad_id),
        train_dataset=samples,
        eval_dataset=held_out,
        processing_class=template.tokenizer,
    )
    first = trainer.is_world_process_zero()
    if first:
        write_json(out / _INPUTS, inputs)
        _print_overview(samples.report)
        if space:
            print(f"rows go through the {samples.side} side of the space {space}")
    if config.resume and checkpoint is None and first:
        print(f"{out}: holds no checkpoint to resume from, so training starts anew")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    summary = {"stage": stage, "out": config.out} | _figures(trainer, result)
    summary |= {"data": samples.report, "model": asdict(model.revision_config)}
    if first:
        write_whole(out / _SUMMARY, json.dumps(summary, indent=2).encode())
    return summary


def _with_preset(stage: Stage, config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with the preset of the stage where it says nothing."""
    preset = PRESETS[stage]
    parts = config.train or preset["train"]
    if config.lora and "lora" not in parts:
        fault = f"got {', '.join(config.lora)} for an adapter that is not trained"
        raise ValueError(f"lora: {fault}, but {', '.join(parts)}; give --train projector,lora")
    chosen = {name: getattr(config, name) or value for name, value in preset.items()}
    chosen["trainer"] = TRAINER_SETTINGS | {"learning_rate": RATES[stage]} | config.trainer
    return replace(config, **chosen)


def _training_arguments(config: TrainingConfig) -> TrainingArguments:
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    batch = config.batch or 1
    micro_batch = min(config.micro_batch, max(batch // devices, 1))
    simultaneous = micro_batch * devices
    if batch % simultaneous:
        product = f"micro batch {micro_batch} x {devices} devices"
        expected = f"expected a multiple of {simultaneous}, {product}"
        raise ValueError(f"batch: got {batch}, {expected}; change --batch-size or --micro-batch")
    cpu = torch.device("cpu")
    device = torch.accelerator.current_accelerator(check_available=True) or cpu
    device = cpu if config.trainer.get("use_cpu") is True else device
    settings = {
        "output_dir": config.out,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // simultaneous,
        "eval_strategy": "steps",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": device == cpu,  # or bf16 would be refused
        "bf16": has_bf16(device),
    }
    arguments_class = transformers().TrainingArguments
    arguments = build_dataclass(arguments_class, "setting of Trainer", settings | config.trainer)
    known = transformers().integrations.get_available_reporting_integrations()
    if missing := set(arguments.report_to) - set(known):
        advice = f"install it, or choose from {', '.join(['none', *known])}"
        raise ImportError(f"report_to: {min(missing)} is not installed; {advice}")
    if arguments.n_gpu > 1:  # DataParallel would split image rows as if each sample had one
        arguments._n_gpu = 1
    return arguments


def _ended(out: Path, checkpoint: str, inputs: dict[str, str], steps: int) -> dict[str, Any] | None:
    """Refuse other inputs than those of a checkpoint; return the summary if no step is left."""
    begun, ended = (_record_of(out / name) for name in (_INPUTS, _SUMMARY))
    names = sorted({*inputs, *begun} if begun else ())  # an older version wrote none
    if changed := [name for name in names if begun.get(name) != inputs.get(name)]:
        fault = f"its training began with another {', '.join(changed)}"
        raise ValueError(f"{out}: {fault}; --resume needs the same, or name another directory")
    taken = _record_of(Path(checkpoint) / "trainer_state.json")["global_step"]
    if taken < steps or ended.get("steps") != taken:
        return None
    print(f"{out}: has taken its {taken} steps, so nothing is trained; max_steps= sets more")
    return ended


def _record_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return record


def last_checkpoint(out: Path) -> str | None:
    """Return the newest complete checkpoint in the directory of a training, or None."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        try:  # Trainer writes this file last; a killed training may leave it out or cut it off
            json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _saved_config(config: TrainingConfig, space: str | None) -> ReVisionConfig | None:
    """Return the configuration of the model to train further, or None for a language model.

    `space` is the digest of the space that is asked for.
    """
    start = Path(config.start)
    if not (start / CONFIG).is_file():
        if config.start.startswith(("/", "./", "../", "~")) and not start.is_dir():
            advice = "give a language model's name or directory, or one that pretrain wrote"
            raise FileNotFoundError(f"{start}: no such directory; {advice}")
        return None
    saved = read_config(start)
    for name in (*MODEL_FIELDS, "space"):
        requested = space if name == "space" else getattr(config, name)
        if requested not in (None, value := getattr(saved, name)):
            fault = f"got {name} {requested}, and the model was made with {value}"
            raise ValueError(f"{start}: {fault}; leave it out, or pretrain another one")
    if saved.row_dimension != config.rows.dimension:
        expected = f"the model was trained on {saved.row_dimension}; embed with its encoder"
        columns = f"rows have {config.rows.dimension} columns"
        raise ValueError(f"{config.rows.path}: {columns}, {expected}")
    saved.encoder = common_encoder((config.rows.path, config.rows.encoder), (start, saved.encoder))
    return saved


def _template(config: TrainingConfig, saved: ReVisionConfig | None) -> Template:
    """Return the template of the training, with the tokenizer of the model it starts from."""
    tokenizer = load_pretrained("AutoTokenizer", config.start)
    tokenizer.chat_template = config.chat_template or tokenizer.chat_template  # saved with it
    visual_tokens = config.visual_tokens or (saved or ReVisionConfig).visual_tokens
    template = TEMPLATES[config.template or "plain"](tokenizer, visual_tokens)
    source, trained = config.start, Path(config.start) / LANGUAGE_MODEL_FOLDER
    if saved:
        source = str(trained) if trained.is_dir() else saved.language_model
    template.positions = position_limit(load_pretrained("AutoConfig", source))
    return template


def _prepare_data(
    config: TrainingConfig, template: Template
) -> tuple[Conversations, Conversations | None]:
    """Join the lists and their rows; return the samples and the held-out samples."""
    limits: dict[str, Any] = {"max_length": config.max_length, "max_skipped": config.max_skipped}
    limits |= {"cache": Path(config.out) / "data", "ids": config.ids, "side": config.side}
    samples = prepare(config.conversations, config.rows, template, **limits)
    samples.aligner = config.aligner
    if config.test is not None and config.test_rows is not None:
        limits |= {"ids": "row" if config.ids == "row" else None, "side": "image"}
        return samples, prepare(config.test, config.test_rows, template, **limits)
    share = min(_MAX_HELD_OUT, len(samples) // 100)
    count = share if config.held_out is None else config.held_out
    return samples.split(count) if count else (samples, None)


def _build_model(
    config: TrainingConfig, saved: ReVisionConfig | None, arguments: TrainingArguments
) -> ReVisionModel:
    """Load the saved model, or put a new projector before a language model; choose what trains."""
    parts = config.train or ()
    bf16 = arguments.bf16 and "language_model" not in parts
    dtype = torch.bfloat16 if bf16 else torch.float32
    transformers().set_seed(arguments.seed)  # of a new projector and a new adapter
    if saved:
        model = ReVisionModel.from_pretrained(config.start, dtype=dtype)
    else:
        requested = {name: getattr(config, name) for name in MODEL_FIELDS}
        fields = {name: value for name, value in requested.items() if value is not None}
        fields |= {"dtype": dtype, "space": config.space}
        model = ReVisionModel.start(config.start, config.rows.dimension, **fields)
    model.train_only(parts, **config.lora)
    return model


def _print_overview(report: dict[str, Any]) -> None:
    texts = FAULTS | {"skipped_turns": "answers before a first question skipped"}
    skipped = [f"{report[name]:,} {text}" for name, text in texts.items() if report[name]]
    reasons = f" ({', '.join(skipped)})" if skipped else ""
    print(f"{report['used']:,} of {report['samples']:,} samples{reasons}")


def _figures(trainer: ReVisionTrainer, result: Any) -> dict[str, Any]:
    """Return the figures of a finished training; `result` is what `Trainer.train` returned."""
    history = trainer.state.log_history
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    steps, losses = zip(*(logged or [(1, result.training_loss)]), strict=True)
    return {
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        # Of all steps; that of Trainer leaves out the steps before a training was resumed.
        "train_loss": float(np.average(losses, weights=np.diff([0, *steps]))),
        "held_out_losses": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "samples_per_second": result.metrics.get("train_samples_per_second") or None,
    }
