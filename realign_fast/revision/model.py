"""A causal language model with a projector in front: embedding rows become visual tokens.

A row `[D]` of a CLIP-like encoder stands for an image; the projector makes K visual tokens
`[K, H]` of it, in the space of the language model's input embeddings, where they are spliced in
wherever the input ids hold `IMAGE_TOKEN`. The paper (arXiv 2602.07026, section 5) feeds K = 576
identical copies of one projected row. Here a row is projected once and expanded, which gives the
same numbers for 1/K of the work, forward and backward: the gradient of an expansion is the sum
over the copies.

A model may have a `SharedSpace`: text rows go through its text side and image rows through its
image side before they are projected, in training and afterwards.

A saved model is a directory with `revision.json`, `projector.safetensors`, `space.safetensors` if
it has a space, and what was trained of the language model: `adapter/` (PEFT's format),
`language_model/` (transformers' format), or nothing. `revision.json` is written last, names the
language model that training started from and holds the digest of the space.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from .._extras import import_extra
from ..interface import option_values
from ..interface.option_values import VISUAL_TOKENS, ProjectorName
from ..shared_space import SharedSpace
from ..storage.paths import write_json
from ..storage.tensor_file import tensor_digest, tensors_of, write_with_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGE_TOKEN = -200  # stands for one visual token in input ids; no vocabulary has it
PROJECTORS: tuple[ProjectorName, ...] = get_args(ProjectorName)
TrainablePart = Literal["projector", "language_model", "lora"]
TRAINABLE_PARTS: tuple[TrainablePart, ...] = get_args(TrainablePart)
CONFIG, WEIGHTS, SPACE = "revision.json", "projector.safetensors", "space.safetensors"
ADAPTER_FOLDER, LANGUAGE_MODEL_FOLDER = "adapter", "language_model"
_LANGUAGE_MODEL = "AutoModelForCausalLM"
# Attributes that Trainer, accelerate and we ask a model for: those of its language model.
_OF_BASE = {"config", "device", "loss_type", "_no_split_modules"}
_OF_BASE |= {"activation_checkpointing_enable", "gradient_checkpointing_enable"}


def transformers() -> ModuleType:
    """Import transformers; the error says how to install it."""
    return import_extra("transformers", "train", "A ReVision model")


@dataclass
class ReVisionConfig:
    """Everything that is needed to build a model again; saved as `revision.json`."""

    language_model: str  # the name or path that training started from
    row_dimension: int  # D, the columns of an embedding row
    hidden_size: int  # H, the width of the language model's input embeddings
    projector: ProjectorName = "mlp"
    visual_tokens: int = VISUAL_TOKENS  # K, the tokens of one image
    normalize: bool = True  # rows are scaled to unit length first, as aligned rows are
    template: option_values.TemplateName = "plain"  # the template of the last training
    encoder: str | None = None  # of the rows that it was trained on, where they say it
    space: str | None = None  # `space_digest` of the space that rows go through

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            names = ", ".join(PROJECTORS)
            raise ValueError(f"ReVisionConfig: projector is {self.projector!r}, expected {names}")
        for name in ("row_dimension", "hidden_size", "visual_tokens"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"ReVisionConfig: {name} is {value!r}, expected a number from 1")


class Projector(nn.Module):
    """Maps embedding rows `[M, D]` to visual tokens `[M, K, H]`.

    `linear` is one layer, repeated K times. `mlp` is linear, GELU, linear, repeated K times, as in
    the paper. `prefix` is linear, GELU and a linear layer to K different tokens of one row.
    """

    def __init__(self, config: ReVisionConfig, space: SharedSpace | None = None) -> None:
        """Make a new projector; a ValueError if `space` is not the one that the config names."""
        super().__init__()
        if (digest := space_digest(space)) != config.space:
            raise ValueError(f"Projector: expected the space {config.space}, got {digest}")
        self.config, self.space = config, space
        d, h, k = config.row_dimension, config.hidden_size, config.visual_tokens
        self.layers: nn.Module = nn.Linear(d, h)
        if config.projector != "linear":
            outputs = k * h if config.projector == "prefix" else h
            self.layers = nn.Sequential(self.layers, nn.GELU(), nn.Linear(h, outputs))

    def forward(self, rows: Tensor, side: option_values.Modality = "image") -> Tensor:
        """Project rows `[M, D]` of any float dtype, of a `side` of the space, to `[M, K, H]`.

        Repeated tokens are an expanded view, which takes memory only where it is copied.
        ValueError if the rows are not `[M, D]`.
        """
        config = self.config
        if rows.dim() != 2 or rows.shape[1] != config.row_dimension:
            expected = f"expected [images, {config.row_dimension}]; embed with the model's encoder"
            raise ValueError(f"Projector: image rows have shape {list(rows.shape)}, {expected}")
        if self.space is not None:
            rows = self.space.documents(side, rows)
        rows = rows.to(next(self.parameters()).dtype)
        if config.normalize:
            rows = nn.functional.normalize(rows, dim=1)
        projected: Tensor = self.layers(rows)
        if config.projector == "prefix":
            return projected.view(len(rows), config.visual_tokens, config.hidden_size)
        return projected[:, None].expand(-1, config.visual_tokens, -1)


class ReVisionModel(nn.Module):
    """A `projector` and a `language_model`, which Trainer of transformers trains as it is."""

    language_model: PreTrainedModel  # or the PeftModel around it

    def __init__(
        self,
        config: ReVisionConfig,
        language_model: PreTrainedModel,
        space: SharedSpace | None = None,
    ) -> None:
        """Put a new projector in front of a language model that embeds in `config.hidden_size`."""
        super().__init__()
        width = language_model.get_input_embeddings().embedding_dim
        if width != config.hidden_size:
            expected = f"expected {config.hidden_size}, the hidden_size of the config"
            raise ValueError(f"ReVisionModel: the language model embeds in {width}, {expected}")
        self.revision_config = config
        self.language_model = language_model
        self.projector = Projector(config, space)
        self.language_model_changed = False  # since the one that `config` names
        self._takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters

    @classmethod
    def start(
        cls,
        language_model: str | os.PathLike[str],
        row_dimension: int,
        *,
        dtype: torch.dtype = torch.float32,
        space: SharedSpace | None = None,
        **settings: Any,
    ) -> ReVisionModel:
        """Put a new projector in front of a language model, a name on the hub or a directory.

        Visual tokens start near the mean of the word embeddings, since trainings that start near
        zero may get stuck (compare prompts: Lester et al., arXiv 2104.08691). Rows go through
        `space` first. The settings are fields of `ReVisionConfig`; `dtype` is that of the language
        model. ValueError if the language model cannot be loaded, or a setting is wrong.
        """
        loaded = load_pretrained(_LANGUAGE_MODEL, language_model, dtype=dtype)
        path = Path(language_model)
        name = str(path.resolve()) if path.exists() else str(language_model)
        width = loaded.get_input_embeddings().embedding_dim
        settings["space"] = space_digest(space)
        model = cls(ReVisionConfig(name, row_dimension, width, **settings), loaded, space)
        words = loaded.get_input_embeddings().weight.detach()
        *_, last = (layer for layer in model.projector.modules() if isinstance(layer, nn.Linear))
        if words.dim() == 2:  # with ZeRO-3, other processes hold a part
            mean = words.mean(0, dtype=torch.float32)
            last.bias.data.copy_(mean.repeat(last.out_features // width))
        return model

    @property
    def base(self) -> PreTrainedModel:
        """The language model without PEFT around it."""
        return self.language_model.get_base_model() if self._has_adapter else self.language_model

    @property
    def _has_adapter(self) -> bool:
        return hasattr(self.language_model, "peft_config")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name) if name in _OF_BASE else super().__getattr__(name)

    def splice(
        self, input_ids: Tensor, image_rows: Tensor | None = None, text_rows: Tensor | None = None
    ) -> Tensor:
        """Return the input embeddings `[B, T, H]` of ids `[B, T]`, with visual tokens in place.

        `image_rows` `[M, D]` are the images of the batch in order of appearance. `text_rows` in
        their place are captions that stand for images, and go through the text side of the space.
        Without rows, the projector still gets gradients (of zero), so that every process of a
        distributed training takes part in their exchange.
        ValueError if the ids hold another number of image tokens than the rows need.
        """
        is_image = input_ids == IMAGE_TOKEN
        rows = image_rows if text_rows is None else text_rows
        if rows is None:
            rows = torch.zeros(0, self.revision_config.row_dimension)
        visual = self.projector(rows.to(input_ids.device), "image" if text_rows is None else "text")
        present, needed = int(is_image.sum()), visual.shape[0] * visual.shape[1]
        if present != needed:
            raise ValueError(
                f"ReVisionModel: the input ids hold {present} image tokens, {len(rows)} "
                f"image rows need {needed}; put <image> into the text once for every row"
            )
        text = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        embeddings: Tensor = text.masked_scatter(is_image[..., None], visual.to(text.dtype))
        return embeddings

    def forward(
        self,
        input_ids: Tensor,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding, which may be on either side
        labels: Tensor | None = None,  # [B, T], -100 where there is no loss
        image_rows: Tensor | None = None,  # [M, D], the images of the batch in order
        text_rows: Tensor | None = None,  # [M, D] in their place
        **options: Any,  # of the language model
    ) -> Any:
        """Return the output of the language model: `loss`, `logits` and so on."""
        embeddings = self.splice(input_ids, image_rows, text_rows)
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
        text_rows: Tensor | None = None,  # [M, D] in their place
        **options: Any,  # of the language model's `generate`
    ) -> Tensor:
        """Return the generated token ids `[B, new tokens]`; ValueError for padding on the right."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError("ReVisionModel: generate needs padding on the left, got it right")
        embeddings = self.splice(input_ids, image_rows, text_rows)
        tokens: Tensor = self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask, **options
        )
        return tokens

    def train_only(self, parts: Iterable[str], **lora: Any) -> None:
        """Make these parts of the model trainable and freeze all others.

        `parts` are some of `TRAINABLE_PARTS`, not both "lora" and "language_model"; `lora` are
        fields of PEFT's LoraConfig for a new adapter. An adapter that the model already has is
        trained further as "lora", and is merged into the language model for "language_model".
        ValueError if there is no such choice of parts, or a field of LoraConfig is wrong.
        """
        chosen = set(parts)
        if not chosen or chosen - set(TRAINABLE_PARTS) or {"lora", "language_model"} <= chosen:
            actual, names = ", ".join(sorted(chosen)) or "nothing", ", ".join(TRAINABLE_PARTS)
            expected = f"expected some of {names}, one of the last two at most"
            raise ValueError(f"train: got {actual}, {expected}")
        if "language_model" in chosen and self._has_adapter:
            self.language_model = self.language_model.merge_and_unload()
        for name, parameter in self.named_parameters():
            part = "lora" if "lora_" in name else name.partition(".")[0]
            parameter.requires_grad_(part in chosen)
        if "lora" in chosen and not self._has_adapter:
            settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} | lora
            settings |= {"task_type": "CAUSAL_LM"}
            config = build_dataclass(_peft().LoraConfig, "field of LoraConfig", settings)
            self.language_model = _peft().get_peft_model(self.language_model, config)
        self.language_model_changed |= "language_model" in chosen

    def save_pretrained(
        self, directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the files that the module docstring lists.

        `state_dict` holds the weights of the whole model where those of the modules are sharded.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)  # an old one would vouch for half a new model
        parts: dict[str, dict[str, Tensor]] = {"projector": {}, "language_model": {}}
        for name, tensor in (self.state_dict() if state_dict is None else state_dict).items():
            part, _, own_name = name.partition(".")
            parts[part][own_name] = tensor
        weights = parts["language_model"]
        write_with_digest(directory / WEIGHTS, parts["projector"], {"format": "pt"})
        if self._has_adapter:
            self.language_model.save_pretrained(directory / ADAPTER_FOLDER, state_dict=weights)
            weights = {  # of the language model alone, some of whose layers PEFT has wrapped
                name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
                for name, tensor in weights.items()
                if "lora_" not in name
            }
        if self.language_model_changed:
            self.base.save_pretrained(directory / LANGUAGE_MODEL_FOLDER, state_dict=weights)
        if self.projector.space is not None:
            self.projector.space.save(directory / SPACE)
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
        space = SharedSpace.load(directory / SPACE) if config.space else None
        model = cls(config, load_pretrained(_LANGUAGE_MODEL, source, dtype=dtype), space)
        model.load_trained(directory)
        model.language_model_changed = trained.is_dir()
        return model.requires_grad_(False).eval()

    def load_trained(self, directory: str | os.PathLike[str]) -> None:
        """Load the weights of a saved model into this one; those of a language model if it changed.

        FileNotFoundError if a file is missing, ValueError for another shape or space.
        """
        directory = Path(directory)
        trained, own = read_config(directory), self.revision_config
        if trained.space != own.space:
            fault = f"was trained with the space {trained.space}, and this model has {own.space}"
            raise ValueError(f"{directory}: {fault}; give the same, or train in another directory")
        fitting = f"weights that fit {own}"
        with tensors_of(directory / WEIGHTS, fitting, "copy or train it again") as (weights, _):
            self.projector.load_state_dict(weights)
        if self.language_model_changed and not self._has_adapter:
            path, dtype = directory / LANGUAGE_MODEL_FOLDER, self.base.dtype
            saved = load_pretrained(_LANGUAGE_MODEL, path, dtype=dtype)
            self.base.load_state_dict(saved.state_dict())
        adapter = directory / ADAPTER_FOLDER
        if adapter.is_dir() and self._has_adapter:
            weights = _peft().utils.load_peft_weights(str(adapter), device="cpu")
            _peft().set_peft_model_state_dict(self.language_model, weights)
        elif adapter.is_dir():
            self.language_model = _peft().PeftModel.from_pretrained(self.language_model, adapter)


def space_digest(space: SharedSpace | None) -> str | None:
    """Return a digest of the maps of texts and images, None without a space; refuse blocks."""
    if space is None:
        return None
    if space.layout != "single":
        raise ValueError("a space of layout 'blocks' keeps texts and images apart; fit with single")
    maps = [(side, space.document_map(side)) for side in ("text", "image")]
    return tensor_digest(
        {f"{side} {own.scales[0]!r} {own.normalized}": own.centre for side, own in maps}
    )


def read_config(directory: Path) -> ReVisionConfig:
    """Read the configuration of the saved model in `directory`; refuse one that lacks a file."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; give one that pretrain wrote")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            hint = "pretrain and finetune write it"
            if (directory / "config.json").is_file():
                hint = "a plain language model: start with pretrain --language-model"
            raise FileNotFoundError(f"{directory}: lacks {name}, is no ReVision model; {hint}")
    try:
        values = dict(json.loads((directory / CONFIG).read_text()))
        known = {field.name for field in fields(ReVisionConfig)}
        config = ReVisionConfig(**{name: values[name] for name in values if name in known})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG}: not as ReVision writes it: {error}") from error
    if config.space and not (directory / SPACE).is_file():
        raise FileNotFoundError(f"{directory}: lacks {SPACE}, which its rows go through; copy it")
    return config


def position_limit(config: Any) -> int | None:
    """Return the longest input, in tokens, of the language model of a configuration, or None.

    Scaled rotary positions reach further than those that the model was first trained on.
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


def load_pretrained(auto: str, source: str | os.PathLike[str], **options: Any) -> Any:
    """Load a language model, or a part of it, with the class `auto` of transformers.

    FileNotFoundError if it is neither here nor on the hub, ValueError if it cannot be loaded.
    """
    options["trust_remote_code"] = False  # transformers asks on the terminal otherwise
    try:
        return getattr(transformers(), auto).from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]  # transformers may list every model it knows
        problem = f"{source}: cannot be loaded as a language model ({reason})"
        if isinstance(error, OSError) and not os.path.isdir(source):
            advice = "name a causal one of the hub or, without network, the directory of a copy"
            raise FileNotFoundError(f"{problem}; {advice} (docs/revision.md, On a CPU)") from error
        if auto == "AutoTokenizer" and (Path(source) / CONFIG).is_file():
            advice = "save that of the language model there too (tokenizer.save_pretrained)"
            raise FileNotFoundError(f"{source}: has no tokenizer; {advice}") from error
        raise ValueError(f"{problem}; name a causal one, or its directory") from error


def build_dataclass(dataclass: type[Any], description: str, settings: dict[str, Any]) -> Any:
    """Return `dataclass(**settings)`; refuse unknown names and other types than the defaults'."""
    defaults = {field.name: field.default for field in fields(dataclass) if field.init}
    for name, value in settings.items():
        if name not in defaults:
            nearest = ", ".join(difflib.get_close_matches(name, defaults, 3))
            raise ValueError(f"{name}: no {description}; nearest: {nearest or 'none'}")
        for types, expected in ((bool, "true or false"), (int | float, "a number")):
            if isinstance(defaults[name], types) and not isinstance(value, types):
                raise ValueError(f"{name}: got {value!r}, expected {expected}")
    try:
        return dataclass(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description}: {' '.join(str(error).split())[:300]}") from error


def _peft() -> ModuleType:
    return import_extra("peft", "train", "A LoRA adapter")
