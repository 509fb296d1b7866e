"""Both stages of ReVision on the Trainer of transformers (arXiv 2602.07026, section 5).

Trainer, accelerate and PEFT do the training: bf16, gradient accumulation, checkpoints, FSDP and
DeepSpeed (through the configuration of accelerate), logging. This module prepares model and data
as `training_config.py` says; `trainer.py` adapts Trainer to them.

For several devices: `accelerate launch --config_file FILE -m realign_fast pretrain ...`
"""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..storage.paths import write_whole
from .dataset import Collator, Conversations, Subset
from .generation import pad_id
from .model import LANGUAGE_MODEL_FOLDER, ReVisionModel, load_config, position_limit, transformers
from .overrides import build_dataclass
from .preparation import FAULTS, prepare
from .projector import CONFIG, ReVisionConfig, read_config
from .templates import Chat, Plain, Template
from .training_config import MODEL_DEFAULTS, PRESETS, Stage, TrainingConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .trainer import ReVisionTrainer

_MAX_HELD_OUT = 512  # samples, by default
Samples = Conversations | Subset


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
    config = _with_preset(stage, config)
    arguments = _training_arguments(config)
    saved = _saved_config(config)
    template = _template(config, saved)
    with arguments.main_process_first(local=False):
        report, samples, held_out = _prepare_data(config, template)
    if held_out is None:
        arguments.eval_strategy = "no"
    model = _build_model(config, saved, arguments)
    model.revision_config.template = template.name

    from .trainer import ReVisionTrainer  # a subclass of Trainer, which transformers holds

    trainer = ReVisionTrainer(
        model,
        arguments,
        template=template,
        generations=config.generations,
        data_collator=Collator(pad_id(template.tokenizer)),
        train_dataset=samples,
        eval_dataset=held_out,
    )
    if trainer.is_world_process_zero():
        _print_overview(report, model)
    checkpoint = last_checkpoint(Path(config.out)) if config.resume else None
    if config.resume and checkpoint is None and trainer.is_world_process_zero():
        print(
            f"{config.out}: holds no checkpoint to resume from; training starts from the beginning"
        )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    summary = {"stage": stage, "out": config.out} | _figures(trainer, result, bool(checkpoint))
    summary |= {"data": report, "model": dataclasses.asdict(model.revision_config)}
    if trainer.is_world_process_zero():
        write_whole(Path(config.out) / "training.json", json.dumps(summary, indent=2).encode())
    return summary


def _with_preset(stage: Stage, config: TrainingConfig) -> TrainingConfig:
    """Return the configuration with the preset of the stage where it says nothing."""
    preset = PRESETS[stage]
    parts = config.train or preset.train
    if config.lora and "lora" not in parts:
        raise ValueError(
            f"lora: got {', '.join(config.lora)} for an adapter that is not trained; expected "
            f"--train projector,lora; what trains is {', '.join(parts)}"
        )
    return dataclasses.replace(
        config,
        train=parts,
        template=config.template or preset.template,
        batch=config.batch or preset.batch,
        trainer=preset.trainer | config.trainer,
    )


def _training_arguments(config: TrainingConfig) -> TrainingArguments:
    """Return the TrainingArguments that the configuration means."""
    out = Path(config.out)
    if not config.resume and last_checkpoint(out):
        raise ValueError(
            f"{out}: holds checkpoints of an earlier training; go on with it (--resume), or name "
            "another directory"
        )
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    batch, simultaneous = config.batch or 1, config.micro_batch * devices
    if batch % simultaneous:
        raise ValueError(
            f"batch: got {batch}, expected a multiple of {simultaneous}, micro batch "
            f"{config.micro_batch} x {devices} devices; choose a multiple"
        )
    settings = {
        "output_dir": config.out,
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": config.micro_batch,
        "gradient_accumulation_steps": batch // simultaneous,
        "eval_strategy": "steps",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # or bf16 would be refused
    }
    arguments = build_dataclass(
        transformers().TrainingArguments, "setting of Trainer", settings | config.trainer
    )
    if arguments.n_gpu > 1:  # DataParallel would split image rows as if each sample had one
        arguments._n_gpu = 1
    return arguments


def last_checkpoint(out: Path) -> str | None:
    """Return the newest checkpoint in the directory of a training, or None."""
    return transformers().trainer_utils.get_last_checkpoint(str(out)) if out.is_dir() else None


def _saved_config(config: TrainingConfig) -> ReVisionConfig | None:
    """Return the configuration of the model to train further, or None for a language model."""
    start = Path(config.start)
    if not (start / CONFIG).is_file():
        if config.start.startswith(("/", "./", "../", "~")) and not start.is_dir():
            raise FileNotFoundError(
                f"{start}: no such directory; give a language model's name or directory, or a "
                "directory that pretrain wrote"
            )
        return None
    saved = read_config(start)
    for name in MODEL_DEFAULTS:
        requested, value = getattr(config, name), getattr(saved, name)
        if requested not in (None, value):
            raise ValueError(
                f"{start}: got {name} {requested}, and the model was made with {value}; leave it "
                "out, or pretrain another one"
            )
    return saved


def _template(config: TrainingConfig, saved: ReVisionConfig | None) -> Template:
    """Return the template of the training, with the tokenizer of the model it starts from."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(config.start)
    source, trained = config.start, Path(config.start) / LANGUAGE_MODEL_FOLDER
    visual_tokens = config.visual_tokens or ReVisionConfig.visual_tokens
    if saved:
        source = str(trained) if trained.is_dir() else saved.language_model
        visual_tokens = saved.visual_tokens
    template: Template = Plain(tokenizer, visual_tokens)
    if config.template == "chat":
        template = Chat(tokenizer, visual_tokens, template=config.chat_template)
    if config.chat_template:
        tokenizer.chat_template = config.chat_template  # saved with the trained model
    template.positions = position_limit(load_config(source))
    return template


def _prepare_data(
    config: TrainingConfig, template: Template
) -> tuple[dict[str, Any], Samples, Samples | None]:
    """Join the lists and their rows; return the report, the samples and the held-out samples."""
    join = partial(
        prepare,
        template=template,
        cache=Path(config.out) / "data",
        max_length=config.max_length,
        max_skipped=config.max_skipped,
    )
    samples = join(config.conversations, config.rows, ids=config.ids).aligned(config.aligner)
    if config.test is not None and config.test_rows is not None:
        return samples.report, samples, join(config.test, config.test_rows)
    if config.test is not None or config.test_rows is not None:
        raise ValueError("test, test_rows: got one of them; give a list and its rows, or neither")
    count = config.held_out
    if count is None:
        count = min(_MAX_HELD_OUT, len(samples) // 100)
    return samples.report, *(samples.split(count) if count else (samples, None))


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
        if saved.row_dimension != config.rows.dimension:
            raise ValueError(
                f"{config.rows.path}: rows have {config.rows.dimension} columns, the model was "
                f"trained on {saved.row_dimension}; embed with its encoder"
            )
    else:
        requested = {name: getattr(config, name) for name in MODEL_DEFAULTS}
        fields = {name: value for name, value in requested.items() if value is not None}
        model = ReVisionModel.start(config.start, config.rows.dimension, dtype=dtype, **fields)
    model.train_only(parts, **config.lora)
    return model


def _print_overview(report: dict[str, Any], model: ReVisionModel) -> None:
    """Print the number of samples and of trainable parameters."""
    skipped = ", ".join(
        f"{report[fault]:,} {meaning}" for fault, meaning in FAULTS.items() if report[fault]
    )
    print(
        f"{report['used']:,} of {report['samples']:,} samples"
        + (f" ({skipped})" if skipped else "")
    )
    counts: dict[str, list[int]] = {}  # part -> parameters that train, all parameters
    for name, parameter in model.named_parameters():
        part = "lora" if "lora_" in name else name.split(".")[0]
        count = counts.setdefault(part, [0, 0])
        count[0] += parameter.numel() * parameter.requires_grad
        count[1] += parameter.numel()
    parts = [f"{part} {trained:,} of {total:,}" for part, (trained, total) in counts.items()]
    print(f"parameters that train: {', '.join(parts)}")


def _logged_loss(log_history: list[dict[str, float]]) -> float | None:
    """Return the mean of the logged losses of all steps, also those before a resumption."""
    total = step = 0.0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - step)
            step = entry["step"]
    return total / step if step else None


def _figures(trainer: ReVisionTrainer, result: Any, resumed: bool) -> dict[str, Any]:
    """Return the figures of a finished training; `result` is what `Trainer.train` returned."""
    history = trainer.state.log_history
    return {
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "train_loss": (resumed and _logged_loss(history)) or result.training_loss,
        "held_out_losses": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "samples_per_second": result.metrics.get("train_samples_per_second") or None,
    }
