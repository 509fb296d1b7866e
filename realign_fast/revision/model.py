"""A causal language model with a projector in front: embedding rows become visual tokens.

The projector (`projector.py`) makes K tokens of a row. The splice puts them into the input
embeddings of the language model wherever the input ids hold `IMAGE_TOKEN`.

A saved model is a directory with `revision.json`, `projector.safetensors` and what was trained of
the language model: `adapter/` (PEFT's format), `language_model/` (transformers' format), or
nothing. `revision.json` is written last and names the language model that training started from.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .._extras import import_extra
from ..storage.paths import write_json, write_whole
from .projector import CONFIG, IMAGE_TOKEN, WEIGHTS, Projector, ReVisionConfig, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TrainablePart = Literal["projector", "language_model", "lora"]
TRAINABLE_PARTS: tuple[TrainablePart, ...] = get_args(TrainablePart)
ADAPTER_FOLDER, LANGUAGE_MODEL_FOLDER = "adapter", "language_model"


def transformers() -> ModuleType:
    """Import transformers; the error says how to install it."""
    return import_extra("transformers", "train", "A ReVision model")


class ReVisionModel(nn.Module):
    """A `projector` and a `language_model`, which Trainer of transformers trains as it is."""

    language_model: PreTrainedModel  # or the PeftModel around it

    def __init__(self, config: ReVisionConfig, language_model: PreTrainedModel) -> None:
        """Put a new projector in front of a language model that embeds in `config.hidden_size`."""
        super().__init__()
        width = language_model.get_input_embeddings().embedding_dim
        if width != config.hidden_size:
            raise ValueError(
                f"ReVisionModel: the language model embeds in {width}, expected "
                f"{config.hidden_size}, the hidden_size of the config"
            )
        self.revision_config = config
        self.language_model = language_model
        self.projector = Projector(config)
        self.language_model_changed = False  # since the one that `config` names
        self._takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters

    @classmethod
    def start(
        cls,
        language_model: str | os.PathLike[str],
        row_dimension: int,
        *,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> ReVisionModel:
        """Put a new projector in front of a language model, a name on the hub or a directory.

        The settings are fields of `ReVisionConfig`; `dtype` is that of the language model.
        ValueError if the language model cannot be loaded, or a setting is wrong.
        """
        loaded = _load_language_model(language_model, dtype)
        path = Path(language_model)
        name = str(path.resolve()) if path.exists() else str(language_model)
        width = loaded.get_input_embeddings().embedding_dim
        return cls(ReVisionConfig(name, row_dimension, width, **settings), loaded)

    @property
    def base(self) -> PreTrainedModel:
        """The language model without PEFT around it."""
        return self.language_model.get_base_model() if self._has_adapter else self.language_model

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.language_model, "peft_config")

    @property
    def config(self) -> Any:
        """The language model's configuration, which Trainer and accelerate ask a model for."""
        return self.language_model.config

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def loss_type(self) -> str | None:
        """The loss of the language model, which Trainer asks a model for."""
        return getattr(self.base, "loss_type", None)

    @property
    def _no_split_modules(self) -> list[str]:  # what FSDP wraps, as accelerate asks for it
        return list(getattr(self.base, "_no_split_modules", None) or [])

    def splice(self, input_ids: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Return the input embeddings `[B, T, H]` of ids `[B, T]`, with visual tokens in place.

        `image_rows` `[M, D]` are the images of the batch in order of appearance. Without any, the
        projector still gets gradients (of zero), so that every process of a distributed training
        takes part in their exchange.
        ValueError if the ids hold another number of image tokens than the rows need.
        """
        is_image = input_ids == IMAGE_TOKEN
        if image_rows is None:
            image_rows = torch.zeros(0, self.revision_config.row_dimension, device=input_ids.device)
        visual = self.projector(image_rows.to(input_ids.device))
        present, needed = int(is_image.sum()), visual.shape[0] * visual.shape[1]
        if present != needed:
            raise ValueError(
                f"ReVisionModel: the input ids hold {present} image tokens, {len(image_rows)} "
                f"image rows need {needed}, {self.revision_config.visual_tokens} each; put "
                "<image> into the text once for every row"
            )
        embed = self.language_model.get_input_embeddings()
        text: Tensor = embed(input_ids.masked_fill(is_image, 0))
        return text.masked_scatter(is_image[..., None], visual.to(text.dtype))

    def forward(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding, which may be on either side
        labels: Tensor | None = None,  # [B, T], -100 where there is no loss
        image_rows: Tensor | None = None,  # [M, D], the images of the batch in order
        **options: Any,  # of the language model
    ) -> Any:
        """Return the output of the language model: `loss`, `logits` and so on."""
        embeddings = self.splice(input_ids, image_rows)
        if attention_mask is not None and self._takes_positions and "position_ids" not in options:
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **options
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # [B, T], padded on the left
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding
        image_rows: Tensor | None = None,  # [M, D], the images of the batch in order
        **options: Any,  # of the language model's `generate`
    ) -> Tensor:
        """Return the generated token ids `[B, new tokens]`; ValueError for padding on the right."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bool((mask[:, -1] == 0).any()):
            raise ValueError("ReVisionModel: generate needs padding on the left, got it right")
        tokens: Tensor = self.language_model.generate(
            inputs_embeds=self.splice(input_ids, image_rows), attention_mask=mask, **options
        )
        return tokens

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """Recompute the activations of the language model in the backward pass, to save memory.

        Trainer calls this, or `gradient_checkpointing_enable` in earlier versions of transformers,
        with the arguments that the method of the language model takes.
        """
        name = "activation_checkpointing_enable"
        if not hasattr(self.base, name):
            name = "gradient_checkpointing_enable"
        getattr(self.base, name)(*arguments, **options)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def train_only(self, parts: Iterable[str], **lora: Any) -> None:
        """Make these parts of the model trainable and freeze all others.

        `parts` are some of `TRAINABLE_PARTS`, not both "lora" and "language_model"; `lora` are
        fields of PEFT's LoraConfig for a new adapter. An adapter that the model already has is
        trained further as "lora", and is merged into the language model for "language_model".
        ValueError if there is no such choice of parts, or a field of LoraConfig is wrong.
        """
        chosen = set(parts)
        if not chosen or chosen - set(TRAINABLE_PARTS) or {"lora", "language_model"} <= chosen:
            raise ValueError(
                f"train: got {', '.join(sorted(chosen)) or 'nothing'}, expected some of "
                f"{', '.join(TRAINABLE_PARTS)}, one of the last two at most"
            )
        if "language_model" in chosen and self._has_adapter:
            self.language_model = self.language_model.merge_and_unload()
        self.requires_grad_(False)
        if "lora" in chosen:
            self._train_adapter(lora)
        self.projector.requires_grad_("projector" in chosen)
        if "language_model" in chosen:
            self.language_model.requires_grad_(True)
            self.language_model_changed = True

    def _train_adapter(self, settings: dict[str, Any]) -> None:
        if self._has_adapter:
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_("lora_" in name)
            return
        peft = _peft()
        defaults = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        settings = defaults | settings | {"task_type": "CAUSAL_LM"}
        config = build_dataclass(peft.LoraConfig, "field of LoraConfig", settings)
        self.language_model = peft.get_peft_model(self.language_model, config)

    def save_pretrained(
        self, directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the files that the module docstring lists.

        The language model is written only if it was trained. `state_dict` holds the weights of the
        whole model where those of the modules are sharded.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)  # an old one would vouch for half a new model
        state = self.state_dict() if state_dict is None else state_dict
        projector = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in _submodule_state(state, "projector.").items()
        }
        write_whole(directory / WEIGHTS, safetensors_bytes(projector, {"format": "pt"}))
        weights = _submodule_state(state, "language_model.")
        if self._has_adapter:
            self.language_model.save_pretrained(directory / ADAPTER_FOLDER, state_dict=weights)
            weights = {  # of the language model alone, some of whose layers PEFT has wrapped
                name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
                for name, tensor in weights.items()
                if "lora_" not in name
            }
        if self.language_model_changed:
            self.base.save_pretrained(directory / LANGUAGE_MODEL_FOLDER, state_dict=weights)
        write_json(directory / CONFIG, asdict(self.revision_config))

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        language_model: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ReVisionModel:
        """Load what `save_pretrained` wrote, frozen and in eval mode.

        `language_model` is where the language model is now, if it was moved; `dtype` is its dtype.
        FileNotFoundError if a file is missing, ValueError if one is damaged or does not fit.
        """
        directory = Path(directory)
        config = read_config(directory)
        trained = directory / LANGUAGE_MODEL_FOLDER
        source = language_model or (trained if trained.is_dir() else config.language_model)
        model = cls(config, _load_language_model(source, dtype))
        model.language_model_changed = trained.is_dir()
        model.load_trained(directory, language_model=False)
        model.requires_grad_(False)
        return model.eval()

    def load_trained(self, directory: str | os.PathLike[str], language_model: bool = True) -> None:
        """Load the weights of a saved model of the same shape into this one.

        With `language_model=False`, only the projector and an adapter are loaded.
        FileNotFoundError if a file is missing, ValueError if the projector has another shape.
        """
        directory = Path(directory)
        read_config(directory)
        try:
            self.projector.load_state_dict(load_file(directory / WEIGHTS))
        except RuntimeError as error:
            raise ValueError(
                f"{directory / WEIGHTS}: does not fit {self.revision_config}: {error}"
            ) from error
        if language_model and self.language_model_changed and not self._has_adapter:
            saved = _load_language_model(directory / LANGUAGE_MODEL_FOLDER, self.base.dtype)
            self.base.load_state_dict(saved.state_dict())
        adapter = directory / ADAPTER_FOLDER
        if adapter.is_dir() and self._has_adapter:
            weights = _peft().utils.load_peft_weights(str(adapter), device="cpu")
            _peft().set_peft_model_state_dict(self.language_model, weights)
        elif adapter.is_dir():
            load = _peft().PeftModel.from_pretrained
            self.language_model = load(self.language_model, str(adapter))


def load_config(language_model: str | os.PathLike[str]) -> Any:
    """Read the configuration of a language model; ValueError if it cannot be loaded."""
    return _load(transformers().AutoConfig, language_model)


def position_limit(config: Any) -> int | None:
    """Return the longest input of a language model, in tokens, or None if it has no limit.

    `config` is its configuration. Rotary positions that are scaled reach further than the
    positions that the model was first trained on.
    """
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    lengths = [getattr(config, name, None) for name in names]
    limit = next((length for length in lengths if isinstance(length, int) and length > 0), None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = rope.get("full_attention", rope)  # where the kinds of layers have their own
    if limit and isinstance(factor := rope.get("factor"), int | float):
        trained = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(factor * trained))
    return limit


def _load_language_model(source: str | os.PathLike[str], dtype: torch.dtype) -> PreTrainedModel:
    return _load(transformers().AutoModelForCausalLM, source, dtype=dtype)


def _load(auto: Any, source: str | os.PathLike[str], **options: Any) -> Any:
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]  # transformers may list every model it knows
        raise ValueError(
            f"{source}: cannot be loaded as a language model ({reason}); give the name or "
            "directory of a causal language model"
        ) from error


def build_dataclass(dataclass: type[Any], description: str, settings: dict[str, Any]) -> Any:
    """Return `dataclass(**settings)`.

    A setting whose default is a number or a truth value must be one too. `description` says in
    errors what a setting is, such as "setting of Trainer".

    Raises:
        ValueError: a setting is unknown or has a wrong value; the message names it, the expected
            value or the nearest names.
    """
    defaults = {field.name: field.default for field in fields(dataclass) if field.init}
    for name, value in settings.items():
        if name not in defaults:
            nearest = difflib.get_close_matches(name, defaults, 3)
            advice = ", ".join(nearest) or "see its documentation"
            raise ValueError(f"{name}: no {description}; nearest: {advice}")
        default = defaults[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name}: got {value!r}, expected true or false")
        elif isinstance(default, int | float) and not isinstance(value, int | float):
            raise ValueError(f"{name}: got {value!r}, expected a number")
    try:
        return dataclass(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description}: {' '.join(str(error).split())[:300]}") from error


def _peft() -> ModuleType:
    return import_extra("peft", "train", "A LoRA adapter")


def _submodule_state(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
