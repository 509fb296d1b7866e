"""Encoders of open_clip: any model it knows by name, with a pretrained tag or a checkpoint file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..._extras import import_extra
from ...interface.option_values import Precision
from .base import Encoder, StrPath, Tokens, file_digests, loading


class OpenClipEncoder(Encoder):
    """An open_clip model. For `device` and `precision` see :func:`load_encoder`.

    Args:
        model: its name, a JSON config, or a directory with `open_clip_config.json` and weights.
        pretrained: a tag that open_clip downloads, or a checkpoint file (a state dict or
            safetensors; nothing else in it is unpickled).

    Raises:
        ValueError, OSError, ImportError: the model cannot be loaded, and why.
    """

    def __init__(
        self,
        model: StrPath,
        pretrained: StrPath | None = None,
        *,
        device: str | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(device, precision)
        user = "An open_clip model (with a torchvision that fits the installed torch)"
        library = import_extra("open_clip", "clip", user)
        path, name = Path(model), os.fspath(model)
        weights = None if pretrained is None else os.fspath(pretrained)
        self.name = f"{name} {weights}" if weights else name
        expected = "expected a directory of Hugging Face or open_clip, or a config or known name "
        expected += "with --pretrained, a known tag or a checkpoint (state dict or safetensors)"
        with loading(self.name, expected):
            if path.is_dir():
                name = f"local-dir:{name}"
            elif path.suffix == ".json" and path.is_file():
                library.add_model_config(path)
                name = path.stem
            options = {"precision": self.precision, "require_pretrained": True}
            clip = library.create_model(name, weights, **options)
            self._tokenize = library.get_tokenizer(name)
            preprocess, transform = clip.visual.preprocess_cfg, library.transform
            pixels = transform.PreprocessCfg(**preprocess)
            self._prepare = transform.image_transform_v2(pixels, is_train=False)
            settings = {
                "preprocess": preprocess,
                "library": f"open_clip {library.__version__}",
                "config": library.get_model_config(name),
                "files": file_digests(path) if path.is_dir() else {},
            }
            self.settings = json.loads(json.dumps(settings, default=str))  # as a file gives it
            self._take(clip)

    def prepare_image(self, image: Any) -> torch.Tensor:
        """Return normalized pixels `[3, height, width]`."""
        pixels: torch.Tensor = self._prepare(image)
        return pixels

    def prepare_texts(self, texts: list[str]) -> Tokens:
        """Return token ids, cut or padded to the model's context."""
        return {"text": self._tokenize(texts)}

    def _image_features(self, pixels: torch.Tensor) -> Any:
        return self.model.encode_image(pixels)

    def _text_features(self, tokens: Tokens) -> Any:
        return self.model.encode_text(tokens["text"])
