"""CLIP-like encoders, one file for each library."""

from __future__ import annotations

import os
from pathlib import Path

from .base import Encoder
from .hugging_face import HuggingFaceEncoder
from .llm2clip import Llm2ClipEncoder, is_llm2clip
from .open_clip import OpenClipEncoder

__all__ = ["Encoder", "HuggingFaceEncoder", "Llm2ClipEncoder", "OpenClipEncoder", "load_encoder"]


def load_encoder(
    model: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    *,
    text_model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Encoder:
    """The encoder that `model` names.

    `model`: a directory of Hugging Face's layout (CLIP, SigLIP, LLM2CLIP) or of open_clip's
    (`open_clip_config.json`), a json config file of open_clip, or a model name that open_clip
    knows. `pretrained`: for the last two a tag, or a checkpoint file. `text_model`: for LLM2CLIP
    the directory of its language model. `device`: "cpu", "cuda", "cuda:1"; by default CUDA where
    there is one. `precision`: "fp32" or "bf16" (the default on CUDA).

    Raises:
        ValueError, OSError, ImportError: in one sentence, what is wrong and what to do.
    """
    folder = Path(model)
    how = {"device": device, "precision": precision}
    if not (folder / "config.json").is_file() or (folder / "open_clip_config.json").is_file():
        if text_model is not None:
            raise ValueError(f"{model}: is no LLM2CLIP directory; leave the text model out")
        return OpenClipEncoder(model, pretrained, **how)
    if pretrained is not None:
        raise ValueError(f"{model}: a directory holds its weights; leave {pretrained!r} out")
    if is_llm2clip(folder):
        return Llm2ClipEncoder(folder, text_model, **how)
    if text_model is not None:
        raise ValueError(f"{model}: is no LLM2CLIP directory; leave the text model out")
    return HuggingFaceEncoder(folder, **how)
