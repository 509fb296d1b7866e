"""Encoders in Hugging Face directories: CLIP, SigLIP and models with their interface."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..._extras import import_extra
from ...interface.option_values import Precision
from .base import Encoder, StrPath, Tokens, loading, plain

LOCAL = {"local_files_only": True, "trust_remote_code": False}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
NO_ARCHITECTURE = ("transformers_version", "dtype", "architectures", "id2label", "label2id")
TOKENIZER_FILES = ("vocab", "merges", "tokenizer", "special_tokens", "spiece", "added_tokens")


def transformers() -> ModuleType:
    """Import transformers; the error says how to install it."""
    return import_extra("transformers", "clip,train", "A Hugging Face model")


class TransformersEncoder(Encoder):
    """The base of encoders of transformers, which have an image processor and a tokenizer."""

    _processor: Any
    _tokenizer: Any

    def prepare_image(self, image: Any) -> torch.Tensor:
        """Return the pixels `[3, height, width]` that the processor makes."""
        pixels: torch.Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def _load(self, folder: StrPath, **options: Any) -> Any:
        """Load the tokenizer and the model of a directory, and return the model.

        ValueError if its weights lack some of the model's, which would be random.
        """
        library = transformers()
        self._tokenizer = library.AutoTokenizer.from_pretrained(folder, **LOCAL)
        options |= {"dtype": self.dtype, "output_loading_info": True}
        model, info = library.AutoModel.from_pretrained(folder, **options, **LOCAL)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others")
        return model

    def _record_processor(self, context: int) -> None:
        self.settings = plain({"preprocess": self._processor.to_dict(), "context": context})
        self.settings["library"] = f"transformers {transformers().__version__}"

    def _record_tokenizer(self, folder: Path) -> None:
        """Record the tokenizer, whose files lie in `folder`, among what rows depend on."""
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(folder.iterdir()):
            if path.name.startswith(TOKENIZER_FILES):
                data = path.read_bytes()
                digest.update(f"{path.name} {len(data)}".encode() + data)
        self.settings["tokenizer"] = digest.hexdigest()
        self.architecture["tokenizer"] = tokenizer_state(self._tokenizer)


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
        with explained(folder):
            model_type = transformers().AutoConfig.from_pretrained(folder, **LOCAL).model_type
        if model_type == "siglip2":
            advice = "use one of fixed resolution, whose model_type is siglip"
            raise ValueError(f"{folder}: NaFlex models of SigLIP 2 are not supported; {advice}")
        with explained(folder):
            model = self._load(folder)
            self._processor = load_processor(Path(folder))
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            expected = "expected a model with get_image_features and get_text_features, as CLIP has"
            raise ValueError(f"{folder}: holds a {type(model).__name__}, {expected}")
        self._sigmoid = model_type == "siglip"
        self._lower_case = wants_lower_case(self._tokenizer, Path(folder), self._sigmoid)
        text = model.config.text_config
        self._context = min(text.max_position_embeddings, self._tokenizer.model_max_length)
        self._record_processor(self._context)
        if self._lower_case:
            self.settings["lower_case"] = True
        if self._sigmoid:  # which pools the last token, as it was trained
            self._tokenizer.padding_side = "right"
        self.architecture = {"config": config_of(model)}
        self._record_tokenizer(Path(folder))
        self.model = self._frozen(model)
        with explained(folder):
            self.dimension = self._measured_dimension()

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
        return self.model.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output

    def _text_features(self, tokens: Tokens) -> Any:
        return self.model.get_text_features(**tokens).pooler_output


def config_of(model: Any) -> dict[str, Any]:
    """Return the config of a model, without what its rows do not depend on."""

    def _relevant(values: dict[str, Any]) -> dict[str, Any]:
        names = (name for name in values if name[0] != "_" and name not in NO_ARCHITECTURE)
        return {n: _relevant(v) if isinstance(v := values[n], dict) else v for n in names}

    return _relevant(plain(model.config.to_dict()))


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return everything that a loaded tokenizer of transformers does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend else repr(tokenizer)
    digest = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
    marks = {name: str(mark) for name, mark in tokenizer.special_tokens_map.items()}
    return {"class": type(tokenizer).__name__, "digest": digest, "marks": marks}


def wants_lower_case(tokenizer: Any, folder: Path, sigmoid: bool) -> bool:
    """Return whether a model was trained on lower-case texts, which its tokenizer may not make.

    `do_lower_case` says so; the first checkpoints of SigLIP 2, with Gemma's tokenizer, do not.
    """
    stated = tokenizer.init_kwargs.get("do_lower_case")
    if stated is not None or not sigmoid:
        return bool(stated)
    config = folder / "tokenizer_config.json"
    name = json.loads(config.read_bytes()).get("tokenizer_class") if config.is_file() else None
    return str(name).startswith(("Gemma", "Siglip2"))


def load_processor(folder: Path, usual: Any = None) -> Any:
    """Load the image processor of a directory; where it has none, `usual` or a `ValueError`."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        if usual is None:
            names = " or ".join(PROCESSOR_FILES)
            raise ValueError(f"expected {names}, which says how images are prepared; save it there")
        return usual
    return transformers().AutoImageProcessor.from_pretrained(folder, **LOCAL)


@contextmanager
def explained(folder: StrPath) -> Iterator[None]:
    """Load from a directory without progress bars; an error is one line that names it."""
    log, expected = transformers().logging, "expected a directory as save_pretrained writes it"
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with loading(lambda reason: f"{folder}: cannot be loaded ({reason}); {expected}"):
            yield
    finally:
        if bars:
            log.enable_progress_bar()
