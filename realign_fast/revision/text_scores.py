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
RESAMPLES = 2000  # of a bootstrap
NGram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return `[n]`: 1 where a text has the words of one of its references, else 0."""
    pairs = zip(texts, references, strict=True)
    return np.array([words(text) in map(words, own) for text, own in pairs], float)


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
    ValueError if a text has no reference.
    """
    if not all(references):
        raise ValueError("cider: a text has no reference; give at least one each")
    scores = np.zeros(len(texts))
    for n in range(1, MAX_NGRAM + 1):
        counts = [[_count_ngrams(reference, n) for reference in own] for own in references]
        frequency = Counter(gram for own in counts for gram in set().union(*own))
        for index, (text, own) in enumerate(zip(texts, references, strict=True)):
            candidate = _count_ngrams(text, n)
            for reference, reference_counts in zip(own, counts[index], strict=True):
                difference = len(words(text)) - len(words(reference))
                penalty = math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))
                cosine = _clipped_cosine(candidate, reference_counts, frequency, len(texts))
                scores[index] += 10 * penalty * cosine / (MAX_NGRAM * len(own))
    return scores


def interval(values: ArrayLike, weights: ArrayLike | None = None) -> dict[str, float]:
    """Return the mean of values `[n]` and its 95% interval: `value`, `low` and `high`.

    Each value is of a sample; `weights` `[n]` are equal by default. The interval is between
    percentiles of a bootstrap.
    ValueError if there are no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("interval: no values; evaluate at least one sample")
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    random, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, len(values), len(values))
        means.append((values[drawn] * weights[drawn]).sum() / weights[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    mean = (values * weights).sum() / weights.sum()
    return {"value": float(mean), "low": float(low), "high": float(high)}


def _count_ngrams(text: str, n: int) -> Counter[NGram]:
    """Count the sequences of `n` words in a text."""
    split = words(text)
    return Counter(tuple(split[start : start + n]) for start in range(len(split) - n + 1))


def _clipped_cosine(
    candidate: Counter[NGram], reference: Counter[NGram], frequency: Counter[NGram], images: int
) -> float:
    """Return `min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|)` of two counts, or 0 if a vector is zero."""
    c, s = (
        {gram: count * math.log(images / max(1, frequency[gram])) for gram, count in counts.items()}
        for counts in (candidate, reference)
    )
    norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in (c, s)]
    product = sum(min(weight, s[gram]) * s[gram] for gram, weight in c.items() if gram in s)
    return product / (norms[0] * norms[1]) if all(norms) else 0.0
