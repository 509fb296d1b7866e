"""The base class of encoders: images and texts become unit rows of one space.

The work has two halves: `prepare_image` and `prepare_texts` run in decoding processes on the CPU,
`image_rows` and `text_rows` run the model on its device. Each library has a subclass in a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from ...interface.devices import check_device, has_bf16
from ...interface.option_values import Precision
from ...storage.tensor_file import tensor_digest
from ..decode import pillow

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
StrPath = str | os.PathLike[str]
FILES = ("*.json", "*.txt", "*.model")  # of a model: configuration, processor, tokenizer
Tokens = dict[str, torch.Tensor]  # [n, L] each, by the name of the text tower's argument


class Encoder:
    """A CLIP-like model. A subclass sets the attributes below and has the four methods that raise.

    For `device` and `precision` see :func:`load_encoder`; another value is a ValueError.
    """

    name: str  # as it was asked for
    dimension: int  # D
    model: Any  # a torch.nn.Module
    settings: dict[str, Any]  # everything beside the weights that rows depend on

    def __init__(self, device: str | None, precision: Precision | None) -> None:
        self.device = check_device(device)
        self.precision: Precision = precision or (
            "bf16" if self.device.type == "cuda" and has_bf16(self.device) else "fp32"
        )
        if self.precision not in DTYPES:
            raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[self.precision]

    def prepare_image(self, image: Any) -> torch.Tensor:
        """Return a `PIL.Image` in RGB as the model takes it, `[3, height, width]`."""
        raise NotImplementedError

    def prepare_texts(self, texts: list[str]) -> Tokens:
        """Return the tokens of texts; a text longer than the model's context is cut there."""
        raise NotImplementedError

    def _image_features(self, pixels: torch.Tensor) -> Any:  # [n, D]
        raise NotImplementedError

    def _text_features(self, tokens: Tokens) -> Any:  # [n, D]
        raise NotImplementedError

    @torch.inference_mode()
    def image_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit rows `[n, D]` float32, on the device, of prepared `[n, 3, height, width]`."""
        return _unit(self._image_features(pixels.to(self.device, self.dtype, non_blocking=True)))

    @torch.inference_mode()
    def text_rows(self, tokens: Tokens) -> torch.Tensor:
        """Return unit rows `[n, D]` float32, on the device, of prepared texts."""
        on_device = {k: v.to(self.device, non_blocking=True) for k, v in tokens.items()}
        return _unit(self._text_features(on_device))

    def embed_images(self, images: Sequence[Any], batch_size: int = 64) -> torch.Tensor:
        """Return unit rows `[N, D]` float32, on the CPU, of `PIL.Image`s."""
        starts = range(0, len(images), batch_size)
        batches = ([i.convert("RGB") for i in images[j : j + batch_size]] for j in starts)
        pixels = (torch.stack([*map(self.prepare_image, batch)]) for batch in batches)
        return self._joined(map(self.image_rows, pixels))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Return unit rows `[N, D]` float32, on the CPU, of texts."""
        starts = range(0, len(texts), batch_size)
        batches = (self.prepare_texts(list(texts[i : i + batch_size])) for i in starts)
        return self._joined(map(self.text_rows, batches))

    def _joined(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        rows = [part.cpu() for part in parts]
        return torch.cat(rows) if rows else torch.empty(0, self.dimension)

    def facts(self) -> dict[str, Any]:
        """Return everything in the encoder that rows depend on, as plain values."""
        own = {"weights": self._weights_hash, "precision": self.precision}
        return own | {"settings": self.settings}

    def _take(self, model: torch.nn.Module) -> None:
        """Take a model, frozen on the device, and set the digest of its weights and D."""
        self._weights_hash = tensor_digest(model.state_dict()).removeprefix("blake2b=")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.dimension = self.embed_images([pillow().Image.new("RGB", (3, 3))]).shape[1]


@contextmanager
def loading(name: str, expected: str = "") -> Iterator[None]:
    """Keep the log of a library silent while it loads a model.

    An error of nearly any type becomes a `ValueError` that names the model and what was expected.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        advice = f"; {expected}" if expected else ""
        raise ValueError(f"{name}: cannot be loaded ({reason}){advice}") from error
    finally:
        logging.disable(level)


def file_digests(folder: Path) -> dict[str, str]:
    """Return a BLAKE2b digest of each file beside the weights of a model, by its name."""
    paths = sorted(path for pattern in FILES for path in folder.glob(pattern))
    return {path.name: blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in paths}


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
