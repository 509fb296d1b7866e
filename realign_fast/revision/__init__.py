"""ReVision: a language model that sees, trained on text first (arXiv 2602.07026, section 5).

Stage 1, *modality substitution pretraining*: the aligned embedding of a caption stands for the
image and the caption is the target; only a projector trains. Stage 2, *visual instruction tuning*:
real image embeddings, conversations, loss on the answers. At inference the image embedding is used
as it is. A thin layer on the Trainer of transformers: what Trainer, accelerate and PEFT do is not
done again. Any causal language model, the rows of any CLIP-like encoder.

    from realign_fast.revision import ReVisionModel, prepare, Collator, finetune, pretrain

`projector.py` rows to tokens; `model.py` the splice; `llava.py` the same rows for LLaVA-type
models; `lists.py` the files of conversations; `ids.py` which row an id has; `templates.py`
conversations as tokens and labels; `join.py` lists and rows joined by id; `data.py` batches of
them; `train.py` both stages; `scores.py` and `evaluation.py` figures with intervals; `respond.py`
captions and answers; `commands.py` the commands.
transformers, accelerate and peft come with the extra `train` and load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Projector": "projector",
    "ReVisionConfig": "projector",
    "ReVisionModel": "model",
    "attach": "llava",
    "Chat": "templates",
    "Plain": "templates",
    "Collator": "dataset",
    "prepare": "preparation",
    "pretrain": "train",
    "finetune": "train",
    "evaluate": "evaluation",
    "caption_rows": "generation",
    "caption_images": "generation",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Names load their module when they are first used."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
