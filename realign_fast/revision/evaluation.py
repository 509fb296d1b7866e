"""How well a trained model says what is in an image, on held-out pairs of rows and texts.

Loss of the right text a token; what of it the image takes away; choice of the right text among N by
likelihood; generated texts against the right ones by exact match and CIDEr-D. Each with a 95%
interval over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..align import ReAlign
from .conversation_files import Sample
from .dataset import Collator, Conversations
from .generation import respond
from .model import ReVisionModel
from .templates import IGNORED, Chat, Plain
from .text_scores import cider, exact_match, interval

Pair = tuple[int, str]  # a sample's place and a text
Score = Callable[[Sequence[Pair]], np.ndarray]
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
            Some texts are likelier than others beside any image, which hides what a weak model
            sees: `choice_by_gain` takes off the likelihood beside the mean of all rows first.
        limit: samples, spread over the list; None: all.
        batch: sequences at a time.

    Returns:
        `loss` (of a token of the last answer), `gain` (how much lower the loss is than beside
        another sample's image, nats: 0 of a model that does not look; left out without images),
        `choice`, `choice_by_gain`, `exact_match` and `cider`, each with `value`, `low` and `high`
        (95%, bootstrap over samples), and what they were measured on.
    """
    count = len(data) if limit is None else min(limit, len(data))
    numbers = [place * len(data) // count for place in range(count)]
    template, samples = data.template, [data.sample(number) for number in numbers]
    rows = [own.float() for own in _rows(data, numbers)]
    if aligner is not None:
        rows = [aligner(own) if len(own) else own for own in rows]
    truth = [template.expected(one) for one in samples]
    judge = Judge(model, template, samples, rows, batch)
    sums, tokens = judge.sums(list(enumerate(truth)))
    found: dict[str, Any] = {"samples": count, "tokens": int(tokens.sum())}
    found["loss"] = interval(-sums / tokens, tokens)
    if gain := _gain(judge, truth, sums, tokens, seed):
        found["gain"] = gain
    if choices:
        found["choice"] = _choice(judge.likelihood, truth, choices, seed)
        if gain:
            found["choice_by_gain"] = _choice(judge.gain, truth, choices, seed)
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


class Judge:
    """How likely texts are for samples, beside their own images or others; asks nothing twice."""

    def __init__(
        self,
        model: ReVisionModel,
        template: Plain | Chat,
        samples: Sequence[Sample],
        rows: Sequence[torch.Tensor],
        batch: int,
    ) -> None:
        self.samples, self.rows, self.template = samples, rows, template
        self._likelihoods = partial(_likelihoods, model, template, batch=batch)
        self._known: dict[Any, tuple[float, float]] = {}
        self._mean = torch.cat(list(rows)).mean(0)

    def sums(
        self, asked: Sequence[Pair], images: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihoods and tokens [n] of texts beside their samples' images, or `images`'."""
        images = [at for at, _ in asked] if images is None else images
        keys = [(*pair, image) for pair, image in zip(asked, images, strict=True)]
        return self._kept(asked, keys, [self.rows[at] for at in images])

    def likelihood(self, asked: Sequence[Pair]) -> np.ndarray:
        """Mean log-likelihood [n] of a text's tokens beside the images of its sample."""
        sums, tokens = self.sums(asked)
        return sums / tokens

    def gain(self, asked: Sequence[Pair]) -> np.ndarray:
        """`likelihood` less that beside the mean row: what a text owes to these very images."""
        keys = [(tuple(self.template.question(self.samples[at])), text) for at, text in asked]
        sums, tokens = self._kept(
            asked, keys, [self._mean.expand_as(self.rows[at]) for at, _ in asked]
        )
        return self.likelihood(asked) - sums / tokens

    def _kept(
        self, asked: Sequence[Pair], keys: Sequence[Any], rows: Sequence[torch.Tensor]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of texts beside `rows`: what `keys` know already, and the rest asked now."""
        new = {
            key: (self.samples[at], text, own)
            for key, (at, text), own in zip(keys, asked, rows, strict=True)
            if key not in self._known
        }
        found = self._likelihoods(list(new.values()))
        self._known |= dict(zip(new, zip(*found, strict=True), strict=True))
        sums, tokens = np.array([self._known[key] for key in keys]).reshape(-1, 2).T
        return sums, tokens


def _gain(
    judge: Judge, truth: Sequence[str], right: np.ndarray, tokens: np.ndarray, seed: int
) -> dict[str, float] | None:
    """Loss beside another sample's images (as many) less that beside the own, and its interval.

    An estimate of the pointwise mutual information of images and text under the model, a token.
    None where no two samples have as many images.
    """
    images, other = [len(own) for own in judge.rows], np.arange(len(truth))
    for count in sorted(set(images) - {0}):
        group = np.random.default_rng(seed).permutation(np.flatnonzero(np.equal(images, count)))
        other[group] = np.roll(group, 1)
    swapped = other != np.arange(len(truth))
    if not swapped.any():
        return None
    wrong, _ = judge.sums(list(enumerate(truth)), other)
    return interval(((right - wrong) / tokens)[swapped], tokens[swapped])


def _choice(score: Score, truth: Sequence[str], choices: int, seed: int) -> dict[str, float]:
    """How often the right text has the highest score of `choices`, a tie counted by its share.

    One higher wrong text decides a sample, so the wrong ones are asked a few at a time, the highest
    beside their own images first, and those left of a decided sample never.
    """
    right = score(list(enumerate(truth)))
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
    beaten, ties = np.zeros(len(truth), bool), np.zeros(len(truth), int)
    begin, count = 0, FIRST
    while begin < choices - 1 and not beaten.all():
        open_ = [(at, text) for at in np.flatnonzero(~beaten)
                 for text in asked[at][begin : begin + count]]  # fmt: skip
        for (at, _), value in zip(open_, score(open_), strict=True):
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
