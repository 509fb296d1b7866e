"""The other way round: a LLaVA-type model of transformers takes rows where it took pictures.

`attach(llava, config)` gives the model a projector of ours. Its `forward` then takes `image_rows`
[M, D] beside `input_ids`, and hands them on through transformers' own seam for ready-made features
(`mm_encoder_outputs`, LLaVA from transformers 5.18). The vision tower is never run. Input ids hold
the model's own image token K times for every row: a template made with `image_token=` (`Plain`,
`Chat`) does that.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .model import transformers
from .projector import Projector, ReVisionConfig

NAME = "realign_projector"  # of the submodule: its weights are saved with the model's


def attach(
    model: nn.Module, config: ReVisionConfig, projector: Projector | None = None
) -> nn.Module:
    """Give `model` a projector and the argument `image_rows`; returns the same model.

    For `generate` pass `**visual_inputs(model, image_rows)` instead. `save_pretrained` keeps the
    projector's weights, `from_pretrained` of transformers does not know them: `attach` first, then
    `load_state_dict`. ValueError where the model has no such seam, or embeds in another size.
    """
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        found = f"{type(model).__name__} of transformers {transformers().__version__}"
        want = "expected one whose forward takes mm_encoder_outputs (LLaVA from 5.18)"
        raise ValueError(f"attach: {found} has no seam for ready-made features; {want}")
    if hasattr(model, NAME):
        raise ValueError("attach: the model has a projector already; attach only once")
    width = model.get_input_embeddings().embedding_dim
    if width != config.hidden_size:
        got = f"the model embeds in {width}, the config says {config.hidden_size}"
        raise ValueError(f"attach: {got}; set hidden_size to the model's")
    model.add_module(NAME, projector or Projector(config))
    model.register_forward_pre_hook(_replace_rows, with_kwargs=True)
    return model


def visual_inputs(model: nn.Module, image_rows: Tensor) -> dict[str, Any]:
    """Keyword arguments for `model(...)` and `model.generate(...)` that stand for rows [M, D]."""
    tokens = getattr(model, NAME)(image_rows)  # [M, K, H]
    output = transformers().modeling_outputs.BaseModelOutputWithPooling
    return {"mm_encoder_outputs": {"image": output(pooler_output=list(tokens))}}


def _replace_rows(model: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
    rows = options.pop("image_rows", None)
    if rows is None:
        return arguments, options
    if len(rows):
        return arguments, options | visual_inputs(model, rows)
    return arguments, options
