"""Encoders in Hugging Face directories: CLIP, SigLIP and models with their interface."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..._extras import import_extra
from ...interface.option_values import Precision
from .base import Encoder, StrPath, Tokens, file_digests, loading

LOCAL = {"local_files_only": True, "trust_remote_code": False}


class HuggingFaceEncoder(Encoder):
    """A CLIP or SigLIP model in `folder`: config, safetensors, processor and tokenizer files.

    Code in the directory is not run. For `device` and `precision` see :func:`load_encoder`.
    ValueError, OSError or ImportError if the directory cannot be loaded.
    """

    def __init__(
        self, folder: StrPath, *, device: str | None = None, precision: Precision | None = None
    ) -> None:
        super().__init__(device, precision)
        library = import_extra("transformers", "clip,train", "A Hugging Face model")
        self.name, log = os.fspath(folder), library.logging
        with loading(self.name), ExitStack() as after:
            if log.is_progress_bar_enabled():
                log.disable_progress_bar()
                after.callback(log.enable_progress_bar)
            options = {"dtype": self.dtype, "output_loading_info": True}
            model, info = library.AutoModel.from_pretrained(folder, **LOCAL, **options)
            if missing := sorted(info["missing_keys"]):  # which would be random
                raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others")
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
            self.settings = {"library": f"transformers {library.__version__}"}
            self.settings["files"] = file_digests(Path(folder))
            self._take(model)

    def prepare_image(self, image: Any) -> torch.Tensor:
        """Return the pixels `[3, height, width]` that the processor makes."""
        pixels: torch.Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

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
