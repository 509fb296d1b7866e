"""Encoders in Hugging Face directories: CLIP, SigLIP and models with their interface."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from ..._extras import import_extra
from ...interface.option_values import Precision
from .base import Encoder, StrPath, Tokens, loading, plain

LOCAL = {"local_files_only": True, "trust_remote_code": False}


def transformers() -> ModuleType:
    """Import transformers; the error says how to install it."""
    return import_extra("transformers", "clip,train", "A Hugging Face model")


class TransformersEncoder(Encoder):
    """The base of encoders of transformers, which have an image processor and a tokenizer."""

    _processor: Any
    _tokenizer: Any = None

    def prepare_image(self, image: Any) -> torch.Tensor:
        """Return the pixels `[3, height, width]` that the processor makes."""
        pixels: torch.Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def _load(self, kind: str, folder: StrPath, **options: Any) -> Any:
        """Load a model of a directory as the class `kind` of transformers.

        ValueError if its weights lack some of the model's, which would be random.
        """
        options |= {"dtype": self.dtype, "output_loading_info": True}
        model, info = getattr(transformers(), kind).from_pretrained(folder, **options, **LOCAL)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others")
        return model

    def _record(self, **settings: Any) -> None:
        """Record the processor, the tokenizer and other settings, on which rows depend."""
        settings["preprocess"] = self._processor.to_dict()
        settings["library"] = f"transformers {transformers().__version__}"
        settings["tokenizer"] = tokenizer_state(self._tokenizer) if self._tokenizer else None
        self.settings = plain(settings)


class HuggingFaceEncoder(TransformersEncoder):
    """A CLIP or SigLIP model in `folder`: config, safetensors, processor and tokenizer files.

    Code in the directory is not run. For `device` and `precision` see :class:`Encoder`.
    ValueError, OSError or ImportError if the directory cannot be loaded.
    """

    def __init__(
        self, folder: StrPath, *, device: str | None = None, precision: Precision | None = None
    ) -> None:
        super().__init__(device, precision)
        self.name = os.fspath(folder)
        with quietly_loading(folder):
            model, library = self._load("AutoModel", folder), transformers()
            self._tokenizer = tokenizer = library.AutoTokenizer.from_pretrained(folder, **LOCAL)
            model_type = model.config.model_type
            if model_type == "siglip2":
                advice = "use one of fixed resolution, whose model_type is siglip"
                raise ValueError(f"NaFlex models of SigLIP 2 are not supported; {advice}")
            self._processor = library.AutoImageProcessor.from_pretrained(folder, **LOCAL)
            self._sigmoid = model_type == "siglip"
            # The first checkpoints of SigLIP 2, with Gemma's tokenizer, do not say that they were
            # trained on lower-case texts.
            is_lower = type(tokenizer).__name__.startswith(("Gemma", "Siglip2")) and self._sigmoid
            self._lower_case = bool(tokenizer.init_kwargs.get("do_lower_case", is_lower))
            if self._sigmoid:  # which pools the last token, as it was trained
                tokenizer.padding_side = "right"
            text = model.config.text_config
            self._context = min(text.max_position_embeddings, tokenizer.model_max_length)
            config = config_of(model)
            self._record(config=config, context=self._context, lower_case=self._lower_case)
            self._take(model)

    def prepare_texts(self, texts: list[str]) -> Tokens:
        """Return token ids, padded to the context, and their mask except for SigLIP."""
        tokens = self._tokenizer(
            [text.lower() for text in texts] if self._lower_case else texts,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self._context,
        )
        # SigLIP was trained without a mask, whatever its tokenizer gives.
        names = ("input_ids",) if self._sigmoid else ("input_ids", "attention_mask")
        return {name: tokens[name] for name in names if name in tokens}

    def _image_features(self, pixels: torch.Tensor) -> Any:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _text_features(self, tokens: Tokens) -> Any:
        return self.model.get_text_features(**tokens).pooler_output


def config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model, without where it was loaded from and by which version."""
    config: dict[str, Any] = plain(model.config.to_dict())
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return everything that a loaded tokenizer of transformers does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
    marks = {name: str(mark) for name, mark in tokenizer.special_tokens_map.items()}
    return {"class": type(tokenizer).__name__, "digest": digest, "marks": marks}


@contextmanager
def quietly_loading(folder: StrPath) -> Iterator[None]:
    """Load from a directory without progress bars; an error is one line that names it."""
    log = transformers().logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with loading(os.fspath(folder)):
            yield
    finally:
        if bars:
            log.enable_progress_bar()
