"""The projector, and what a saved model says of itself.

A row `[D]` of a CLIP-like encoder stands for an image; the projector makes K tokens `[K, H]` in the
language model's input embeddings of it. The paper (arXiv 2602.07026, section 5) feeds K = 576
identical copies of one projected row; here a row is projected once and expanded, which gives the
same numbers for 1/K of the work, forward and backward (the gradient of an expansion is the sum over
the copies).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor, nn

IMAGE_TOKEN = -200  # stands in input ids for one visual token; no vocabulary has it
PROJECTORS = ("linear", "mlp", "prefix")
CONFIG, WEIGHTS = "revision.json", "projector.safetensors"


@dataclass
class ReVisionConfig:
    """What is needed to build the model again; saved as `revision.json`."""

    language_model: str  # the name or path that training started from
    row_dimension: int  # D, columns of a row
    hidden_size: int  # H, of the language model's input embeddings
    projector: str = "mlp"
    visual_tokens: int = 576  # K, tokens of one image
    normalize: bool = True  # rows to unit length first, as aligned rows are
    template: str = "plain"  # what it was last trained on: "plain" or "chat"

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            want = ", ".join(PROJECTORS)
            raise ValueError(f"ReVisionConfig: projector is {self.projector!r}, expected {want}")
        for name in ("row_dimension", "hidden_size", "visual_tokens"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"ReVisionConfig: {name} is {value!r}, expected a number from 1")


class Projector(nn.Module):
    """Rows `[M, D]` to visual tokens `[M, K, H]`.

    `linear`: one layer, K copies. `mlp`: linear, GELU, linear, K copies (the paper's).
    `prefix`: linear, GELU, linear to K different tokens of one row.
    """

    def __init__(self, config: ReVisionConfig) -> None:
        super().__init__()
        self.config = config
        d, h, k = config.row_dimension, config.hidden_size, config.visual_tokens
        last = k * h if config.projector == "prefix" else h
        self.layers = (
            nn.Linear(d, h)
            if config.projector == "linear"
            else nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, last))
        )

    def forward(self, rows: Tensor) -> Tensor:
        """`[M, D]` of any float dtype -> `[M, K, H]`; copies share memory until they are used."""
        config = self.config
        if rows.dim() != 2 or rows.shape[1] != config.row_dimension:
            got = f"image rows have shape {list(rows.shape)}"
            want = f"expected [images, {config.row_dimension}]; embed with the encoder trained on"
            raise ValueError(f"Projector: {got}, {want}")
        rows = rows.to(next(self.parameters()).dtype)
        projected = self.layers(nn.functional.normalize(rows, dim=1) if config.normalize else rows)
        if config.projector == "prefix":
            return projected.view(len(rows), config.visual_tokens, config.hidden_size)
        return projected[:, None].expand(-1, config.visual_tokens, -1)


def read_config(directory: Path) -> ReVisionConfig:
    """Of a saved model; errors say what is missing of it."""
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
        found = json.loads((directory / CONFIG).read_text())
        known = {one.name for one in fields(ReVisionConfig)}
        return ReVisionConfig(**{name: found[name] for name in found if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG}: not as ReVision writes it: {error}") from error
