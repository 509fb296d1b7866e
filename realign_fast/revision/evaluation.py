"""Measures of how well a trained model describes images, on held-out pairs of rows and texts.

They are the loss of the right text, the part of it that the image takes away, the choice of the
right text among N by likelihood, and the agreement of generated texts with the right ones by exact
match and CIDEr-D. Each comes with a 95% interval over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..align import ReAlign
from .conversation_files import Sample
from .generation import respond
from .model import ReVisionModel
from .templates import IGNORED_LABEL, Encoded, Template
from .text_scores import cider, exact_match, interval
from .training_data import Collator, Conversations, Item, spread

Pair = tuple[int, str]  # the index of a sample, and a text
Figure = dict[str, float]  # `value`, `low` and `high`
Vector = NDArray[np.float64]
Scores = tuple[Vector, Vector]  # of texts: the log-likelihood, in nats, and the number of tokens
_MEAN_ROW = -1  # in place of a sample's number: the mean of all rows as the image
_EXAMPLES = 5  # generated texts that are reported


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
    """Measure a model in eval mode on prepared samples (`prepare`).

    `aligner` maps raw text rows first. `limit` is the number of samples, spread over the list;
    `batch` that of sequences at a time. `seed` draws the wrong texts and images.

    The choice is among `choices` texts by the mean log-likelihood of their tokens (the sum would
    favour short texts); 0 leaves it out. Some texts are likelier than others with any image, which
    hides what a weak model sees, so `choice_by_gain` first subtracts the likelihood with the mean
    of all rows as the image.

    Returns:
        `loss`, nats a token of the last answer; `gain`, by how many nats it is lower than with the
        image of another sample, which is 0 for a model that ignores images and left out for
        samples without any; `choice`, `choice_by_gain`, `exact_match` and `cider`; each with
        `value`, `low` and `high` (95%, bootstrap over samples). Also the numbers of `samples` and
        `tokens`, and a few `examples` of generated texts.

    Raises:
        ValueError: there are fewer different texts than `choices`, or no samples.
    """
    indices = spread(len(data) if limit is None else limit, len(data))
    if not indices:
        raise ValueError(f"evaluate: got limit {limit}, expected a number of samples from 1")
    samples = [data.sample(index) for index in indices]
    rows = (data if aligner is None else data.aligned(aligner)).image_rows(indices)
    scorer = LikelihoodScorer(model, data.template, samples, rows, batch)
    references = scorer.references
    wrong_texts = _draw_wrong_texts(references, choices, seed) if choices else []
    sums, tokens = scorer.sums(list(enumerate(references)))
    figures: dict[str, Any] = {"samples": len(tokens), "tokens": int(tokens.sum())}
    figures["loss"] = interval(-sums / tokens, tokens)
    if gain := _gain(scorer, sums, tokens, seed):
        figures["gain"] = gain
    if choices:
        figures["choice"] = _choice(scorer.likelihoods, references, wrong_texts)
    if choices and gain:
        figures["choice_by_gain"] = _choice(scorer.gains, references, wrong_texts)
    return figures | (_generation_figures(scorer, max_new_tokens) if generate else {})


def _generation_figures(scorer: LikelihoodScorer, max_new_tokens: int) -> dict[str, Any]:
    """Return the figures of generated texts, and the first of them as examples."""
    texts: list[str] = []
    for start in range(0, len(scorer.samples), scorer.batch):
        part = slice(start, start + scorer.batch)
        inputs = scorer.model, scorer.template, scorer.samples[part], scorer.rows[part]
        texts += respond(*inputs, max_new_tokens=max_new_tokens)
    references = [[reference] for reference in scorer.references]
    shown = zip(scorer.samples[:_EXAMPLES], scorer.references, texts, strict=False)
    return {
        "exact_match": interval(exact_match(texts, references)),
        "cider": interval(cider(texts, references)),
        "examples": [{"id": s.id, "expected": right, "generated": t} for s, right, t in shown],
    }


@dataclass
class LikelihoodScorer:
    """The likelihoods of texts for samples, with their own images or others, each computed once."""

    model: ReVisionModel
    template: Template
    samples: Sequence[Sample]
    rows: Sequence[Tensor]  # the images of each sample, [images, D]
    batch: int  # sequences at a time

    def __post_init__(self) -> None:
        self.references = [self.template.reference(sample) for sample in self.samples]
        self._known: dict[Hashable, tuple[float, float]] = {}
        self._mean_row = torch.cat(list(self.rows)).mean(0)

    def sums(self, pairs: Sequence[Pair], images: Sequence[int] | None = None) -> Scores:
        """Return the log-likelihood, in nats, and the number of tokens of each text, `[n]` each.

        `images` are the samples whose images are shown, or `_MEAN_ROW`; by default every text is
        scored with the images of its own sample.
        """
        images = [sample for sample, _ in pairs] if images is None else images
        keys: list[Hashable] = []
        new: dict[Hashable, Item] = {}
        for (sample, text), image in zip(pairs, images, strict=True):
            ids, labels = self._encode(self.samples[sample], text)
            rows = self.rows[image if image != _MEAN_ROW else sample]
            if image == _MEAN_ROW:
                rows = self._mean_row.expand_as(rows)
            keys.append((tuple(ids), image))
            if keys[-1] not in self._known:
                new[keys[-1]] = {"input_ids": ids, "labels": labels, "image_rows": rows}
        scores = self._log_likelihoods(list(new.values()))
        self._known |= dict(zip(new, zip(*scores, strict=True), strict=True))
        sums, tokens = np.array([self._known[key] for key in keys]).reshape(-1, 2).T
        return sums, tokens

    def likelihoods(self, pairs: Sequence[Pair]) -> Vector:
        """Return the mean log-likelihood of the tokens of each text, `[n]`."""
        sums, tokens = self.sums(pairs)
        return sums / tokens

    def gains(self, pairs: Sequence[Pair]) -> Vector:
        """Return `likelihoods` minus those with the mean row: what the images add to each text."""
        sums, tokens = self.sums(pairs, [_MEAN_ROW] * len(pairs))
        return self.likelihoods(pairs) - sums / tokens

    def _encode(self, sample: Sample, text: str) -> Encoded:
        """Encode a text as the answer to a sample's prompt, with labels on the text alone."""
        ids, labels = self.template.encode(self.template.with_answer(sample, text))
        if self.template.positions and len(ids) > self.template.positions:
            raise ValueError(
                f"evaluate: {text[:40]!r} as the answer of sample {sample.id!r} makes {len(ids)} "
                f"tokens, expected at most {self.template.positions}, which is what the language "
                "model takes; leave out long samples (--max-length) or the choice (--choices 0)"
            )
        prompt = len(self.template.prompt(sample))
        return Encoded(ids, [IGNORED_LABEL] * prompt + labels[prompt:])

    @torch.no_grad()
    def _log_likelihoods(self, items: Sequence[Item]) -> Scores:
        """Return the log-likelihood and the number of the labelled tokens of each item.

        Items of similar length run together, so that there is little padding.
        """
        order = sorted(range(len(items)), key=lambda index: len(items[index]["input_ids"]))
        sums, tokens = np.zeros(len(items)), np.zeros(len(items))
        for start in range(0, len(order), self.batch):
            indices = order[start : start + self.batch]
            inputs = Collator(0)([items[index] for index in indices])
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            labels = inputs.pop("labels")[:, 1:]
            labelled = labels != IGNORED_LABEL
            logits = self.model(**inputs).logits[:, :-1][labelled].float()
            losses = torch.zeros(labels.shape, device=labels.device)
            losses[labelled] = cross_entropy(logits, labels[labelled], reduction="none")
            sums[indices] = -losses.sum(1).cpu().numpy()
            tokens[indices] = labelled.sum(1).cpu().numpy()
        return sums, tokens


def _gain(scorer: LikelihoodScorer, right_sums: Vector, tokens: Vector, seed: int) -> Figure | None:
    """Return the loss with the images of another sample minus that with a sample's own.

    Samples are exchanged with those of as many images; None if no two of them have different
    images. It estimates the pointwise mutual information of images and text under the model, a
    token.
    """
    image_counts, exchanged = [len(rows) for rows in scorer.rows], np.arange(len(scorer.rows))
    for count in sorted(set(image_counts) - {0}):
        group = np.flatnonzero(np.equal(image_counts, count))
        group = np.random.default_rng(seed).permutation(group)
        exchanged[group] = np.roll(group, 1)
    images = [sample.images for sample in scorer.samples]  # several samples may have the same
    differs = np.array([images[n] != own for n, own in zip(exchanged, images, strict=True)])
    if not differs.any():
        return None
    wrong_sums, _ = scorer.sums(list(enumerate(scorer.references)), exchanged.tolist())
    return interval(((right_sums - wrong_sums) / tokens)[differs], tokens[differs])


def _choice(
    score: Callable[[Sequence[Pair]], Vector],
    references: Sequence[str],
    wrong_texts: Sequence[Sequence[str]],
) -> Figure:
    """Return how often the right text has the highest score; a tie counts for its share.

    One higher wrong text decides a sample. So each sample is compared with one wrong text after
    the other, first with those that score highest with their own images, until it is decided.
    """
    right = score(list(enumerate(references)))
    own_scores = dict(zip(references, right, strict=True))
    ordered = [sorted(texts, key=own_scores.__getitem__, reverse=True) for texts in wrong_texts]
    beaten, ties = np.zeros(len(references), bool), np.zeros(len(references), int)
    for texts in zip(*ordered, strict=True):
        undecided = np.flatnonzero(~beaten)
        scores = score([(sample, texts[sample]) for sample in undecided.tolist()])
        beaten[undecided] = scores > right[undecided]
        ties[undecided] += scores == right[undecided]
    choices = len(ordered[0]) + 1
    return interval(~beaten / (1 + ties)) | {"of": choices, "chance": 1 / choices}


def _draw_wrong_texts(references: Sequence[str], choices: int, seed: int) -> list[list[str]]:
    """Draw `choices - 1` different texts of other samples for each sample."""
    random, texts = np.random.default_rng(seed), sorted(set(references))
    if choices < 2 or len(texts) < choices:
        expected = {1: "0", 2: "2, or 0"}.get(len(texts), f"2 to {len(texts)}, or 0")
        counts = f"{len(texts)} different texts for a choice of {choices}"
        advice = "set it (--choices), or take more samples"
        raise ValueError(f"evaluate: {counts}, expected {expected} for no choice; {advice}")
    drawn = ([texts[i] for i in random.permutation(len(texts))[:choices]] for _ in references)
    pairs = zip(references, drawn, strict=True)
    return [[text for text in own if text != right][: choices - 1] for right, own in pairs]
