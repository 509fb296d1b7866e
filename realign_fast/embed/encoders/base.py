"""CLIP-like encoders: images and texts -> unit rows of one space. One library a file beside this.

    encoder = load_encoder("ViT-B-32", "laion2b_s34b_b79k")  # open_clip
    encoder = load_encoder("clip-vit-base-patch32/")  # a Hugging Face directory, CLIP or SigLIP
    rows = encoder.embed_images([image, ...])  # [N, D] float32 on the CPU, of unit length

Work is split in two: `prepare_image` and `prepare_texts` run in decoding processes, on the CPU;
`image_rows` and `text_rows` run the model on its device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._device import check_device
from ..decode import pillow

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Tokens = dict[str, torch.Tensor]  # by argument of the text tower: [n, L] each


class Encoder:
    """What `embed` needs of a model. A subclass has `model` and the four methods below."""

    name: str  # as it was asked for
    dimension: int  # D
    model: torch.nn.Module
    settings: dict[str, Any]  # of preprocessing and tokens: rows depend on them

    def __init__(self, device: str | None, precision: str | None) -> None:
        self.device = check_device(device)
        self.precision = precision or ("bf16" if self.device.type == "cuda" else "fp32")
        if self.precision not in PRECISIONS:
            want = f"expected one of {', '.join(PRECISIONS)}"
            raise ValueError(f"precision: got {precision!r}, {want}")
        self.dtype = PRECISIONS[self.precision]

    def prepare_image(self, image: Any) -> torch.Tensor:
        """A `PIL.Image` in RGB as the model takes it, `[3, height, width]`."""
        raise NotImplementedError

    def prepare_texts(self, texts: list[str]) -> Tokens:
        """Texts as tokens; those longer than the model's context are cut there."""
        raise NotImplementedError

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _text_features(self, tokens: Tokens) -> torch.Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def image_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit rows `[n, D]` float32, on the device, of prepared images `[n, 3, height, width]`."""
        return _unit(self._image_features(pixels.to(self.device, non_blocking=True)))

    @torch.inference_mode()
    def text_rows(self, tokens: Tokens) -> torch.Tensor:
        """Unit rows `[n, D]` float32, on the device, of prepared texts."""
        on_device = {k: v.to(self.device, non_blocking=True) for k, v in tokens.items()}
        return _unit(self._text_features(on_device))

    def embed_images(self, images: Sequence[Any], batch_size: int = 64) -> torch.Tensor:
        """Unit rows `[N, D]` float32 on the CPU of `PIL.Image`s or prepared tensors."""
        prepared = (
            one if isinstance(one, torch.Tensor) else self.prepare_image(one.convert("RGB"))
            for one in images
        )
        parts = []
        while batch := list(islice(prepared, batch_size)):
            parts.append(self.image_rows(torch.stack(batch)).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.dimension)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Unit rows `[N, D]` float32 on the CPU."""
        texts, parts = list(texts), []
        for first in range(0, len(texts), batch_size):
            tokens = self.prepare_texts(texts[first : first + batch_size])
            parts.append(self.text_rows(tokens).cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.dimension)

    def facts(self) -> dict[str, Any]:
        """Everything that rows depend on in the encoder, as plain values."""
        how = {"precision": self.precision, "settings": self.settings}
        return {"weights": self._weights, **how}

    def _measure(self) -> int:
        """D, as both towers give it."""
        blank = np.zeros((3, 3, 3), np.uint8)
        image = self.embed_images([pillow().Image.fromarray(blank)]).shape[1]
        text = self.embed_texts(["a"]).shape[1]
        if image != text:
            got = f"images become {image} numbers, texts {text}"
            raise ValueError(f"{type(self.model).__name__}: {got}; expected one space for both")
        return image

    def _place(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model on the device, frozen; its weights are hashed on the way."""
        self._weights = weights_hash(model)
        return model.eval().requires_grad_(False).to(self.device)


def weights_hash(model: torch.nn.Module) -> str:
    """Of every weight and buffer by name."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(data.view(torch.uint8).numpy() if data.numel() else b"")
    return total.hexdigest()


def files_hash(paths: Sequence[Path]) -> str:
    """Of the contents of small files."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        data = path.read_bytes()
        total.update(f"{path.name} {len(data)}".encode() + data)
    return total.hexdigest()


def plain(value: Any) -> Any:
    """A setting as json has it."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
