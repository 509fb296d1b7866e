"""Encoders in Hugging Face directories: CLIP, SigLIP and what has their interface."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..._extras import import_extra
from .base import Encoder, Tokens, files_hash, plain

LOCAL = {"local_files_only": True, "trust_remote_code": False}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def transformers() -> ModuleType:
    """Import transformers; the error says how to install it."""
    return import_extra("transformers", "clip,train", "A Hugging Face model")


class HuggingFaceEncoder(Encoder):
    """A CLIP or SigLIP model in `folder`: config, safetensors, processor and tokenizer files.

    No code in the directory is run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.name, library = os.fspath(folder), transformers()
        with explained(folder):
            made = library.AutoModel.from_pretrained(folder, dtype=self.dtype, **LOCAL)
            self._processor = load_processor(Path(folder))
            self._tokenizer = library.AutoTokenizer.from_pretrained(folder, **LOCAL)
        if not hasattr(made, "get_image_features") or not hasattr(made, "get_text_features"):
            want = "expected one with get_image_features and get_text_features, as CLIP and SigLIP"
            raise ValueError(f"{folder}: holds a {type(made).__name__}, {want}")
        self._sigmoid = made.config.model_type.startswith("siglip")
        text = made.config.text_config
        self._context = min(text.max_position_embeddings, self._tokenizer.model_max_length)
        self.settings = plain({"preprocess": self._processor.to_dict(), "context": self._context})
        self.settings["tokenizer"] = tokenizer_hash(Path(folder))
        self.settings["library"] = f"transformers {library.__version__}"
        self.model = self._place(made)
        with explained(folder):
            self.dimension = self._measure()

    def prepare_image(self, image: Any) -> torch.Tensor:
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0]

    def prepare_texts(self, texts: list[str]) -> Tokens:
        how = {"padding": "max_length", "truncation": True, "max_length": self._context}
        tokens = self._tokenizer(texts, return_tensors="pt", **how)
        # SigLIP was trained without a mask, whatever its tokenizer gives.
        names = ("input_ids",) if self._sigmoid else ("input_ids", "attention_mask")
        return {name: tokens[name] for name in names if name in tokens}

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.dtype)))

    def _text_features(self, tokens: Tokens) -> torch.Tensor:
        return pooled(self.model.get_text_features(**tokens))


def pooled(output: Any) -> torch.Tensor:
    """The rows `[n, D]`: transformers 5 wraps them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def load_processor(folder: Path) -> Any:
    """The image processor of a directory."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        want = f"expected {' or '.join(PROCESSOR_FILES)}: how its images are prepared"
        raise ValueError(f"{folder}: {want}; save the processor there")
    return transformers().AutoImageProcessor.from_pretrained(folder, **LOCAL)


def tokenizer_hash(folder: Path) -> str:
    """Of the files that a tokenizer is made of."""
    names = ("vocab", "merges", "tokenizer", "special_tokens", "spiece", "added_tokens")
    return files_hash([one for one in folder.iterdir() if one.name.startswith(names)])


@contextmanager
def explained(folder: str | os.PathLike[str]):
    """What transformers says of a directory that it cannot load, in one line, with its name."""
    library = transformers()
    before, bars = library.logging.get_verbosity(), library.logging.is_progress_bar_enabled()
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "expected a directory as save_pretrained writes it: model, processor, tokenizer"
        raise ValueError(f"{folder}: cannot be loaded ({what}); {advice}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{folder}: its weights are damaged ({error}); copy them again") from error
    finally:
        library.logging.set_verbosity(before)
        if bars:
            library.logging.enable_progress_bar()
