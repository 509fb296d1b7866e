"""CLIP-like encoders: a subclass of :class:`Encoder` for each library, which loads on first use."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..._extras import import_extra
from ...interface.option_values import Precision
from .base import FILES, Encoder, StrPath, loading
from .hugging_face import HuggingFaceEncoder
from .open_clip import OpenClipEncoder

__all__ = ["Encoder", "HuggingFaceEncoder", "OpenClipEncoder", "load_encoder"]


def load_encoder(
    model: StrPath,
    pretrained: StrPath | None = None,
    *,
    device: str | None = None,
    precision: Precision | None = None,
) -> Encoder:
    """Load the encoder that `model` names.

    Args:
        model: a directory in the layout of Hugging Face (CLIP, SigLIP) or of open_clip
            (with `open_clip_config.json`), a JSON config of open_clip, the name of a model that
            open_clip knows, or `owner/name` of the Hugging Face hub.
        pretrained: the weights of a JSON config or a name: a tag of open_clip, or a checkpoint.
        device: "cpu", "cuda" or "cuda:1"; by default CUDA where there is a GPU.
        precision: "fp32" or "bf16"; by default "bf16" on a GPU that has it, else "fp32".

    Raises:
        ValueError, OSError, ImportError: says in one sentence what is wrong and what to do.
    """
    name = os.fspath(model)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.exists(name):
        encoder = load_encoder(_downloaded(name), pretrained, device=device, precision=precision)
        encoder.name = name
        return encoder
    folder = Path(model)
    if folder.is_dir() and pretrained is not None:
        raise ValueError(f"{model}: a directory holds its weights; leave {pretrained!r} out")
    has_config = (folder / "config.json").is_file()
    if has_config and not (folder / "open_clip_config.json").is_file():
        return HuggingFaceEncoder(folder, device=device, precision=precision)
    return OpenClipEncoder(model, pretrained, device=device, precision=precision)


def _downloaded(name: str) -> Path:
    """Return the folder of a model of the Hugging Face hub, which is downloaded once."""
    hub = import_extra("huggingface_hub", "hub", f"Loading {name!r}, which is no local path,")
    with loading(name, "expected a directory, or a model of the hub; correct the name"):
        for weights in ("*.safetensors", "*.bin"):  # pickles only where there is nothing else
            folder = Path(hub.snapshot_download(name, allow_patterns=[*FILES, weights]))
            if any(folder.glob(weights)):
                break
    return folder
