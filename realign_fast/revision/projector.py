"""The projector from embedding rows to visual tokens, and the configuration of a saved model.

A row `[D]` of a CLIP-like encoder stands for an image; the projector makes K visual tokens
`[K, H]` of it, in the space of the language model's input embeddings. The paper (arXiv 2602.07026,
section 5) feeds K = 576 identical copies of one projected row. Here a row is projected once and
expanded, which gives the same numbers for 1/K of the work, forward and backward: the gradient of
an expansion is the sum over the copies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from torch import Tensor, nn

from ..interface.option_values import VISUAL_TOKENS
from ..interface.option_values import ProjectorName as ProjectorName
from ..interface.option_values import TemplateName as TemplateName

IMAGE_TOKEN = -200  # stands for one visual token in input ids; no vocabulary has it
PROJECTORS: tuple[ProjectorName, ...] = get_args(ProjectorName)
CONFIG, WEIGHTS = "revision.json", "projector.safetensors"


@dataclass
class ReVisionConfig:
    """Everything that is needed to build a model again; saved as `revision.json`.

    Raises:
        ValueError: a field has a value that is not possible.
    """

    language_model: str  # the name or path that training started from
    row_dimension: int  # D, the columns of an embedding row
    hidden_size: int  # H, the width of the language model's input embeddings
    projector: ProjectorName = "mlp"
    visual_tokens: int = VISUAL_TOKENS  # K, the tokens of one image
    normalize: bool = True  # rows are scaled to unit length first, as aligned rows are
    template: TemplateName = "plain"  # the template of the last training

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            expected = ", ".join(PROJECTORS)
            raise ValueError(
                f"ReVisionConfig: projector is {self.projector!r}, expected {expected}"
            )
        for name in ("row_dimension", "hidden_size", "visual_tokens"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"ReVisionConfig: {name} is {value!r}, expected a number from 1")


class Projector(nn.Module):
    """Maps embedding rows `[M, D]` to visual tokens `[M, K, H]`.

    `linear` is one layer, repeated K times. `mlp` is linear, GELU, linear, repeated K times, as in
    the paper. `prefix` is linear, GELU and a linear layer to K different tokens of one row.
    """

    def __init__(self, config: ReVisionConfig) -> None:
        super().__init__()
        self.config = config
        d, h, k = config.row_dimension, config.hidden_size, config.visual_tokens
        outputs = k * h if config.projector == "prefix" else h
        self.layers = (
            nn.Linear(d, h)
            if config.projector == "linear"
            else nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, outputs))
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Project rows `[M, D]` of any float dtype to `[M, K, H]`.

        Repeated tokens are an expanded view, which takes memory only where it is copied.

        Raises:
            ValueError: the rows are not `[M, D]`.
        """
        config = self.config
        if rows.dim() != 2 or rows.shape[1] != config.row_dimension:
            raise ValueError(
                f"Projector: image rows have shape {list(rows.shape)}, expected [images, "
                f"{config.row_dimension}]; embed with the encoder trained on"
            )
        rows = rows.to(next(self.parameters()).dtype)
        if config.normalize:
            rows = nn.functional.normalize(rows, dim=1)
        projected: Tensor = self.layers(rows)
        if config.projector == "prefix":
            return projected.view(len(rows), config.visual_tokens, config.hidden_size)
        return projected[:, None].expand(-1, config.visual_tokens, -1)


def read_config(directory: Path) -> ReVisionConfig:
    """Read the configuration of the saved model in `directory`.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: `revision.json` is damaged.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; give one that pretrain wrote")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            hint = (
                "a plain language model: start with pretrain --language-model"
                if (directory / "config.json").is_file()
                else "pretrain and finetune write it"
            )
            raise FileNotFoundError(
                f"{directory}: lacks {name}, so it is no ReVision model; {hint}"
            )
    try:
        values = json.loads((directory / CONFIG).read_text())
        known = {field.name for field in fields(ReVisionConfig)}
        return ReVisionConfig(**{name: values[name] for name in values if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG}: not as ReVision writes it: {error}") from error
