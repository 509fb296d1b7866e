"""How well a trained model says what is in an image, on held-out pairs of rows and texts.

Loss of the right text a token; choice of the right text among N by likelihood; generated texts
against the right ones by exact match and CIDEr-D. Each with a 95% interval over the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..align import ReAlign
from .data import Collator, Conversations
from .lists import Sample
from .model import ReVisionModel
from .respond import respond
from .scores import cider, exact_match, interval
from .templates import IGNORED, Chat, Plain


def evaluate(
    model: ReVisionModel,
    data: Conversations,
    *,
    aligner: ReAlign | None = None,
    choices: int = 4,
    limit: int | None = None,
    batch: int = 8,
    generate: bool = True,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of a model in eval mode on prepared samples (`join.prepare`).

    Args:
        aligner: moves the rows first, where they are raw text rows.
        choices: N of the choice; texts of other samples, drawn by `seed`, are the wrong ones.
            Likelihoods are means over a text's tokens, or short texts would win. 0: left out.
        limit: samples, spread over the list; None: all.
        batch: sequences at a time.

    Returns:
        `loss` (of a token of the last answer), `choice`, `exact_match` and `cider`, each with
        `value`, `low` and `high` (95%, bootstrap over samples), and what they were measured on.
    """
    count = len(data) if limit is None else min(limit, len(data))
    numbers = [place * len(data) // count for place in range(count)]
    template, samples = data.template, [data.sample(number) for number in numbers]
    rows = [own.float() for own in _rows(data, numbers)]
    if aligner is not None:
        rows = [aligner(own) if len(own) else own for own in rows]
    truth = [template.expected(one) for one in samples]
    sums, tokens = _likelihoods(model, template, zip(samples, truth, rows, strict=True), batch)
    found: dict[str, Any] = {"samples": count, "tokens": int(tokens.sum())}
    found["loss"] = interval(-sums / tokens, tokens)
    if choices:
        found["choice"] = _choice(
            model, template, samples, truth, rows, (sums, tokens), choices, batch, seed
        )
    if generate:
        texts = []
        for begin in range(0, count, batch):
            part = slice(begin, begin + batch)
            texts += respond(
                model, template, samples[part], rows[part], max_new_tokens=max_new_tokens
            )
        references = [[one] for one in truth]
        found["exact_match"] = interval(exact_match(texts, references))
        found["cider"] = interval(cider(texts, references))
        found["examples"] = [
            {"id": one.name, "expected": right, "generated": text}
            for one, right, text in list(zip(samples, truth, texts, strict=True))[:5]
        ]
    return found


def _rows(data: Conversations, numbers: Sequence[int]) -> Sequence[torch.Tensor]:
    places = [data.row_numbers(number) for number in numbers]
    return data.rows.take(np.concatenate(places)).split([len(one) for one in places])


def _choice(
    model: ReVisionModel,
    template: Plain | Chat,
    samples: Sequence[Sample],
    truth: Sequence[str],
    rows: Sequence[torch.Tensor],
    right: tuple[np.ndarray, np.ndarray],
    choices: int,
    batch: int,
    seed: int,
) -> dict[str, float]:
    """How often the right text is the likeliest of `choices`, a tie counted by its share."""
    random, texts = np.random.default_rng(seed), sorted(set(truth))
    if choices < 2 or len(texts) < choices:
        got = f"{len(texts)} different texts"
        want = f"expected 2 to {len(texts)}, or 0 for no choice; lower it, or take more samples"
        raise ValueError(f"evaluate: {got} for a choice of {choices}, {want}")

    def candidates() -> Iterator[tuple[Sample, str, torch.Tensor]]:
        for sample, own, image in zip(samples, truth, rows, strict=True):
            others = [one for one in random.permutation(len(texts))[:choices] if texts[one] != own]
            for one in others[: choices - 1]:
                yield sample, texts[one], image

    sums, tokens = _likelihoods(model, template, candidates(), batch)
    wrong = (sums / tokens).reshape(len(samples), choices - 1)
    mine = (right[0] / right[1])[:, None]
    ties = (wrong == mine).sum(1)
    wins = (wrong <= mine).all(1) / (1 + ties)
    return interval(wins) | {"of": choices, "chance": 1 / choices}


@torch.no_grad()
def _likelihoods(
    model: ReVisionModel, template: Plain | Chat, asked: Any, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood and number of tokens of each text after its sample's prompt, `[n]` each."""
    collate, device = Collator(0), model.device
    sums: list[float] = []
    tokens: list[int] = []

    def measure(items: list[dict[str, Any]]) -> None:
        inputs = {name: one.to(device) for name, one in collate(items).items()}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        sums.extend((-losses.sum(1)).tolist())
        tokens.extend((labels != IGNORED).sum(1).tolist())

    items: list[dict[str, Any]] = []
    for sample, text, rows in asked:
        ids, labels = template.encode(template.answered(sample, text))
        prompt = len(template.question(sample))
        labels = [IGNORED] * prompt + labels[prompt:]
        items.append({"input_ids": ids, "labels": labels, "image_rows": rows})
        if len(items) == batch:
            measure(items)
            items = []
    if items:
        measure(items)
    return np.array(sums), np.array(tokens)
