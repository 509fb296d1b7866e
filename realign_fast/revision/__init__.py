"""ReVision: a language model that sees, trained mostly on text (arXiv 2602.07026, section 5).

Stage 1, *modality substitution pretraining*: the aligned embedding of a caption stands in for its
image, the caption is the target, and only a projector is trained. Stage 2, *visual instruction
tuning*: the embeddings of real images with conversations, and the loss is on the answers. At
inference the embedding of an image is used unchanged. The package is a thin layer on the Trainer
of transformers; it works with any causal language model and any CLIP-like encoder.

    from realign_fast.revision import Collator, ReVisionModel, finetune, prepare, pretrain

- `projector.py` turns embedding rows into visual tokens, `model.py` puts them into the input of a
  language model, and `llava.py` does the same for LLaVA-type models of transformers.
- `conversation_files.py` reads lists of conversations, `id_index.py` finds the row that an id has,
  and `preparation.py` joins the two by id.
- `templates.py` encodes conversations as tokens and labels, and `dataset.py` makes batches.
- `training_config.py` holds the settings of a training, and `train.py` runs both stages with
  `trainer.py`; `permutation_sampler.py` shuffles the samples.
- `generation.py` writes captions and answers; `evaluation.py` and `text_scores.py` measure them.

transformers, accelerate and peft are installed with the extra `train` and imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which do not run __getattr__
    from .dataset import Collator as Collator
    from .evaluation import evaluate as evaluate
    from .generation import caption_rows as caption_rows
    from .llava import attach as attach
    from .model import ReVisionModel as ReVisionModel
    from .preparation import prepare as prepare
    from .projector import Projector as Projector
    from .projector import ReVisionConfig as ReVisionConfig
    from .templates import Chat as Chat
    from .templates import Plain as Plain
    from .train import finetune as finetune
    from .train import pretrain as pretrain
    from .training_config import TrainingConfig as TrainingConfig

_MODULES = {
    "Chat": "templates",
    "Collator": "dataset",
    "Plain": "templates",
    "Projector": "projector",
    "ReVisionConfig": "projector",
    "ReVisionModel": "model",
    "TrainingConfig": "training_config",
    "attach": "llava",
    "caption_rows": "generation",
    "evaluate": "evaluation",
    "finetune": "train",
    "prepare": "preparation",
    "pretrain": "train",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Load the module of a public name when the name is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
