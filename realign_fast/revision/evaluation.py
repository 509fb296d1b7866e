"""Measures of how well a trained model describes images, on held-out pairs of rows and texts.

They are the loss of the right text, the part of it that the image takes away, and the choice of the
right text among N by likelihood. Each comes with a 95% interval over the samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..align import ReAlign
from ..interface.option_values import Modality
from ..storage.paths import write_whole
from .conversation_files import Sample
from .model import ReVisionModel
from .templates import IGNORED_LABEL, Template
from .training_data import Collator, Conversations, Item, check_rows

Figure = dict[str, float]  # `value`, `low` and `high`
Vector = NDArray[np.float64]
_MEAN_ROW = -1  # in place of the latter: the mean of all rows as the image
_RESAMPLES = 2000  # of a bootstrap


def evaluate(
    model: ReVisionModel,
    data: Conversations,
    *,
    aligner: ReAlign | None = None,
    choices: int = 4,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
    losses: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure a model in eval mode on prepared samples (`prepare`).

    `aligner` maps raw text rows first; rows of a model with a space go through the side that
    `data.side` names. `limit` is the number of samples, spread over the list;
    `batch` that of sequences at a time. `seed` draws the wrong texts and images. `losses` is a file
    for a line of JSON a sample: `id`, `tokens`, `loss` and `other_loss` (with another image).

    The choice is among `choices` texts by the mean log-likelihood of their tokens (the sum would
    favour short texts); 0 leaves it out. Some texts are likelier than others with any image, which
    hides what a weak model sees, so `choice_by_gain` first subtracts the likelihood with the mean
    of all rows as the image.

    Returns:
        `loss`, nats a token of the last answer; `gain`, by how many nats it is lower than with the
        image of another sample, which is 0 for a model that ignores images and left out for
        samples without any; `choice` and `choice_by_gain`; each with `value`, `low` and `high`
        (95%, bootstrap over samples). Also the numbers of `samples` and `tokens`.

    Raises:
        ValueError: there are fewer different texts than `choices`, or no samples.
    """
    count = len(data) if limit is None else min(limit, len(data))
    if not count:
        raise ValueError(f"evaluate: got limit {limit}, expected a number of samples from 1")
    if losses is not None:
        Path(losses).parent.mkdir(parents=True, exist_ok=True)
    indices = [number * len(data) // count for number in range(count)]
    samples = [data.sample(index) for index in indices]
    rows = (data if aligner is None else data.aligned(aligner)).image_rows(indices)
    check_rows(model.projector.space, data.rows, aligner)
    scorer = LikelihoodScorer(model, data.template, samples, rows, batch, data.side)
    references, everyone = scorer.references, range(len(samples))
    wrong_texts = _draw_wrong_texts(references, choices, seed) if choices else []
    own, tokens = scorer.likelihoods(everyone, references, everyone)
    figures: dict[str, Any] = {"samples": len(tokens), "tokens": int(tokens.sum())}
    figures["loss"] = interval(-own, tokens)
    exchanged, differs = _exchanged(scorer, seed)
    others = scorer.likelihoods(everyone, references, exchanged)[0] if differs.any() else own
    if differs.any():
        figures["gain"] = interval((own - others)[differs], tokens[differs])
    if losses is not None:
        lines = [
            {"id": sample.id, "tokens": int(tokens[n]), "loss": -own[n]}
            | {"other_loss": -others[n] if differs[n] else None}
            for n, sample in enumerate(samples)
        ]
        write_whole(losses, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _likelihood(numbers: Sequence[int], texts: Sequence[str]) -> Vector:
        return scorer.likelihoods(numbers, texts, numbers)[0]

    def _gain(numbers: Sequence[int], texts: Sequence[str]) -> Vector:
        mean_row = scorer.likelihoods(numbers, texts, [_MEAN_ROW] * len(texts))[0]
        return _likelihood(numbers, texts) - mean_row

    if choices:
        figures["choice"] = _choice(_likelihood, references, wrong_texts)
        if differs.any():
            figures["choice_by_gain"] = _choice(_gain, references, wrong_texts)
    return figures


def interval(values: ArrayLike, weights: ArrayLike | None = None) -> Figure:
    """Return the mean of values `[n]` and its 95% interval: `value`, `low` and `high`.

    `weights` `[n]` are equal by default. The interval is between percentiles of a bootstrap.
    ValueError if there are no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("interval: no values; evaluate at least one sample")
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    random, count = np.random.default_rng(0), len(values)
    draws = (random.integers(0, count, count) for _ in range(_RESAMPLES))
    means = [np.average(values[drawn], weights=weights[drawn]) for drawn in draws]
    figures = np.average(values, weights=weights), *np.percentile(means, [2.5, 97.5])
    return dict(zip(("value", "low", "high"), map(float, figures), strict=True))


@dataclass
class LikelihoodScorer:
    """The likelihoods of texts for samples, with their own images or others, each computed once."""

    model: ReVisionModel
    template: Template
    samples: Sequence[Sample]
    rows: Sequence[Tensor]  # the images of each sample, [images, D]
    batch: int  # sequences at a time
    side: Modality = "image"  # of the rows

    def __post_init__(self) -> None:
        self.references = [self.template.reference(sample) for sample in self.samples]
        self._known: dict[Hashable, Vector] = {}
        self._mean_row = torch.cat(list(self.rows)).mean(0)

    def likelihoods(
        self, numbers: Sequence[int], texts: Sequence[str], images: Sequence[int]
    ) -> tuple[Vector, Vector]:
        """Return the mean log-likelihood of a token, in nats, and the tokens of each text, `[n]`.

        `numbers` are samples, each with a text and the sample whose images are shown with it.
        """
        items = list(map(self._item, numbers, texts, images))
        keys = [(tuple(item["input_ids"]), item["image"]) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        self._known |= zip(new, self._scores(list(new.values())), strict=True)
        sums, tokens = np.array([self._known[key] for key in keys]).reshape(-1, 2).T
        return sums / tokens, tokens

    def _item(self, number: int, text: str, image: int) -> Item:
        """Encode a text as the answer to a sample's prompt, with labels on the text alone."""
        template, sample = self.template, self.samples[number]
        ids, labels = template.encode(template.with_answer(sample, text))
        if template.positions and len(ids) > template.positions:
            raise ValueError(
                f"evaluate: {text[:40]!r} as the answer of sample {sample.id!r} makes {len(ids)} "
                f"tokens, expected at most {template.positions}, the positions of the model; leave "
                "out long samples (--max-length) or the choice (--choices 0)"
            )
        prompt = len(template.prompt(sample))
        labels = [IGNORED_LABEL] * prompt + labels[prompt:]
        rows = self.rows[number if image == _MEAN_ROW else image]
        rows = self._mean_row.expand_as(rows) if image == _MEAN_ROW else rows
        return {"input_ids": ids, "labels": labels, f"{self.side}_rows": rows, "image": image}

    @torch.no_grad()
    def _scores(self, items: Sequence[Item]) -> Vector:
        """Return the log-likelihood and the number of the labelled tokens of each item."""
        # Items of similar length run together, so that there is little padding.
        order = sorted(range(len(items)), key=lambda index: len(items[index]["input_ids"]))
        scores = np.zeros((len(items), 2))
        for start in range(0, len(order), self.batch):
            indices = order[start : start + self.batch]
            inputs = Collator(0)([items[index] for index in indices])
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            labels = inputs.pop("labels")[:, 1:]
            labelled = labels != IGNORED_LABEL
            logits = self.model(**inputs).logits[:, :-1][labelled].float()
            losses = torch.zeros(labels.shape, device=labels.device)
            losses[labelled] = cross_entropy(logits, labels[labelled], reduction="none")
            scores[indices] = torch.stack([-losses.sum(1), labelled.sum(1)], 1).cpu()
        return scores


def _exchanged(scorer: LikelihoodScorer, seed: int) -> tuple[Sequence[int], NDArray[np.bool_]]:
    """Return for each sample another of as many images, and whether its images are different."""
    image_counts, exchanged = [len(rows) for rows in scorer.rows], np.arange(len(scorer.rows))
    for count in sorted(set(image_counts) - {0}):
        group = np.flatnonzero(np.equal(image_counts, count))
        group = np.random.default_rng(seed).permutation(group)
        exchanged[group] = np.roll(group, 1)
    images = [sample.images for sample in scorer.samples]  # several samples may have the same
    differs = [images[n] != own for n, own in zip(exchanged, images, strict=True)]
    return exchanged.tolist(), np.array(differs)


def _choice(
    score: Callable[[Sequence[int], Sequence[str]], Vector],
    references: Sequence[str],
    wrong_texts: Sequence[Sequence[str]],
) -> Figure:
    """Return how often the right text has the highest score; a tie counts for its share.

    A sample is compared with one wrong text after the other until one is higher, first with those
    that score highest with their own images.
    """
    right = score(range(len(references)), references)
    own_scores = dict(zip(references, right, strict=True))
    ordered = [sorted(texts, key=own_scores.__getitem__, reverse=True) for texts in wrong_texts]
    beaten, ties = np.zeros(len(references), bool), np.zeros(len(references), int)
    for texts in zip(*ordered, strict=True):
        undecided = np.flatnonzero(~beaten)
        scores = score(undecided.tolist(), [texts[sample] for sample in undecided])
        beaten[undecided] = scores > right[undecided]
        ties[undecided] += scores == right[undecided]
    choices = len(ordered[0]) + 1
    return interval(~beaten / (1 + ties)) | {"of": choices, "chance": 1 / choices}


def _draw_wrong_texts(references: Sequence[str], choices: int, seed: int) -> list[list[str]]:
    """Draw `choices - 1` different texts of other samples for each sample."""
    random, texts = np.random.default_rng(seed), sorted(set(references))
    if choices < 2 or len(texts) < choices:
        fault = f"{len(texts)} different texts for a choice of {choices}"
        expected = "expected 2 up to the number of different texts, or 0 for no choice"
        raise ValueError(f"evaluate: {fault}, {expected}; set --choices, or take more samples")
    drawn = ([texts[i] for i in random.permutation(len(texts))[:choices]] for _ in references)
    pairs = zip(references, drawn, strict=True)
    return [[text for text in own if text != right][: choices - 1] for right, own in pairs]
