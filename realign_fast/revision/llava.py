"""Embedding rows in place of pictures for a model of transformers, and weights of LLaVA.

`attach(model, config)` gives a causal language model, or a LLaVA-type model, a projector. Its
`forward` then takes `image_rows` `[M, D]` with the `input_ids`, so that codes which train a model
of transformers alone, such as TRL, train the projector.

- In a language model the visual tokens replace `IMAGE_TOKEN` in the input embeddings.
- A LLaVA gets them as ready-made features, for which transformers has the argument
  `mm_encoder_outputs` (LLaVA from transformers 5.18); the vision tower is never run. Input ids hold
  the model's own image token K times for every row: make them with a template that has the same
  `image_token=` (`Plain`, `Chat`).

`save_mm_projector` and `load_mm_projector` exchange the weights of a projector with LLaVA's own
training code.
"""

from __future__ import annotations

import errno
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..storage.atomic import replaced
from .model import ATTACHED, Projector, ReVisionConfig, splice, transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEATURES = "mm_encoder_outputs"
Options = dict[str, Any]  # the keyword arguments of a call
Call = tuple[tuple[Any, ...], Options]
_LLAVA_NAME = "mm_projector."  # before the name of a weight, after a prefix that varies


def attach(
    model: PreTrainedModel, config: ReVisionConfig, projector: Projector | None = None
) -> PreTrainedModel:
    """Give `model` a projector and the argument `image_rows`; return the same model.

    Without `projector`, a new one is made. That of a `ReVisionModel` is shared with it, and trains
    in both. To generate with a LLaVA, pass `**visual_inputs(model, image_rows)` instead of
    `image_rows`. `save_pretrained` of the model writes the weights of the projector, but
    `from_pretrained` does not know them: attach first, then use `load_state_dict`.
    ValueError if the model takes neither input embeddings
    nor ready-made features, has a projector already, or embeds in another size than
    `config.hidden_size`.
    """
    arguments = inspect.signature(model.forward).parameters
    if FEATURES in arguments:
        replace_rows = _pass_features
    elif "inputs_embeds" in arguments and "pixel_values" not in arguments:
        replace_rows = _pass_embeddings
    else:
        raise ValueError(
            f"attach: {type(model).__name__} of transformers {transformers().__version__} has no "
            "seam for ready-made features; expected a causal language model, or one whose forward "
            "takes mm_encoder_outputs (LLaVA from 5.18)"
        )
    if hasattr(model, ATTACHED):
        raise ValueError("attach: the model has a projector already; attach only once")
    width = model.get_input_embeddings().embedding_dim
    if width != config.hidden_size:
        raise ValueError(
            f"attach: the model embeds in {width}, the config says {config.hidden_size}; set "
            "hidden_size to the model's"
        )
    model.add_module(ATTACHED, projector or Projector(config))
    model.register_forward_pre_hook(replace_rows, with_kwargs=True)
    return model


def save_mm_projector(projector: Projector, path: str | os.PathLike[str]) -> None:
    """Write the weights of a projector as LLaVA's `mm_projector.bin`, a state dict of torch.

    LLaVA does not scale rows to unit length: give it unit rows, as aligned ones are.
    ValueError for the projector `prefix`, which LLaVA does not have.
    """
    if projector.space is not None:
        reason = "LLaVA would project rows that did not go through its space"
        raise ValueError(f"save_mm_projector: {reason}; train without one")
    if projector.config.projector == "prefix":
        raise ValueError("save_mm_projector: got a projector prefix, expected linear or mlp")
    weights = {
        f"model.{_LLAVA_NAME}{name.removeprefix('layers.')}": weight.cpu()
        for name, weight in projector.state_dict().items()
    }
    with replaced(Path(path)) as partial:
        torch.save(weights, partial)


def load_mm_projector(projector: Projector, path: str | os.PathLike[str]) -> None:
    """Load LLaVA's `mm_projector.bin` of any float dtype into a projector of the same shape.

    No code in the file is run. ValueError if it is no state dict with tensors of this shape, a
    `linear` projector (one layer) or an `mlp` (LLaVA's mlp2x_gelu).
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        names = {name: name.rpartition(_LLAVA_NAME)[2] for name in weights if _LLAVA_NAME in name}
        projector.load_state_dict({f"layers.{own}": weights[name] for name, own in names.items()})
    except Exception as error:  # torch's unpickler raises whatever a damaged file provokes
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a seek in such a file
            raise
        expected = f"expected the mm_projector of LLaVA for {projector.config}"
        raise ValueError(f"{path}: {expected}: {' '.join(str(error).split())[:300]}") from error


def visual_inputs(model: nn.Module, image_rows: Tensor) -> dict[str, Any]:
    """Return keyword arguments for `model(...)` or `model.generate(...)` that stand for rows.

    `image_rows` is `[M, D]`, the images of the batch in order.
    """
    tokens = getattr(model, ATTACHED)(image_rows)  # [M, K, H]
    output = transformers().modeling_outputs.BaseModelOutputWithPooling
    return {FEATURES: {"image": output(pooler_output=list(tokens))}}


def _pass_features(model: nn.Module, arguments: tuple[Any, ...], options: Options) -> Call:
    """Replace `image_rows` in a call of a LLaVA by the visual tokens of the rows."""
    rows = options.pop("image_rows", None)
    if rows is not None and len(rows):
        options = options | visual_inputs(model, rows)
    return arguments, options


def _pass_embeddings(model: nn.Module, arguments: tuple[Any, ...], options: Options) -> Call:
    """Replace ids and `image_rows` in a call of a language model by their input embeddings."""
    if (rows := options.pop("image_rows", None)) is not None:
        ids = options.pop("input_ids")
        options["inputs_embeds"] = splice(getattr(model, ATTACHED), model, ids, rows)
    return arguments, options
