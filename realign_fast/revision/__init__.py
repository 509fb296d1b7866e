"""ReVision: a language model that sees, trained mostly on text (arXiv 2602.07026, section 5).

Stage 1, *modality substitution pretraining*: the aligned embedding of a caption stands in for its
image, the caption is the target, and only a projector is trained. Stage 2, *visual instruction
tuning*: the embeddings of real images with conversations, and the loss is on the answers. At
inference the embedding of an image is used unchanged. The package is a thin layer on the Trainer
of transformers; it works with any causal language model and any CLIP-like encoder.

    from realign_fast.revision import Collator, ReVisionModel, finetune, prepare, pretrain

transformers, accelerate and peft are installed with the extra `train` and imported on first use.
"""

from .evaluation import evaluate
from .generation import caption_rows
from .model import Projector, ReVisionConfig, ReVisionModel
from .stages import TrainingConfig, finetune, pretrain
from .templates import Chat, Plain
from .training_data import Collator, prepare

__all__ = ["Chat", "Collator", "Plain", "Projector", "ReVisionConfig", "ReVisionModel"]
__all__ += ["TrainingConfig", "caption_rows", "evaluate", "finetune", "prepare", "pretrain"]
