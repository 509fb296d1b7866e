"""The figures of a mixed gallery against a search by brute force."""

import math

import numpy as np
import pytest
import torch

from realign_fast import metrics


def brute_force(queries, galleries, relevant, own, k):
    """Recall and NDCG at k in the union, by sorting all scores of every query."""
    recalls, ndcgs = [], []
    offsets = dict(zip(galleries, np.cumsum([0, *map(len, galleries.values())]), strict=False))
    for query in range(len(queries)):
        scores = np.concatenate([rows @ queries[query] for rows in galleries.values()])
        right = {offsets[m] + rows[query] for m, rows in relevant.items() if rows[query] >= 0}
        for modality, rows in own.items():
            if rows[query] >= 0:
                scores[offsets[modality] + rows[query]] = -np.inf
        order = np.argsort(-scores)[:k]
        gains = [1 / math.log2(place + 2) for place, row in enumerate(order) if row in right]
        ideal = sum(1 / math.log2(place + 2) for place in range(min(len(right), k)))
        recalls.append(bool(gains))
        ndcgs.append(sum(gains) / ideal)
    return np.mean(recalls), np.mean(ndcgs)


@pytest.fixture
def search():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 40, 25)]
    queries = rows[0] + 0.5 * rows[1]
    relevant = {"text": torch.arange(40).roll(1), "image": torch.arange(40) % 25}
    relevant["text"][::3] = -1
    own = {"text": torch.arange(40)}
    own["text"][5] = -1
    return queries, {"text": rows[0], "image": rows[2]}, relevant, own


@pytest.mark.parametrize("block", [4096, 7, 1])
def test_figures_are_those_of_sorting_all_scores(search, block):
    queries, galleries, relevant, own = search
    found = metrics.mixed_gallery(queries, galleries, relevant, own=own, ks=(1, 5), block=block)
    arrays = [
        {name: rows.numpy() for name, rows in given.items()} for given in (galleries, relevant, own)
    ]
    recall, ndcg = brute_force(queries.numpy(), *arrays, k=5)
    assert found.recall[5] == pytest.approx(recall, abs=1e-12)
    assert found.ndcg == pytest.approx(ndcg, abs=1e-12)
    assert found.recall[1] == pytest.approx(brute_force(queries.numpy(), *arrays, k=1)[0])
    alone = brute_force(
        queries.numpy(), {"image": arrays[0]["image"]}, {"image": arrays[1]["image"]}, {}, 5
    )
    assert (found.pure_recall["image"][5], found.pure_ndcg["image"]) == pytest.approx(alone)
    assert sum(found.shares.values()) == pytest.approx(1)
    scores = queries @ galleries["image"].T
    within = (scores > scores.gather(1, relevant["image"][:, None])).double().mean() * 25 / 24
    assert found.within["image"] == pytest.approx(float(within))
    answer = scores.gather(1, relevant["image"][:, None])
    texts = queries @ galleries["text"].T
    texts[own["text"] >= 0, own["text"][own["text"] >= 0]] = -torch.inf
    others = (texts > answer).sum(dim=1) / (40 - (own["text"] >= 0).double())
    assert found.between["image"] == pytest.approx(float(others.mean()))
    spread = math.sqrt(recall * (1 - recall) / 39)
    assert found.recall[5].standard_error == pytest.approx(spread)


def test_gini_of_equal_and_of_concentrated_counts():
    assert metrics.gini(torch.full((10,), 3)) == 0
    assert metrics.gini(torch.tensor([0] * 9 + [5])) == pytest.approx(0.9)
    assert metrics.gini(torch.tensor([1, 2, 3])) == pytest.approx(2 / 9)
    assert metrics.gini(torch.zeros(3)) == 0


def test_the_error_of_the_hubs_is_that_of_other_queries():
    """The error of each sample of queries, against the spread over samples."""
    generator = torch.Generator().manual_seed(0)
    gallery = {"image": torch.randn(30, 4, generator=generator)}
    found = []
    for _ in range(60):
        queries = torch.randn(200, 4, generator=generator)
        relevant = {"image": torch.zeros(200, dtype=torch.int64)}
        found.append(metrics.mixed_gallery(queries, gallery, relevant, ks=(5,)).hub_gini)
    error = np.mean([gini.standard_error for gini in found])
    assert error == pytest.approx(np.std(found, ddof=1), rel=0.3)


def test_figures_are_averaged_over_splits(search):
    queries, galleries, relevant, _ = search
    halves = [
        metrics.mixed_gallery(
            queries[half], galleries, {name: rows[half] for name, rows in relevant.items()}
        )
        for half in (slice(None, 20), slice(20, None))
    ]
    found = metrics.over_splits(halves)
    values = [half.pure_recall["image"][10] for half in halves]
    assert found.pure_recall["image"][10] == pytest.approx(np.mean(values))
    error = found.pure_recall["image"][10].standard_error
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))
    assert found.hub_gini == pytest.approx(np.mean([half.hub_gini for half in halves]))


def test_ties_count_for_the_relevant_row():
    gallery = {"image": torch.ones(4, 2)}
    found = metrics.mixed_gallery(torch.ones(1, 2), gallery, {"image": torch.tensor([3])}, ks=(1,))
    assert found.recall[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=torch.ones(3, 5)), "text have 6 columns, the queries 5"),
        (dict(relevant={"audio": torch.arange(40)}), r"name \['audio'\], expected one or more"),
        (dict(relevant={"image": torch.full((40,), 25)}), r"relevant\['image'\] must be \[40\]"),
        (dict(relevant={"image": torch.ones(40, dtype=torch.bool)}), "must be .* int64 numbers"),
        (dict(queries=torch.full((40, 6), 1e300, dtype=torch.float64) * 1e8), "overflow|NaN"),
        (dict(ks=1), "ks is 1, expected ascending"),
        (dict(block=0), "block is 0, expected a whole number"),
        (dict(relevant={"image": torch.full((40,), -1)}), "query 0 has no relevant row"),
        (
            dict(own={"text": torch.arange(39)}),
            r"own\['text'\] must be \[40\] int64 numbers of the 40",
        ),
        (dict(ks=(5, 1)), "ascending numbers from 1 to 65"),
        (dict(ks=(66,)), "ascending numbers from 1 to 65"),
        (dict(queries=torch.full((40, 6), torch.nan)), "mixed_gallery, queries: row 0 holds a NaN"),
    ],
)
def test_what_does_not_fit_is_refused(search, change, message):
    queries, galleries, relevant, _ = search
    arguments = dict(queries=queries, galleries=galleries, relevant=relevant) | change
    with pytest.raises(ValueError, match=message):
        metrics.mixed_gallery(**arguments)


def test_arrays_are_taken_and_lists_are_refused(search):
    queries, galleries, relevant, _ = search
    arrays = {name: rows.numpy() for name, rows in galleries.items()}
    found = metrics.mixed_gallery(queries.numpy(), arrays, relevant)
    expected = metrics.mixed_gallery(queries, galleries, relevant)
    assert found.recall == expected.recall and found.ndcg == expected.ndcg
    lists = {name: rows.tolist() for name, rows in galleries.items()}
    with pytest.raises(TypeError, match=r"mixed_gallery, text: expected rows as .*, got list"):
        metrics.mixed_gallery(queries, lists, relevant)
