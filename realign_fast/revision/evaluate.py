"""How well a trained model says what is in an image, on held-out pairs of rows and texts.

Loss of the right text a token; choice of the right text among N by likelihood; generated texts
against the right ones by exact match and CIDEr-D. Each with a 95% interval over the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
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

FIRST = 8  # wrong texts of the first round of a choice; each round asks twice as many


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
    asked = list(zip(samples, truth, rows, strict=True))
    sums, tokens = _likelihoods(model, template, asked, batch)
    found: dict[str, Any] = {"samples": count, "tokens": int(tokens.sum())}
    found["loss"] = interval(-sums / tokens, tokens)
    if choices:
        found["choice"] = _choice(
            model, template, samples, truth, rows, sums / tokens, choices, batch, seed
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
    right: np.ndarray,
    choices: int,
    batch: int,
    seed: int,
) -> dict[str, float]:
    """How often the right text is the likeliest of `choices`, a tie counted by its share.

    `right` [n] are the right texts' mean log-likelihoods. One likelier wrong text decides a sample,
    so the wrong ones are asked a few at a time, the likeliest beside their own images first, and
    those left of a decided sample never.
    """
    random, texts = np.random.default_rng(seed), sorted(set(truth))
    if choices < 2 or len(texts) < choices:
        got = f"{len(texts)} different texts"
        want = f"expected 2 to {len(texts)}, or 0 for no choice; lower it, or take more samples"
        raise ValueError(f"evaluate: {got} for a choice of {choices}, {want}")
    own = dict(zip(truth, right, strict=True))
    asked = []
    for mine in truth:
        others = [texts[one] for one in random.permutation(len(texts))[:choices]]
        others = [one for one in others if one != mine][: choices - 1]
        asked.append(sorted(others, key=own.__getitem__, reverse=True))
    beaten, ties = np.zeros(len(samples), bool), np.zeros(len(samples), int)
    begin, count = 0, FIRST
    while begin < choices - 1 and not beaten.all():
        open_ = [(at, text) for at in np.flatnonzero(~beaten)
                 for text in asked[at][begin : begin + count]]  # fmt: skip
        wrong = _likelihoods(
            model, template, [(samples[at], text, rows[at]) for at, text in open_], batch
        )
        for (at, _), value in zip(open_, wrong[0] / wrong[1], strict=True):
            beaten[at] |= value > right[at]
            ties[at] += value == right[at]
        begin, count = begin + count, 2 * count
    return interval(~beaten / (1 + ties)) | {"of": choices, "chance": 1 / choices}


@torch.no_grad()
def _likelihoods(
    model: ReVisionModel,
    template: Plain | Chat,
    asked: Sequence[tuple[Sample, str, torch.Tensor]],
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood and number of tokens of each text after its sample's prompt, `[n]` each.

    Texts of like length run together, so that little is padded.
    """
    items: list[dict[str, Any]] = []
    for sample, text, rows in asked:
        ids, labels = template.encode(template.answered(sample, text))
        prompt = len(template.question(sample))
        labels = [IGNORED] * prompt + labels[prompt:]
        items.append({"input_ids": ids, "labels": labels, "image_rows": rows})
    order = sorted(range(len(items)), key=lambda at: len(items[at]["input_ids"]))
    sums, tokens = np.zeros(len(items)), np.zeros(len(items))
    for begin in range(0, len(order), batch):
        places = order[begin : begin + batch]
        inputs = Collator(0)([items[at] for at in places])
        inputs = {name: one.to(model.device) for name, one in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        meant = labels != IGNORED
        logits = model(**inputs).logits[:, :-1][meant].float()
        losses = torch.zeros(labels.shape, device=labels.device)
        losses[meant] = torch.nn.functional.cross_entropy(logits, labels[meant], reduction="none")
        sums[places], tokens[places] = -losses.sum(1).cpu().numpy(), meant.sum(1).cpu().numpy()
    return sums, tokens
