"""Scores of generated texts, and the confidence interval of a mean: CIDEr-D, exact match."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_NGRAM = 4  # words
LENGTH_SIGMA = 6.0  # words: the width of the Gaussian penalty on differences in length

NGram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return `[n]`: 1 where a text has the words of one of its references, else 0."""
    pairs = zip(texts, references, strict=True)
    return np.array(
        [any(words(text) == words(reference) for reference in own) for text, own in pairs], float
    )


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return CIDEr-D of every text, `[n]`: usually 0 to about 1; tables show it times 100.

    Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015
    (arXiv 1411.5726), sections 4 and 5. With `g(s)` the counts of the n-grams of s times
    `log(images / images whose references have it)`, for each n from 1 to 4 and reference s:

        10 exp(-(|c| - |s|)^2 / (2 sigma^2)) min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|)

    averaged over references and n. Counts are not divided by the length of the text, as in the
    code that published tables come from (this matters to the minimum alone); words are those of
    `words`. A word is rare if it is rare among the references given here, so scores of different
    sets of samples cannot be compared, and those of a single sample are all 0.

    Raises:
        ValueError: a text has no reference.
    """
    ngrams = [[_count_ngrams(words(reference)) for reference in own] for own in references]
    frequency = Counter(gram for own in ngrams for gram in set().union(*own))
    images, scores = len(references), []
    for text, own, own_ngrams in zip(texts, references, ngrams, strict=True):
        if not own:
            raise ValueError("cider: a text has no reference; give at least one each")
        candidate, total = _weigh(_count_ngrams(words(text)), frequency, images), 0.0
        for reference, counts in zip(own, own_ngrams, strict=True):
            difference = len(words(text)) - len(words(reference))
            penalty = math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))
            pairs = zip(candidate, _weigh(counts, frequency, images), strict=True)
            total += penalty * sum(_clipped_cosine(c, s) for c, s in pairs) / MAX_NGRAM
        scores.append(10 * total / len(own))
    return np.array(scores)


def interval(
    values: ArrayLike, weights: ArrayLike | None = None, rounds: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Return the mean of values `[n]` and its 95% interval: `value`, `low` and `high`.

    Args:
        values: one value a sample.
        weights: the weight of each value; by default all are equal.
        rounds: resamples of the bootstrap, whose percentiles are the interval.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("interval: no values; evaluate at least one sample")
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    random, means = np.random.default_rng(seed), []
    for _ in range(rounds):
        drawn = random.integers(0, len(values), len(values))
        means.append((values[drawn] * weights[drawn]).sum() / weights[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    mean = (values * weights).sum() / weights.sum()
    return {"value": float(mean), "low": float(low), "high": float(high)}


def _count_ngrams(text: Sequence[str]) -> Counter[NGram]:
    """Count the n-grams of a text of 1 to `MAX_NGRAM` words."""
    return Counter(
        tuple(text[i : i + n]) for n in range(1, MAX_NGRAM + 1) for i in range(len(text) - n + 1)
    )


def _weigh(
    counts: Counter[NGram], frequency: Counter[NGram], images: int
) -> list[dict[NGram, float]]:
    """Return the vector g for each n: counts times the logarithm of the inverse frequency."""
    vectors: list[dict[NGram, float]] = [{} for _ in range(MAX_NGRAM)]
    for gram, count in counts.items():
        vectors[len(gram) - 1][gram] = count * math.log(images / max(1, frequency[gram]))
    return vectors


def _clipped_cosine(candidate: dict[NGram, float], reference: dict[NGram, float]) -> float:
    """Return `min(c, s) . s / (|c| |s|)`, or 0 if a vector is zero."""
    norms = [math.sqrt(sum(x * x for x in vector.values())) for vector in (candidate, reference)]
    if not all(norms):
        return 0.0
    product = sum(
        min(weight, reference[gram]) * reference[gram]
        for gram, weight in candidate.items()
        if gram in reference
    )
    return product / (norms[0] * norms[1])
