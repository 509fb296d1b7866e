"""LLM2CLIP, the paper's encoder: a CLIP vision tower, and a language model under an adapter.

It is published as two directories: the vision tower with the adapter (`LLM2CLIP-Openai-...`), and
the language model with bidirectional attention (`LLM2CLIP-Llama-3-...-CC-Finetuned`). The code in
those directories is not run; this file computes the same:

1. A text in the chat format of Llama 3 goes through the language model without a causal mask.
2. The last hidden states are averaged over the text's own tokens and its end mark, `[4096]`.
3. The adapter: unit length, residual blocks `x + W2 gelu(W1 norm(x))`, layer norm, linear `[1280]`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from ...interface.option_values import Precision
from .base import StrPath, Tokens, file_digests, weights_hash
from .hugging_face import LOCAL, TransformersEncoder, quietly_loading, transformers

CONTEXT = 512  # tokens, as in the paper's code
HEAD, END = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
ADAPTER = "text_adapter.adaptor."


class Llm2ClipEncoder(TransformersEncoder):
    """LLM2CLIP from `folder`, with its language model from `text_model` or `folder/text_model`.

    Without a language model it embeds images alone. For `device` and `precision` see
    :class:`Encoder`.
    ValueError, OSError or ImportError if a directory cannot be loaded.
    """

    _language: Any = None

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
        text_folder = Path(text_model or self._folder / "text_model")
        with quietly_loading(folder):
            config = library.CLIPConfig.from_pretrained(folder)
            vision = config.vision_config
            vision.projection_dim = config.projection_dim
            kind = "CLIPVisionModelWithProjection"
            tower = self._load(kind, folder, config=vision, use_safetensors=True)
            self._adapter = {
                name.removeprefix(ADAPTER): value.to(self.device, self.dtype)
                for path in self._folder.glob("*.safetensors")
                for name, value in load_file(path).items()
                if name.startswith(ADAPTER)
            }
            if not self._adapter:
                raise ValueError(f"expected an adapter in {ADAPTER}*")
            self._last = max(int(name.partition(".")[0]) for name in self._adapter)
            side = vision.image_size
            self._processor = library.CLIPImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            )
            if (self._folder / "preprocessor_config.json").is_file():  # not where it is published
                self._processor = library.AutoImageProcessor.from_pretrained(folder, **LOCAL)
            self._take(tower)
        named = {f"tower.{name}": weight for name, weight in tower.state_dict().items()}
        named |= {f"adapter.adaptor.{name}": weight for name, weight in self._adapter.items()}
        self._weights_hash = weights_hash(named)
        self.settings = {"library": f"transformers {library.__version__}", "context": CONTEXT}
        self.settings["files"] = file_digests(self._folder)
        if text_folder.is_dir():
            with quietly_loading(text_folder):
                self._load_language(text_folder)
        elif text_model is not None:
            raise ValueError(f"{text_model}: is no directory; name that of the language model")

    def _load_language(self, folder: Path) -> None:
        model = self._load("AutoModel", folder, attn_implementation="sdpa")
        self._tokenizer = transformers().AutoTokenizer.from_pretrained(folder, **LOCAL)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        vocabulary = self._tokenizer.get_vocab()
        chat = all(mark in vocabulary for mark in ("<|start_header_id|>", END))
        self._head, self._end = (HEAD, END) if chat else ("", "")
        width = model.config.hidden_size
        if width != (expected := self._adapter[f"{self._last - 1}.weight"].numel()):
            sizes = f"its hidden size is {width}, the adapter of {self._folder} takes {expected}"
            raise ValueError(f"{sizes}; name the language model that belongs to it")
        self._language = model.eval().requires_grad_(False).to(self.device)
        self.settings["language_model"] = weights_hash(model.state_dict())
        self.settings["language"] = file_digests(folder)

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
        return self.model(pixel_values=pixels).image_embeds

    def _text_features(self, tokens: Tokens) -> Any:
        mask, length = tokens["attention_mask"], tokens["input_ids"].shape[1]
        bidirectional = mask[:, None, None, :].expand(-1, 1, length, -1)  # [n, 1, L, L]
        states = self._language(
            input_ids=tokens["input_ids"], attention_mask=bidirectional, use_cache=False
        ).last_hidden_state
        own = tokens["own"].unsqueeze(-1)
        mean = states.float().mul(own).sum(1) / own.sum(1)  # [n, width]
        return self._adapted(mean.to(self.dtype))

    def _adapted(self, states: torch.Tensor) -> torch.Tensor:
        """Return features `[n, D]` of the language model's mean states `[n, width]`."""
        weights = self._adapter

        def _norm(x: torch.Tensor, name: str) -> torch.Tensor:
            scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return functional.layer_norm(x, x.shape[-1:], scale, shift)

        def _linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        x = functional.normalize(states, dim=-1)
        for block in range(self._last - 1):
            inner = functional.gelu(_linear(_norm(x, f"{block}.ln"), f"{block}.fn.0"))
            x = x + _linear(inner, f"{block}.fn.3")
        return _linear(_norm(x, f"{self._last - 1}"), f"{self._last}")
