"""Captions and answers of a trained model, generated from embedding rows.

At inference the embedding of an image is used unchanged (arXiv 2602.07026, section 5): nothing is
aligned. A model with a space maps it by the image side. Rows come from a corpus, or from pictures
through the encoder that the model was trained on, `encoder.embed_images(images)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..interface.devices import check_device
from ..interface.option_values import DEFAULT_QUESTION, Modality
from .conversation_files import IMAGE_MARK, Sample
from .model import ReVisionModel, load_pretrained, position_limit
from .templates import TEMPLATES, Template
from .training_data import Collator


def open_model(
    directory: str | Path,
    language_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> tuple[ReVisionModel, Template]:
    """Load a saved model as `from_pretrained` does, and the template of its last training."""
    on_device = check_device(device)  # before a model is loaded
    model = ReVisionModel.from_pretrained(directory, language_model, dtype).to(on_device)
    config = model.revision_config
    tokenizer = load_pretrained("AutoTokenizer", directory)
    template = TEMPLATES[config.template](tokenizer, config.visual_tokens)
    template.positions = position_limit(model.config)
    return model, template


def respond(
    model: ReVisionModel,
    template: Template,
    samples: Sequence[Sample],
    rows: Sequence[Tensor],
    *,
    side: Modality = "image",
    max_new_tokens: int = 64,
    **generation: Any,
) -> list[str]:
    """Generate a text for each sample: its caption (`Plain`) or its last answer (`Chat`).

    `rows` are the images of each sample, `[images, D]`, or texts in their place if that is the
    `side`; `generation` are options of transformers' `generate`, which is greedy by default. A text
    ends where the model's positions do; ValueError if they leave no place for one.
    """
    pad = template.pad_id
    items = [
        {"input_ids": template.prompt(sample), "labels": [], f"{side}_rows": images}
        for sample, images in zip(samples, rows, strict=True)
    ]
    batch = Collator(pad, side="left")(items)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    if template.positions:
        prompt = batch["input_ids"].shape[1]
        max_new_tokens = min(max_new_tokens, template.positions - prompt)
        if max_new_tokens < 1:
            limit = f"the language model takes {template.positions} with the answer"
            advice = "ask less, or train with fewer visual tokens"
            raise ValueError(f"a question takes {prompt} tokens, and {limit}; {advice}")
    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": pad}
    options |= {"eos_token_id": template.end_ids, "max_new_tokens": max_new_tokens, **generation}
    tokens = model.generate(**batch, **options)
    texts = template.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def caption_rows(
    model: ReVisionModel,
    template: Template,
    rows: Iterable[Tensor],
    ask: str = DEFAULT_QUESTION,
    *,
    side: Modality = "image",
    max_new_tokens: int = 64,
    **generation: Any,
) -> Iterator[str]:
    """Yield a caption for every row of batches `[n, D]`, which `Corpus.batches()` yields.

    `ask` is the question to a model that was trained on conversations; `side` is that of the rows,
    which matters to a model with a space; `generation` are options of transformers' `generate`.
    """
    generation |= {"max_new_tokens": max_new_tokens, "side": side}
    sample = Sample("", [""], None, [("user", f"{IMAGE_MARK}\n{ask}"), ("assistant", "")])
    for batch in rows:
        samples, images = [sample] * len(batch), list(batch[:, None])
        yield from respond(model, template, samples, images, **generation)
