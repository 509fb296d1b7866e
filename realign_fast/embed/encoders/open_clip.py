"""Encoders of open_clip: any model it knows by name, with a pretrained tag or a checkpoint file."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..._extras import import_extra
from ...interface.option_values import Precision
from .base import Encoder, StrPath, Tokens, loading, plain
from .hugging_face import config_of, tokenizer_state


def open_clip() -> ModuleType:
    """Import open_clip; the error says how to install it."""
    user = "An open_clip model (with a torchvision that fits the installed torch)"
    return import_extra("open_clip", "clip", user)


class OpenClipEncoder(Encoder):
    """An open_clip model. For `device` and `precision` see :class:`Encoder`.

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
        self.name = os.fspath(model) + (f" {os.fspath(pretrained)}" if pretrained else "")
        library, name = open_clip(), _known_name(os.fspath(model), pretrained)
        weights = os.fspath(pretrained) if pretrained is not None else None
        options = {"precision": self.precision, "require_pretrained": True}
        with loading(lambda reason: _load_error(name, weights, reason)):
            clip = library.create_model(name, weights, **options)
            self._tokenize = library.get_tokenizer(name)
            preprocess, transform = clip.visual.preprocess_cfg, library.transform
            config = transform.PreprocessCfg(**preprocess)
            self._prepare = transform.image_transform_v2(config, is_train=False)
        self._normalization = self._take_normalization()
        self.settings = plain({"preprocess": preprocess, "context": self._tokenize.context_length})
        self.settings["library"] = f"open_clip {library.__version__}"
        self.architecture = {"config": plain(library.get_model_config(name))}
        if hasattr(tower := getattr(clip, "text", None), "config"):  # of transformers
            self.architecture["text_tower"] = config_of(tower)
        if hasattr(self._tokenize, "tokenizer"):
            self.architecture["tokenizer"] = tokenizer_state(self._tokenize.tokenizer)
        if "timm_model_name" in self.architecture["config"]["vision_cfg"]:
            self.architecture["library"] = f"timm {import_extra('timm', 'clip', name).__version__}"
        self.model = self._frozen(clip)
        self.dimension = self._measured_dimension()

    def _take_normalization(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take the last steps out of the preprocessing: to [0, 1], and normalization.

        The device does them, so that decoding processes hand over bytes. Returns the mean and the
        standard deviation, `[3, 1, 1]` each, or None where other steps end the preprocessing.
        """
        steps = self._prepare.transforms
        if [type(step).__name__ for step in steps[-2:]] != ["MaybeToTensor", "Normalize"]:
            return None
        mean, deviation = torch.tensor(steps[-1].mean), torch.tensor(steps[-1].std)
        del steps[-2:]
        return mean.view(3, 1, 1).to(self.device), deviation.view(3, 1, 1).to(self.device)

    def prepare_image(self, image: Any) -> torch.Tensor:
        """Return pixels `[3, height, width]`: bytes, or floats if they are normalized here."""
        prepared = self._prepare(image)
        if isinstance(prepared, torch.Tensor):
            return prepared
        return torch.from_numpy(np.array(prepared)).permute(2, 0, 1).contiguous()

    def prepare_texts(self, texts: list[str]) -> Tokens:
        """Return token ids, cut or padded to the model's context."""
        return {"text": self._tokenize(texts)}

    def _image_features(self, pixels: torch.Tensor) -> Any:
        if pixels.dtype == torch.uint8 and self._normalization is not None:
            mean, deviation = self._normalization
            pixels = pixels.float().div_(255).sub_(mean).div_(deviation)
        return self.model.encode_image(pixels.to(self.dtype))

    def _text_features(self, tokens: Tokens) -> Any:
        return self.model.encode_text(tokens["text"])


def _known_name(model: str, pretrained: object) -> str:
    """Return the name by which open_clip knows the model of a directory, config or name.

    ValueError if open_clip knows no such model, or its weights are not named once.
    """
    path, library = Path(model), open_clip()
    if path.is_dir():
        if not (path / "open_clip_config.json").is_file():
            expected = "expected config.json (Hugging Face) or open_clip_config.json in it"
            raise ValueError(f"{model}: is no model directory; {expected}")
        if pretrained is not None:
            raise ValueError(f"{model}: holds its own weights; leave {pretrained!r} out")
        return f"local-dir:{model}"
    if path.suffix == ".json" and path.is_file():
        model = _added_config(path)
    if ":" in model:
        return model
    if model not in (models := library.list_models()):
        expected = "give a Hugging Face or open_clip directory, a JSON config or a known name"
        if os.sep in model:
            raise ValueError(f"{model}: no such directory or file; {expected}")
        similar = ", ".join(difflib.get_close_matches(model, models, 3, 0.4)) or "none"
        raise ValueError(f"model: open_clip knows no {model!r}, near are {similar}; {expected}")
    if pretrained is None:
        tags = ", ".join(library.list_pretrained_tags_by_model(model)) or "none"
        advice = f"give --pretrained, a checkpoint file or a tag (there are: {tags})"
        raise ValueError(f"{model}: untrained weights would embed nothing; {advice}")
    return model


def _added_config(path: Path) -> str:
    """Add a JSON config to the models of open_clip under a name that no other config has."""
    data, name, config = path.read_bytes(), path.stem, None
    with suppress(ValueError):
        config = json.loads(data)
    parts = {"embed_dim", "vision_cfg", "text_cfg"}
    if not isinstance(config, dict) or not parts <= config.keys():
        raise ValueError(f"{path}: is no model config of open_clip; expected {sorted(parts)}")
    library = open_clip()
    if name in library.list_models() and library.get_model_config(name) != config:
        name += f"-{hashlib.blake2b(data, digest_size=4).hexdigest()}"
    with TemporaryDirectory() as folder:
        copy = Path(folder, f"{name}.json")
        copy.write_bytes(data)
        library.add_model_config(copy)
    return name


def _load_error(name: str, weights: str | None, reason: str) -> str:
    if "weights_only" in reason:  # torch would advise to unpickle everything
        reason = "it is no plain state dict; objects in pickles are not loaded"
    if weights and os.path.isfile(weights):
        advice = "give its state dict or safetensors"
        return f"{weights}: is no checkpoint of {name} ({reason}); {advice}"
    model = f"{name} with {weights!r}" if weights else name
    return f"{model}: cannot be loaded ({reason}); give a known tag, or a checkpoint file"
