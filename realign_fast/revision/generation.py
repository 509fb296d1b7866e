"""Captions and answers: a trained model on rows, and on pictures through an encoder.

An encoder is anything with `embed_images(list of PIL images) -> rows [N, D]`, the one that the
model's rows came from. At inference the image embedding is used as it is (arXiv 2602.07026,
section 5): nothing is aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .conversation_files import MARK, Sample
from .dataset import Collator
from .model import ReVisionModel, transformers
from .projector import read_config
from .templates import Chat, Plain

ASK = "Describe the image."


class ImageEncoder(Protocol):
    """What turns pictures into rows."""

    def embed_images(self, images: list[Any]) -> Tensor:
        """`[N, D]` rows of N PIL images."""


def open_model(
    directory: str | Path,
    language_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> tuple[ReVisionModel, Plain | Chat]:
    """A saved model in eval mode, and the template it was last trained on."""
    config = read_config(Path(directory))
    model = ReVisionModel.from_pretrained(directory, language_model, dtype)
    tokenizer = transformers().AutoTokenizer.from_pretrained(directory)
    kind = {"plain": Plain, "chat": Chat}[config.template]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), kind(tokenizer, config.visual_tokens)


def respond(
    model: ReVisionModel,
    template: Plain | Chat,
    samples: Sequence[Sample],
    rows: Sequence[Tensor],
    **options: Any,
) -> list[str]:
    """A text for each sample: its caption (`Plain`), or its last answer anew (`Chat`).

    `rows` are the images of each sample, [images, D]; `options` go to `generate`, which is greedy
    unless they say otherwise.
    """
    tokenizer = template.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    items = [
        {"input_ids": (ids := template.question(sample)), "labels": ids, "image_rows": own}
        for sample, own in zip(samples, rows, strict=True)
    ]
    batch = Collator(pad, side="left")(items)
    del batch["labels"]
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": 64} | options
    options.setdefault("pad_token_id", pad)
    options.setdefault("eos_token_id", template.ends)
    new = model.generate(**batch, **options)
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def caption_rows(
    model: ReVisionModel,
    template: Plain | Chat,
    rows: Iterable[Tensor],
    ask: str = ASK,
    **options: Any,
) -> Iterator[str]:
    """A caption for every row of batches `[n, D]` (a `Corpus` gives them: `.batches()`)."""
    sample = Sample("", [""], None, [("user", f"{MARK}\n{ask}"), ("assistant", "")])
    for batch in rows:
        yield from respond(model, template, [sample] * len(batch), list(batch[:, None]), **options)


def caption_images(
    model: ReVisionModel,
    template: Plain | Chat,
    images: list[Any],
    encoder: ImageEncoder,
    ask: str = ASK,
    **options: Any,
) -> list[str]:
    """Captions of PIL images; the encoder must be the one that the model's rows came from."""
    rows = torch.as_tensor(encoder.embed_images(images))
    return list(caption_rows(model, template, [rows], ask, **options))
