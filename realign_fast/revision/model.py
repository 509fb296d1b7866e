"""A causal language model with a projector in front: rows of images become visual tokens.

The projector (`projector.py`) makes K tokens of one row; the splice puts them into the language
model's input embeddings wherever the input ids hold `IMAGE_TOKEN`.

A saved model is a directory: `revision.json`, `projector.safetensors`, and of the language model
what was trained: `adapter/` (PEFT's format), `language_model/` (transformers' format), or nothing.
`revision.json` is written last and names the language model that training started from.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .._extras import import_extra
from ..storage.paths import write_whole
from .overrides import made
from .projector import CONFIG, IMAGE_TOKEN, WEIGHTS, Projector, ReVisionConfig, read_config

PARTS = ("projector", "language_model", "lora")
ADAPTER, WHOLE = "adapter", "language_model"


def transformers() -> ModuleType:
    """Import transformers; the error says how to install it."""
    return import_extra("transformers", "train", "A ReVision model")


class ReVisionModel(nn.Module):
    """`projector` and `language_model`; trains under transformers' Trainer as it is."""

    def __init__(self, config: ReVisionConfig, language_model: nn.Module) -> None:
        super().__init__()
        width = language_model.get_input_embeddings().embedding_dim
        if width != config.hidden_size:
            want = f"expected {config.hidden_size}, the hidden_size of the config"
            raise ValueError(f"ReVisionModel: the language model embeds in {width}, {want}")
        self.revision_config = config
        self.language_model = language_model
        self.projector = Projector(config)
        self.whole = False  # whether the language model differs from the one it started from
        self._positions = "position_ids" in inspect.signature(self.base.forward).parameters

    @classmethod
    def start(
        cls, language_model: str | os.PathLike[str], row_dimension: int, **options: Any
    ) -> ReVisionModel:
        """A fresh projector before a language model of the hub or a directory.

        `options`: fields of `ReVisionConfig`, and `dtype` of the language model (float32).
        """
        loaded = _load_language_model(language_model, options.pop("dtype", torch.float32))
        path = Path(language_model)
        name = str(path.resolve()) if path.exists() else str(language_model)
        width = loaded.get_input_embeddings().embedding_dim
        return cls(ReVisionConfig(name, row_dimension, width, **options), loaded)

    @property
    def base(self) -> nn.Module:
        """The language model without PEFT around it."""
        peft = hasattr(self.language_model, "peft_config")
        return self.language_model.get_base_model() if peft else self.language_model

    @property
    def config(self) -> Any:
        """The language model's: what Trainer, accelerate and loggers ask a model for."""
        return self.language_model.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def loss_type(self) -> str | None:
        return getattr(self.base, "loss_type", None)

    @property
    def _no_split_modules(self) -> list[str]:  # what FSDP wraps, as accelerate asks for it
        return list(getattr(self.base, "_no_split_modules", None) or [])

    def splice(self, input_ids: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Input embeddings `[B, T, H]` of ids `[B, T]`, visual tokens at every `IMAGE_TOKEN`.

        `image_rows` [M, D] are the images of the batch in order of appearance; with none of them
        the projector still gets (zero) gradients, so that every rank of a parallel run takes part.
        """
        places = input_ids == IMAGE_TOKEN
        if image_rows is None:
            image_rows = torch.zeros(0, self.revision_config.row_dimension, device=input_ids.device)
        visual = self.projector(image_rows.to(input_ids.device))
        found, expected = int(places.sum()), visual.shape[0] * visual.shape[1]
        if found != expected:
            k = self.revision_config.visual_tokens
            got = f"the input ids hold {found} image tokens, {len(image_rows)} image rows need"
            advice = f"{k} each; put <image> into the text once for every row"
            raise ValueError(f"ReVisionModel: {got} {expected}, {advice}")
        text = self.language_model.get_input_embeddings()(input_ids.masked_fill(places, 0))
        return text.masked_scatter(places[..., None], visual.to(text.dtype))

    def forward(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, T], 0 where padded, on either side
        labels: Tensor | None = None,  # [B, T], -100 where there is no loss
        image_rows: Tensor | None = None,  # [M, D]
        **options: Any,
    ) -> Any:
        """The language model's own output: `loss`, `logits`, ..."""
        embeddings = self.splice(input_ids, image_rows)
        if attention_mask is not None and self._positions and "position_ids" not in options:
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **options
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # [B, T], padded on the left
        attention_mask: Tensor | None = None,
        image_rows: Tensor | None = None,  # [M, D]
        **options: Any,
    ) -> Tensor:
        """New token ids `[B, new]`; `options` are those of the language model's `generate`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bool((mask[:, -1] == 0).any()):
            raise ValueError("ReVisionModel: generate needs padding on the left, got it right")
        embeddings = self.splice(input_ids, image_rows)
        return self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask, **options
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """Trade time for memory in the language model; Trainer calls this when asked to."""
        kwargs = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if hasattr(self.base, "activation_checkpointing_enable"):
            self.base.activation_checkpointing_enable(kwargs, **how)
        else:
            self.base.gradient_checkpointing_enable(kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """The name that Trainer used before."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def train_only(self, parts: Iterable[str], **lora: Any) -> None:
        """Let these of `PARTS` train and nothing else; `lora` are fields of PEFT's LoraConfig.

        An adapter that is there already goes on training under "lora", and is merged into the
        language model under "language_model".
        """
        parts = list(parts)
        if not parts or set(parts) - set(PARTS) or {"lora", "language_model"} <= set(parts):
            want = f"expected some of {', '.join(PARTS)}, one of the last two at most"
            raise ValueError(f"train: got {', '.join(parts) or 'nothing'}, {want}")
        adapted = hasattr(self.language_model, "peft_config")
        if "language_model" in parts and adapted:
            self.language_model = self.language_model.merge_and_unload()
        self.requires_grad_(False)
        if "lora" in parts:
            self._train_lora(adapted, lora)
        self.projector.requires_grad_("projector" in parts)
        if "language_model" in parts:
            self.language_model.requires_grad_(True)
            self.whole = True

    def _train_lora(self, adapted: bool, options: dict[str, Any]) -> None:
        if adapted:
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_("lora_" in name)
            return
        peft = _peft()
        options = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} | options
        adapter = made(peft.LoraConfig, "field of LoraConfig", options, task_type="CAUSAL_LM")
        self.language_model = peft.get_peft_model(self.language_model, adapter)

    def save_pretrained(
        self, directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the directory of the module docstring; `state_dict` where the weights are sharded.

        The language model is written only if it was trained.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)  # no half of a new one beside an old config
        weights = self.projector.state_dict() if state_dict is None else _part(state_dict, PARTS[0])
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_whole(directory / WEIGHTS, safetensors_bytes(weights, {"format": "pt"}))
        given = {} if state_dict is None else {"state_dict": _part(state_dict, WHOLE)}
        if hasattr(self.language_model, "peft_config"):
            self.language_model.save_pretrained(directory / ADAPTER, **given)
        if self.whole:
            weights = given.get("state_dict") or self.language_model.state_dict()
            weights = dict(_without_adapter(weights))
            self.base.save_pretrained(directory / WHOLE, state_dict=weights)
        text = json.dumps(asdict(self.revision_config), indent=2) + "\n"
        write_whole(directory / CONFIG, text.encode())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        language_model: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ReVisionModel:
        """What `save_pretrained` wrote, frozen and in eval mode.

        `language_model` is where the language model lies now, if it moved; `dtype` is its dtype.
        """
        directory = Path(directory)
        config = read_config(directory)
        own = directory / WHOLE
        where = language_model or (own if own.is_dir() else config.language_model)
        self = cls(config, _load_language_model(where, dtype))
        self.whole = own.is_dir()
        self.load_trained(directory, whole=False)
        self.requires_grad_(False)
        return self.eval()

    def load_trained(self, directory: str | os.PathLike[str], whole: bool = True) -> None:
        """Take over the weights of a saved model of this shape; `whole`: language model too."""
        directory = Path(directory)
        read_config(directory)
        try:
            self.projector.load_state_dict(load_file(directory / WEIGHTS))
        except RuntimeError as error:
            what = f"{directory / WEIGHTS}: does not fit {self.revision_config}"
            raise ValueError(f"{what}: {error}") from error
        if whole and self.whole and not hasattr(self.language_model, "peft_config"):
            saved = _load_language_model(directory / WHOLE, self.base.dtype)
            self.base.load_state_dict(saved.state_dict())
        if (adapter := directory / ADAPTER).is_dir():
            if hasattr(self.language_model, "peft_config"):
                weights = _peft().utils.load_peft_weights(str(adapter), device="cpu")
                _peft().set_peft_model_state_dict(self.language_model, weights)
            else:
                self.language_model = _peft().PeftModel.from_pretrained(
                    self.language_model, str(adapter)
                )


def _load_language_model(where: str | os.PathLike[str], dtype: torch.dtype) -> nn.Module:
    auto = transformers().AutoModelForCausalLM
    try:
        return auto.from_pretrained(where, dtype=dtype)
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]  # transformers may list every model it knows
        advice = "give the name or directory of a causal language model"
        raise ValueError(
            f"{where}: cannot be loaded as a language model ({what}); {advice}"
        ) from error


def _peft() -> ModuleType:
    return import_extra("peft", "train", "A LoRA adapter")


def _without_adapter(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The language model's own weights, where PEFT has wrapped some of its layers."""
    for name, tensor in weights.items():
        if "lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def _part(state_dict: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of a submodule, under its own names."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in state_dict.items()
        if key.startswith(f"{name}.")
    }
