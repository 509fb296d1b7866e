"""The figures of a mixed gallery against a search by brute force."""

import math

import numpy as np
import pytest
import torch

from realign_fast import metrics


def brute_force(queries, galleries, answering, answers, own, k):
    """Recall and NDCG at k in the union, by sorting all scores of every query."""
    recalls, ndcgs = [], []
    offsets = dict(zip(galleries, np.cumsum([0, *map(len, galleries.values())]), strict=False))
    for query in range(len(queries)):
        scores = np.concatenate([rows @ queries[query] for rows in galleries.values()])
        for modality, rows in own.items():
            scores[offsets[modality] + rows[query]] = -np.inf
        place = int((np.argsort(-scores) == offsets[answering] + answers[query]).nonzero()[0][0])
        recalls.append(place < k)
        ndcgs.append((place < k) / math.log2(place + 2))
    return np.mean(recalls), np.mean(ndcgs)


@pytest.fixture
def search():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 40, 25)]
    relevant, own = {"image": torch.arange(40) % 25}, {"text": torch.arange(40).roll(3)}
    return rows[0] + 0.5 * rows[1], {"text": rows[0], "image": rows[2]}, relevant, own


@pytest.mark.parametrize("block", [4096, 7, 1])
def test_figures_are_those_of_sorting_all_scores(search, block):
    queries, galleries, relevant, own = search
    found = metrics.mixed_gallery(queries, galleries, relevant, own=own, ks=(1, 5), block=block)
    arrays, mine = ({n: r.numpy() for n, r in given.items()} for given in (galleries, own))
    answers = relevant["image"].numpy()
    recall, ndcg = brute_force(queries.numpy(), arrays, "image", answers, mine, 5)
    assert found.recall[5] == pytest.approx(recall, abs=1e-12)
    assert found.ndcg == pytest.approx(ndcg, abs=1e-12)
    first, _ = brute_force(queries.numpy(), arrays, "image", answers, mine, 1)
    assert found.recall[1] == pytest.approx(first)
    images = {"image": arrays["image"]}
    alone = brute_force(queries.numpy(), images, "image", answers, {}, 5)
    assert (found.pure_recall[5], found.pure_ndcg) == pytest.approx(alone)
    assert sum(found.shares.values()) == pytest.approx(1)
    scores = queries @ galleries["image"].T
    within = (scores > scores.gather(1, relevant["image"][:, None])).double().mean() * 25 / 24
    assert found.within == pytest.approx(float(within))
    answer = scores.gather(1, relevant["image"][:, None])
    texts = queries @ galleries["text"].T
    texts[torch.arange(40), own["text"]] = -torch.inf
    others = (texts > answer).sum(dim=1) / 39
    assert found.between == pytest.approx(float(others.double().mean()))
    spread = math.sqrt(recall * (1 - recall) / 39)
    assert found.recall[5].standard_error == pytest.approx(spread)


def test_the_error_of_recall_is_that_of_other_queries():
    generator, gallery = torch.Generator().manual_seed(0), {"image": torch.eye(60).double()}
    found = []
    for _ in range(300):
        noise = torch.randn(60, 60, generator=generator, dtype=torch.float64) - 0.3
        queries = gallery["image"] + 0.5 * noise
        relevant = {"image": torch.arange(60)}
        found.append(metrics.mixed_gallery(queries, gallery, relevant, ks=(1,)).recall[1])
    error = np.mean([recall.standard_error for recall in found])
    assert 0.2 < np.mean(found) < 0.8
    assert error == pytest.approx(np.std(found, ddof=1), rel=0.15)


def test_figures_are_averaged_over_splits(search):
    queries, galleries, relevant, _ = search
    halves = [
        metrics.mixed_gallery(
            queries[half], galleries, {name: rows[half] for name, rows in relevant.items()}
        )
        for half in (slice(None, 20), slice(20, None))
    ]
    found = metrics.over_splits(halves)
    values = [half.pure_recall[10] for half in halves]
    assert found.pure_recall[10] == pytest.approx(np.mean(values))
    error = found.pure_recall[10].standard_error
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(2))


def test_ties_count_for_the_relevant_row():
    gallery = {"image": torch.ones(4, 2)}
    found = metrics.mixed_gallery(torch.ones(1, 2), gallery, {"image": torch.tensor([3])}, ks=(1,))
    assert found.recall[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=torch.ones(3, 5)), "a row of text has 6 columns, a query 5"),
        (dict(relevant={"audio": torch.arange(40)}), r"`relevant` names \['audio'\] .*, expected"),
        (dict(relevant={}), r"`relevant` names \[\] and `own` \[\], expected galleries"),
        (dict(relevant={"image": torch.full((40,), 25)}), r"relevant\['image'\] must be \[40\]"),
        (dict(relevant={"image": torch.ones(40, dtype=torch.bool)}), "must be .* int64 numbers"),
        (dict(queries=torch.full((40, 6), 1e300, dtype=torch.float64) * 1e8), "overflow|NaN"),
        (dict(ks=1), "ks is 1, expected ascending"),
        (dict(block=0), "block is 0, expected a whole number"),
        (dict(relevant={"image": torch.full((40,), -1)}), r"relevant\['image'\] must be \[40\]"),
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
    numbers = {name: rows.numpy() for name, rows in relevant.items()}
    found = metrics.mixed_gallery(queries.numpy(), arrays, numbers)
    expected = metrics.mixed_gallery(queries, galleries, relevant)
    assert found.recall == expected.recall and found.ndcg == expected.ndcg
    lists = {name: rows.tolist() for name, rows in galleries.items()}
    with pytest.raises(TypeError, match=r"mixed_gallery, text: expected rows as .*, got list"):
        metrics.mixed_gallery(queries, lists, relevant)


def test_sides_that_are_no_pairs_are_refused():
    sides = {"text": torch.ones(5, 3), "image": torch.ones(4, 3)}
    with pytest.raises(ValueError, match=r"sides of \[5, 4\] rows .* one pair"):
        metrics.search_pairs(sides, lambda rows, role: None, roles=["text"])
    with pytest.raises(ValueError, match=r"and Tensor, expected .* a function"):
        metrics.search_pairs({"text": sides["text"]}, sides["text"], roles=["text"])
