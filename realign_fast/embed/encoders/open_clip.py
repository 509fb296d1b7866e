"""Encoders of open_clip: any model it knows by name, with a pretrained tag or a checkpoint file."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..._extras import import_extra
from .base import Encoder, Tokens, plain


def open_clip() -> ModuleType:
    """Import open_clip, or raise an error that says how to install it."""
    user = "An open_clip encoder (with a torchvision that fits the installed torch)"
    return import_extra("open_clip", "clip", user)


class OpenClipEncoder(Encoder):
    """An open_clip model.

    `model`: its name, a json config file, or a directory with `open_clip_config.json` and weights.
    `pretrained`: a tag that open_clip downloads, or a checkpoint file (state dict or safetensors;
    nothing else in it is unpickled).
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        pretrained: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.name = os.fspath(model) + (f" {os.fspath(pretrained)}" if pretrained else "")
        library, name = open_clip(), self._name(os.fspath(model), pretrained)
        weights = os.fspath(pretrained) if pretrained is not None else None
        with _explained(name, weights):
            made = library.create_model(
                name, weights, precision=self.precision, require_pretrained=True
            )
            self._tokenize = library.get_tokenizer(name)
            preprocess, transform = made.visual.preprocess_cfg, library.transform
            how = transform.PreprocessCfg(**preprocess)
            self._prepare = transform.image_transform_v2(how, is_train=False)
        self._mean, self._std = self._take_normalization()
        self.settings = plain({"preprocess": preprocess, "context": self._tokenize.context_length})
        self.settings["library"] = f"open_clip {library.__version__}"
        self.model = self._place(made)
        self.dimension = self._measure()

    def _name(self, model: str, pretrained: Any) -> str:
        """The name that open_clip knows the model by."""
        library, path = open_clip(), Path(model)
        if (path / "open_clip_config.json").is_file():
            if pretrained is not None:
                raise ValueError(f"{model}: holds its own weights; leave {pretrained!r} out")
            return f"local-dir:{model}"
        if path.is_dir():
            want = "expected config.json (Hugging Face) or open_clip_config.json in it"
            raise ValueError(f"{model}: no model directory; {want}")
        if path.suffix == ".json" and path.is_file():
            if path.stem not in library.list_models():
                library.add_model_config(path)
            if path.stem not in library.list_models():
                want = "embed_dim, vision_cfg and text_cfg"
                raise ValueError(f"{model}: no model config of open_clip; expected {want}")
            model = path.stem
        known = model in library.list_models() or ":" in model
        if not known:
            import difflib

            if os.sep in model:
                want = (
                    "a Hugging Face or open_clip directory, a json config, or a name of open_clip"
                )
                raise ValueError(f"{model}: no such directory or file; expected {want}")
            near = difflib.get_close_matches(model, library.list_models(), 3, 0.4)
            raise ValueError(
                f"model: open_clip knows no {model!r}; near are {', '.join(near) or 'none'}; "
                "name one of open_clip.list_models(), a json config or a directory"
            )
        if pretrained is None and ":" not in model:
            tags = ", ".join(library.list_pretrained_tags_by_model(model)) or "none"
            want = f"give --pretrained: a checkpoint file or a tag (there are: {tags})"
            raise ValueError(f"{model}: untrained weights would embed nothing; {want}")
        return model

    def _take_normalization(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Take the last steps, to [0, 1] and normalisation, out of the preprocessing.

        They are then done on the device, and processes hand over bytes instead of floats.
        """
        steps = self._prepare.transforms
        if [type(one).__name__ for one in steps[-2:]] != ["MaybeToTensor", "Normalize"]:
            return None, None
        mean, std = (torch.tensor(getattr(steps[-1], one)) for one in ("mean", "std"))
        del steps[-2:]
        shape = (3, 1, 1)
        return mean.view(shape).to(self.device), std.view(shape).to(self.device)

    def prepare_image(self, image: Any) -> torch.Tensor:
        prepared = self._prepare(image)
        if isinstance(prepared, torch.Tensor):
            return prepared
        return torch.from_numpy(np.array(prepared)).permute(2, 0, 1).contiguous()

    def prepare_texts(self, texts: list[str]) -> Tokens:
        return {"text": self._tokenize(texts)}

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(255).sub_(self._mean).div_(self._std)
        return self.model.encode_image(pixels.to(self.dtype))

    def _text_features(self, tokens: Tokens) -> torch.Tensor:
        return self.model.encode_text(tokens["text"])


@contextmanager
def _explained(name: str, weights: str | None):
    """open_clip's errors in one line; its warnings about what we check ourselves not at all."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:  # a damaged checkpoint raises nearly everything
        raise ValueError(_words(name, weights, error)) from error
    finally:
        logging.disable(before)


def _words(name: str, weights: str | None, error: Exception) -> str:
    what = " ".join(str(error).split())[:200] or type(error).__name__
    if "weights_only" in what:  # torch would advise to unpickle anything
        what = "no plain state dict; objects in pickles are not loaded"
    if weights and os.path.isfile(weights):
        return f"{weights}: is no checkpoint of {name} ({what}); give its state dict or safetensors"
    where = f"{name} with {weights!r}" if weights else name
    return f"{where}: cannot be loaded ({what}); give a known tag, or a checkpoint file"
