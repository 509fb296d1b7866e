"""Scores of generated texts, and how sure one can be of a mean: CIDEr-D, exact match, bootstrap."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words of difference in length that are forgiven


def words(text: str) -> list[str]:
    """Lower case, punctuation left out."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def exact_match(found: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """1 where a text has the words of one of its references, else 0; `[n]`."""
    pairs = zip(found, references, strict=True)
    return np.array([any(words(one) == words(ref) for ref in refs) for one, refs in pairs], float)


def cider(found: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of every text, `[n]`, usually 0 to about 1 (people multiply by 100 in tables).

    Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015
    (arXiv 1411.5726), sections 4 and 5. With `g(s)` the counts of the n-grams of s times
    `log(images / images whose references have it)`, for each n from 1 to 4 and reference s:

        10 exp(-(|c| - |s|)^2 / (2 sigma^2)) min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|)

    averaged over references and n. Counts are not divided by the length of the text, as in the
    code that the field's tables come from (it matters to the minimum alone); words are those of
    `words`. Rare words are rare among the references given here, so scores of different sets of
    samples do not compare, and of one sample alone all are 0.
    """
    seen = [[_grams(words(ref)) for ref in refs] for refs in references]
    frequency = Counter(gram for refs in seen for gram in {gram for one in refs for gram in one})
    images, scores = len(references), []

    def weighted(grams: Counter) -> list[dict]:
        vectors: list[dict] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            vectors[len(gram) - 1][gram] = count * math.log(images / max(1, frequency[gram]))
        return vectors

    for text, refs, grams in zip(found, references, seen, strict=True):
        if not refs:
            raise ValueError("cider: a text has no reference; give at least one each")
        mine, total = weighted(_grams(words(text))), 0.0
        for reference, one in zip(refs, grams, strict=True):
            apart = len(words(text)) - len(words(reference))
            near = math.exp(-(apart**2) / (2 * SIGMA**2))
            pairs = zip(mine, weighted(one), strict=True)
            total += near * sum(_clipped_cosine(a, b) for a, b in pairs) / LONGEST
        scores.append(10 * total / len(refs))
    return np.array(scores)


def interval(
    values: np.ndarray, weights: np.ndarray | None = None, rounds: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Mean of values `[n]` (weighted) with its 95% interval: percentiles of a bootstrap over n."""
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("interval: no values; evaluate at least one sample")
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    random, means = np.random.default_rng(seed), []
    for _ in range(rounds):
        chosen = random.integers(0, len(values), len(values))
        means.append((values[chosen] * weights[chosen]).sum() / weights[chosen].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    mean = (values * weights).sum() / weights.sum()
    return {"value": float(mean), "low": float(low), "high": float(high)}


def _grams(text: Sequence[str]) -> Counter:
    lengths = range(1, LONGEST + 1)
    return Counter(tuple(text[i : i + n]) for n in lengths for i in range(len(text) - n + 1))


def _clipped_cosine(candidate: dict, reference: dict) -> float:
    lengths = [math.sqrt(sum(x * x for x in one.values())) for one in (candidate, reference)]
    if not all(lengths):
        return 0.0
    shared = (min(x, reference[gram]) * reference[gram]
              for gram, x in candidate.items() if gram in reference)  # fmt: skip
    return sum(shared) / (lengths[0] * lengths[1])
