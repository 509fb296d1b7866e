"""LLM2CLIP, the paper's encoder: a CLIP vision tower, and a language model under an adapter.

It is published as two directories: the vision tower with the adapter (`LLM2CLIP-Openai-...`), and
the language model with bidirectional attention (`LLM2CLIP-Llama-3-...-CC-Finetuned`). The code in
those directories is not run; this file computes the same:

1. A text in the chat format of Llama 3 goes through the language model without a causal mask.
2. The last hidden states are averaged over the text's own tokens and its end mark, `[4096]`.
3. The adapter: unit length, residual blocks `x + W2 gelu(W1 norm(x))`, layer norm, linear `[1280]`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ...interface.option_values import Precision
from . import hugging_face
from .base import StrPath, Tokens, weights_hash
from .hugging_face import TransformersEncoder, transformers

CONTEXT = 512  # tokens, as in the paper's code
HEAD, END = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
ADAPTER = "text_adapter.adaptor."
TOWER = ("vision_model.", "visual_projection.")


def is_llm2clip(folder: Path) -> bool:
    """Return whether the `config.json` of a directory is LLM2CLIP's."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        classes = [*config.get("architectures", []), *config.get("auto_map", {}).values()]
        return any("llm2clip" in str(name).lower() for name in classes)
    except (ValueError, AttributeError, TypeError):
        return False


class Llm2ClipEncoder(TransformersEncoder):
    """LLM2CLIP from `folder`, with its language model from `text_model` or `folder/text_model`.

    Without a language model it embeds images alone. For `device` and `precision` see
    :class:`Encoder`.
    ValueError, OSError or ImportError if a directory cannot be loaded.
    """

    def __init__(
        self,
        folder: StrPath,
        text_model: StrPath | None = None,
        *,
        device: str | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.name, self._folder, library = os.fspath(folder), Path(folder), transformers()
        with hugging_face.explained(folder):
            config = library.CLIPConfig.from_pretrained(folder)
            vision = config.vision_config
            vision.projection_dim = config.projection_dim
            weights: dict[str, torch.Tensor] = {}
            for path in self._folder.glob("*.safetensors"):
                weights |= load_file(path)
            if not weights:
                raise ValueError("expected *.safetensors, as no pickle is loaded; convert them")
            tower = library.CLIPVisionModelWithProjection(vision)
            names = [k for k in weights if k.startswith(TOWER) and "position_ids" not in k]
            tower.load_state_dict({name: weights[name] for name in names})
            adapter = Adapter(weights)
            side = vision.image_size
            usual = library.CLIPImageProcessor(  # what is published has none of its own
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            )
            self._processor = hugging_face.load_processor(self._folder, usual)
        self._record_processor(CONTEXT)
        towers = nn.ModuleDict({"tower": tower, "adapter": adapter})
        self.model = self._frozen(towers.to(self.dtype))
        self.architecture = {"config": hugging_face.config_of(tower)}
        self.dimension = config.projection_dim
        text_folder = Path(text_model or self._folder / "text_model")
        self._language = self._load_language(text_folder) if text_folder.is_dir() else None
        if self._language is None and text_folder.name != "text_model":
            raise ValueError(f"{text_folder}: is no directory; name that of the language model")

    def _load_language(self, folder: Path) -> nn.Module:
        with hugging_face.explained(folder):
            model = self._load(folder, attn_implementation="sdpa")
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        vocabulary = self._tokenizer.get_vocab()
        chat = all(mark in vocabulary for mark in ("<|start_header_id|>", END))
        self._head, self._end = (HEAD, END) if chat else ("", "")
        self.settings["language_model"] = weights_hash(model)
        self.architecture["language_model"] = hugging_face.config_of(model)
        self._record_tokenizer(folder)
        width, expected = model.config.hidden_size, self.model["adapter"].width
        if width != expected:
            sizes = f"its hidden size is {width}, the adapter of {self._folder} takes {expected}"
            raise ValueError(f"{folder}: {sizes}; name the language model that belongs to it")
        language: nn.Module = model.eval().requires_grad_(False).to(self.device)
        return language

    def prepare_texts(self, texts: list[str]) -> Tokens:
        """Return token ids padded on the left, their mask, and which are the text's own.

        ValueError if there is no language model.
        """
        if self._language is None:
            advice = "give --text-model, the directory of the one that belongs to it"
            raise ValueError(f"{self._folder}: has no language model for texts; {advice}")
        bodies = [text.strip() + self._end for text in texts]
        limits = {"truncation": True, "max_length": CONTEXT}
        tokens = self._tokenizer(
            [self._head + body for body in bodies], padding=True, return_tensors="pt", **limits
        )
        body_ids = self._tokenizer(bodies, add_special_tokens=False, **limits)["input_ids"]
        lengths = torch.tensor([len(ids) for ids in body_ids])
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        position = torch.arange(ids.shape[1])
        own = mask & (position >= ids.shape[1] - lengths[:, None])  # [n, L], padded on the left
        return {"input_ids": ids, "attention_mask": mask, "own": own}

    def _image_features(self, pixels: torch.Tensor) -> Any:
        return self.model["tower"](pixel_values=pixels.to(self.dtype)).image_embeds

    def _text_features(self, tokens: Tokens) -> Any:
        assert self._language is not None  # prepare_texts has refused
        mask, length = tokens["attention_mask"], tokens["input_ids"].shape[1]
        bidirectional = mask[:, None, None, :].expand(-1, 1, length, -1)  # [n, 1, L, L]
        states = self._language(
            input_ids=tokens["input_ids"], attention_mask=bidirectional, use_cache=False
        ).last_hidden_state
        own = tokens["own"].unsqueeze(-1)
        mean = states.float().mul(own).sum(1) / own.sum(1)  # [n, width]
        return self.model["adapter"](mean.to(self.dtype))


class Adapter(nn.Module):
    """Map the language model's mean state `[n, width]` to the space of the images `[n, D]`."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        """Build the adapter in the shape of its weights and load them."""
        super().__init__()
        own = {k.removeprefix(ADAPTER): v for k, v in weights.items() if k.startswith(ADAPTER)}
        if not own:
            parts = ", ".join(sorted({name.partition(".")[0] for name in weights}))
            raise ValueError(f"expected an adapter in {ADAPTER}*, got {parts}")
        last = max(int(name.partition(".")[0]) for name in own)
        dimension, self.width = own[f"{last}.weight"].shape
        widths = [len(own[f"{number}.fn.0.weight"]) for number in range(last - 1)]
        self.adaptor = nn.Sequential(
            *(Block(self.width, width) for width in widths),
            nn.LayerNorm(self.width),
            nn.Linear(self.width, dimension, bias=f"{last}.bias" in own),
        )
        self.adaptor.load_state_dict(own)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return features `[n, D]` of mean states `[n, width]`."""
        features: torch.Tensor = self.adaptor(nn.functional.normalize(states, dim=-1))
        return features


class Block(nn.Module):
    """A residual block, `x + W2 gelu(W1 norm(x))`."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        expand, contract = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        # The identity stands for the published model's dropout: weights are named by position.
        self.fn = nn.Sequential(expand, nn.GELU(), nn.Identity(), contract)
        self.ln = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[n, width]` of `[n, width]`."""
        update: torch.Tensor = self.fn(self.ln(x))
        return x + update
