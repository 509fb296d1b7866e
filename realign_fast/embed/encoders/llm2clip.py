"""LLM2CLIP, the paper's encoder: a CLIP vision tower, and a language model under an adapter.

Two directories, as they are published: the vision tower with the adapter (`LLM2CLIP-Openai-...`),
and the language model whose attention looks both ways (`LLM2CLIP-Llama-3-...-CC-Finetuned`). The
code that lies in them is not run; this file does what it does:

1. A text in the chat format of Llama 3 goes through the language model without a causal mask.
2. The mean of the last hidden states over the text's own tokens (and its end mark), `[4096]`.
3. The adapter: unit length, residual blocks `x + W2 gelu(W1 norm(x))`, layer norm, linear `[1280]`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .base import Encoder, Tokens, plain, weights_hash
from .hugging_face import (
    LOCAL,
    PROCESSOR_FILES,
    explained,
    load_processor,
    tokenizer_hash,
    transformers,
)

CONTEXT = 512  # tokens; the paper's code reads as many
HEAD, END = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
ADAPTER = "text_adapter.adaptor."


def is_llm2clip(folder: Path) -> bool:
    """Whether the config in a directory is LLM2CLIP's."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        named = [*config.get("architectures", []), *config.get("auto_map", {}).values()]
        return any("llm2clip" in str(one).lower() for one in named)
    except (ValueError, AttributeError, TypeError):
        return False


class Llm2ClipEncoder(Encoder):
    """LLM2CLIP from `folder`; its language model from `text_model`, else `folder/text_model`.

    Without a language model it embeds images alone.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        text_model: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.name, folder, library = os.fspath(folder), Path(folder), transformers()
        with explained(folder):
            config = library.CLIPConfig.from_pretrained(folder)
            vision = config.vision_config
            vision.projection_dim = config.projection_dim
            weights = _weights(folder)
            tower = library.CLIPVisionModelWithProjection(vision)
            own = ("vision_model.", "visual_projection.")
            named = {k: v for k, v in weights.items() if k.startswith(own)}
            tower.load_state_dict({k: v for k, v in named.items() if "position_ids" not in k})
            adapter = Adapter.from_weights(weights)
            if any((folder / name).is_file() for name in PROCESSOR_FILES):
                self._processor = load_processor(folder)
            else:  # as published: that of CLIP at the size of this tower
                size = vision.image_size
                self._processor = library.CLIPImageProcessor(
                    size={"shortest_edge": size}, crop_size={"height": size, "width": size}
                )
        self.settings = plain({"preprocess": self._processor.to_dict(), "context": CONTEXT})
        self.settings["library"] = f"transformers {library.__version__}"
        self.model = self._place(nn.ModuleDict({"tower": tower, "adapter": adapter}).to(self.dtype))
        self.dimension, self._folder = config.projection_dim, folder
        text_model = Path(text_model or folder / "text_model")
        self._language = self._load_language(text_model) if text_model.is_dir() else None
        if self._language is None and text_model.name != "text_model":
            raise ValueError(f"{text_model}: is no directory; name that of the language model")

    def _load_language(self, folder: Path) -> nn.Module:
        library = transformers()
        with explained(folder):
            how = {"dtype": self.dtype, "attn_implementation": "sdpa", **LOCAL}
            model = library.AutoModel.from_pretrained(folder, **how)
            self._tokenizer = library.AutoTokenizer.from_pretrained(folder, **LOCAL)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        known = self._tokenizer.get_vocab()
        chat = all(one in known for one in ("<|start_header_id|>", END))
        self._head, self._end = (HEAD, END) if chat else ("", "")
        self.settings["language_model"] = weights_hash(model)
        self.settings["tokenizer"] = tokenizer_hash(folder)
        width, wanted = model.config.hidden_size, self.model["adapter"].width
        if width != wanted:
            got = f"its hidden size is {width}, the adapter of {self._folder} takes {wanted}"
            raise ValueError(f"{folder}: {got}; name the language model that belongs to it")
        return model.eval().requires_grad_(False).to(self.device)

    def prepare_image(self, image: Any) -> torch.Tensor:
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0]

    def prepare_texts(self, texts: list[str]) -> Tokens:
        if self._language is None:
            want = "give --text-model, the directory of the language model that belongs to it"
            raise ValueError(f"{self._folder}: has no language model for texts; {want}")
        whole = [self._head + text.strip() + self._end for text in texts]
        how = {"truncation": True, "max_length": CONTEXT}
        tokens = self._tokenizer(whole, padding=True, return_tensors="pt", **how)
        own = [text.strip() + self._end for text in texts]
        counted = self._tokenizer(own, add_special_tokens=False, **how)["input_ids"]
        lengths = torch.tensor([len(one) for one in counted])
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        place = torch.arange(ids.shape[1])
        own_tokens = mask & (place >= ids.shape[1] - lengths[:, None])  # [n, L], padded left
        return {"input_ids": ids, "attention_mask": mask, "own": own_tokens}

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model["tower"](pixel_values=pixels.to(self.dtype)).image_embeds

    def _text_features(self, tokens: Tokens) -> torch.Tensor:
        mask, length = tokens["attention_mask"], tokens["input_ids"].shape[1]
        both_ways = mask[:, None, None, :].expand(-1, 1, length, -1)  # [n, 1, L, L]
        states = self._language(
            input_ids=tokens["input_ids"], attention_mask=both_ways, use_cache=False
        ).last_hidden_state
        own = tokens["own"].unsqueeze(-1)
        mean = states.float().mul(own).sum(1) / own.sum(1)  # [n, width]
        return self.model["adapter"](mean.to(self.dtype))


class Adapter(nn.Module):
    """From the language model's mean state `[n, width]` to the space of the images `[n, D]`."""

    def __init__(self, width: int, dimension: int, expanded: list[int], bias: bool) -> None:
        super().__init__()
        self.width = width
        blocks = [Block(width, inner) for inner in expanded]
        last = nn.Linear(width, dimension, bias=bias)
        self.adaptor = nn.Sequential(*blocks, nn.LayerNorm(width), last)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.adaptor(nn.functional.normalize(states, dim=-1))

    @classmethod
    def from_weights(cls, weights: dict[str, torch.Tensor]) -> Adapter:
        """Its shape is that of the weights."""
        own = {k.removeprefix(ADAPTER): v for k, v in weights.items() if k.startswith(ADAPTER)}
        inner = {int(k.split(".")[0]): len(v) for k, v in own.items() if k.endswith(".fn.0.weight")}
        last = f"{len(inner) + 1}.weight"
        if last not in own:
            there = ", ".join(sorted({re.sub("[.].*", "", name) for name in weights}))
            raise ValueError(f"expected an adapter in {ADAPTER}*, got {there}")
        dimension, width = own[last].shape
        bias = f"{len(inner) + 1}.bias" in own
        made = cls(width, dimension, [inner[i] for i in sorted(inner)], bias)
        made.adaptor.load_state_dict(own)
        return made


class Block(nn.Module):
    """`x + W2 gelu(W1 norm(x))`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        # The third is the published model's dropout: it keeps the place in the weights' names.
        steps = nn.Linear(width, inner), nn.GELU(), nn.Identity(), nn.Linear(inner, width)
        self.fn = nn.Sequential(*steps)
        self.ln = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fn(self.ln(x))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("expected *.safetensors; convert the weights (no pickle is loaded)")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
    return found
