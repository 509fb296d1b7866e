"""The configuration of a training, and the paper's settings of both stages (arXiv 2602.07026)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..align import ReAlign
from ..corpus.corpus import Corpus
from .model import TrainablePart
from .projector import ProjectorName, ReVisionConfig, TemplateName

Stage = Literal["pretrain", "finetune"]
_TRAINER_SETTINGS = {  # of both stages
    "num_train_epochs": 1.0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # the share of all steps
    "bf16": True,
    "seed": 0,
    "logging_steps": 10,
    "eval_steps": 0.1,  # the share of all steps, as the next
    "save_steps": 0.1,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    "report_to": "none",
}
# Fields of a new model that a training chooses; a trained model has its own.
MODEL_DEFAULTS = {
    name: getattr(ReVisionConfig, name) for name in ("projector", "visual_tokens", "normalize")
}


@dataclass(frozen=True)
class StagePreset:
    """The paper's settings of a stage."""

    template: TemplateName
    train: tuple[TrainablePart, ...]
    batch: int  # samples a step, over all devices
    trainer: dict[str, Any]  # fields of TrainingArguments


PRESETS: dict[Stage, StagePreset] = {
    "pretrain": StagePreset(
        "plain", ("projector",), 256, _TRAINER_SETTINGS | {"learning_rate": 5e-4}
    ),
    # The paper does not state the batch of stage 2; 128 is LLaVA's.
    "finetune": StagePreset(
        "chat", ("projector", "language_model"), 128, _TRAINER_SETTINGS | {"learning_rate": 1e-5}
    ),
}


@dataclass
class TrainingConfig:
    """The data, the model and the settings of one training.

    Where a field may be None, None takes the preset of the stage (`PRESETS`), and for `projector`,
    `visual_tokens` and `normalize` the default of `ReVisionConfig`; a trained model keeps its own.
    """

    conversations: str  # a file as conversation_files.py describes it
    rows: Corpus  # aligned text rows in stage 1, image rows in stage 2
    out: str  # the directory of checkpoints and of the trained model
    start: str  # a language model, or a directory that pretrain wrote
    ids: str | None = None  # where the ids of the rows are (id_index.py)
    aligner: ReAlign | None = None  # maps raw text rows in every batch
    projector: ProjectorName | None = None
    visual_tokens: int | None = None  # of an image
    normalize: bool | None = None  # rows to unit length
    template: TemplateName | None = None
    chat_template: str | None = None  # a Jinja text, where the tokenizer has none
    train: tuple[TrainablePart, ...] | None = None
    lora: dict[str, Any] = field(default_factory=dict)  # fields of PEFT's LoraConfig
    batch: int | None = None  # samples a step, over all devices
    micro_batch: int = 8  # samples at a time on one device
    max_length: int = 2048  # tokens of a sample
    max_skipped: float = 0.01  # the share of samples that may be unusable
    held_out: int | None = None  # samples; None: a hundredth of them, at most 512
    test: str | None = None  # a list to evaluate on instead: in stage 1, say, real images
    test_rows: Corpus | None = None  # its rows, which hold their ids and are not aligned
    generations: int = 3  # held-out samples that are answered at each evaluation
    resume: bool = False  # continue from the last checkpoint in `out`, if there is one
    trainer: dict[str, Any] = field(default_factory=dict)  # any fields of TrainingArguments
