"""Metrics from rows: cosines, neighbours, retrieval; against brute force, for any block."""

import math

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import random_rows

from realign_fast import metrics

BLOCKS = (1, 7, 64, 4096)


def two_modalities(count=120, columns=6, seed=0):
    """Matched rows that differ by an offset and noise, float64."""
    a = random_rows(count, columns, seed=seed)
    b = a + 0.4 * random_rows(count, columns, seed=seed + 500)
    b[:, 0] += 1
    return a, b


def cosines(a, b):
    return oracle.unit(a.numpy()) @ oracle.unit(b.numpy()).T


def nearest(a, b, k, own=False):
    """Brute force: indices of the k largest cosines, a row of its own left out."""
    table = cosines(a, b)
    if own:
        np.fill_diagonal(table, -np.inf)
    return np.argsort(-table, axis=1)[:, :k]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_mean_of_cosines(block):
    a, b = two_modalities()
    matched = np.diag(cosines(a, b))
    phi = metrics.mean_cosine(a, b, block)
    assert phi == pytest.approx(matched.mean())
    assert phi.standard_error == pytest.approx(matched.std(ddof=1) / math.sqrt(120))


def test_its_standard_error_is_that_of_repeated_sampling():
    found = [metrics.mean_cosine(*two_modalities(80, seed=seed)) for seed in range(250)]
    error = np.mean([one.standard_error for one in found])
    assert error == pytest.approx(np.std(found, ddof=1), rel=0.2)


def test_pairs_are_of_different_rows_all_alike_and_drawn_by_the_seed():
    angles = torch.tensor([0, 1, 2, 4, 8, 16]).double() * 0.1  # every pair has its own angle
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    drawn = metrics.pairwise_cosines(rows, 60_000).acos() / 0.1
    found, counts = np.unique(drawn.round().int(), return_counts=True)
    assert set(found) == {1, 2, 4, 8, 16, 3, 7, 15, 6, 14, 12}
    alone = counts[np.isin(found, [1, 2, 4, 8, 16, 3, 7, 15, 6, 14, 12])] / 4000
    # 15 unordered pairs, 4000 draws each in the mean; four angles belong to two pairs.
    assert alone == pytest.approx(np.round(alone), abs=0.08) and alone.sum() == 15
    again = metrics.pairwise_cosines(rows, 1000, seed=4, block=9)
    assert torch.equal(again, metrics.pairwise_cosines(rows, 1000, seed=4))
    assert not torch.equal(again, metrics.pairwise_cosines(rows, 1000, seed=5))


def test_cosine_divergence_is_jensen_shannon_of_the_histograms():
    a, b = two_modalities()
    value = metrics.cosine_divergence(a, b, pairs=5000, bins=40, seed=3)
    p, q = (
        np.histogram(metrics.pairwise_cosines(rows, 5000, 3), 40, (-1, 1))[0] / 5000
        for rows in (a, b)
    )
    m = (p + q) / 2

    def kl(p):
        return sum(x * math.log(x / y) for x, y in zip(p, m, strict=True) if x)

    assert value == pytest.approx((kl(p) + kl(q)) / 2, rel=1e-10)
    assert metrics.cosine_divergence(a, a.clone()) == 0
    parallel, crossed = torch.ones(9, 4), torch.cat([torch.eye(4), -torch.eye(4)])
    apart = metrics.cosine_divergence(parallel, crossed)
    assert apart == pytest.approx(math.log(2)), "densities that share no bin"


@pytest.mark.parametrize("block", [2048, 7, 1])
def test_cosine_correlation_is_that_of_all_pairs(block):
    a, _ = two_modalities()
    b = torch.cat([a + 0.5 * random_rows(*a.shape, seed=8), a[:, :2] + 3], dim=1)
    i, j = np.triu_indices(len(a), 1)
    cosines = ((oracle.unit(rows.numpy()) @ oracle.unit(rows.numpy()).T)[i, j] for rows in (a, b))
    expected = np.corrcoef(*cosines)[0, 1]
    assert metrics.cosine_correlation(a, b, block) == pytest.approx(expected, rel=1e-10)
    turn, _ = torch.linalg.qr(random_rows(a.shape[1], a.shape[1], seed=9))
    wider = torch.cat([a @ turn, torch.zeros(len(a), 3).double()], dim=1)
    assert metrics.cosine_correlation(a, 5 * wider, block) == pytest.approx(1)


@pytest.mark.parametrize("block", BLOCKS[1:])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_nearest_rows_against_brute_force(dtype, block):
    a, b = (rows.to(dtype) for rows in two_modalities())
    for k in (1, 10, 119):
        found = metrics.nearest_rows(a, b, k, block=block)
        np.testing.assert_array_equal(found.indices, nearest(a.double(), b.double(), k))
        truth = np.take_along_axis(cosines(a.double(), b.double()), found.indices.numpy(), 1)
        np.testing.assert_allclose(found.cosines, truth, atol=1e-6)
        own = metrics.nearest_rows(a, a, k, own=0, block=block).indices
        np.testing.assert_array_equal(own, nearest(a.double(), a.double(), k, own=True))
    some = metrics.nearest_rows(a[30:50], a, 5, own=30, block=block).indices
    np.testing.assert_array_equal(some, nearest(a.double(), a.double(), 5, own=True)[30:50])


def test_a_row_is_no_neighbour_of_itself_even_among_copies():
    rows = torch.ones(12, 3).float()
    found = metrics.nearest_rows(rows, rows, 5, own=0).indices
    assert found.shape == (12, 5)
    assert (found != torch.arange(12)[:, None]).all()
    assert all(len(set(row)) == 5 for row in found.tolist())


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_mixing_and_overlap_against_brute_force(block):
    a, b = two_modalities()
    b = b[:77]
    union = torch.cat([a, b])
    table = cosines(a, union)
    np.fill_diagonal(table, -np.inf)
    shares = (np.argsort(-table, axis=1)[:, :20] >= 120).mean(axis=1)
    mixing = metrics.knn_mixing(a, b, block=block)
    assert mixing == pytest.approx(shares.mean(), abs=1e-12) and 0.1 < mixing < 0.7
    assert mixing.standard_error == pytest.approx(shares.std(ddof=1) / math.sqrt(120))
    one, two = nearest(a[:77], a[:77], 10, own=True), nearest(b, b, 10, own=True)
    shares = np.array([len(set(p) & set(q)) / 10 for p, q in zip(one, two, strict=True)])
    overlap = metrics.knn_overlap(a[:77], b, block=block)
    assert overlap == pytest.approx(shares.mean(), abs=1e-12)
    assert overlap.standard_error == pytest.approx(shares.std(ddof=1) / math.sqrt(77))


def test_mixing_is_chance_for_one_distribution_and_zero_for_two_cones():
    a, b = random_rows(500, 5), random_rows(300, 5, seed=1)
    for one, two in ((a, b), (b, a)):
        mixing = metrics.knn_mixing(one, two)
        assert mixing == pytest.approx(len(two) / 799, abs=6 * mixing.standard_error)
    # Identical corpora: the twin is always near, the 19 others are from either side alike.
    assert metrics.knn_mixing(a, a.clone()) == pytest.approx(10.5 / 20, abs=0.03)
    cone_a, cone_b = (rows + 100 * torch.eye(5)[axis] for axis, rows in enumerate((a, b)))
    assert metrics.knn_mixing(cone_a, cone_b) == 0
    assert metrics.knn_mixing(a[:5], b, k=304) == pytest.approx(300 / 304)


def test_overlap_is_one_for_a_copy_and_chance_for_strangers():
    a, b = random_rows(400, 5), random_rows(400, 5, seed=1)
    assert metrics.knn_overlap(a, 3 * a.flip(1)) == 1
    overlap = metrics.knn_overlap(a, b)
    assert overlap == pytest.approx(10 / 399, abs=5 * overlap.standard_error)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: metrics.mean_cosine(a, a[:5]), r"mean_cosine: expected rows that match"),
        (lambda a: metrics.knn_overlap(a, a, 9), r"k is 9, expected 1\.\.8"),
        (lambda a: metrics.knn_mixing(a, a, 18), "got k = 18 with 9 and 9 rows"),
        (lambda a: metrics.nearest_rows(a, a[:, :2], 1), "query has 3 columns, a row"),
        (lambda a: metrics.nearest_rows(a, a / 0, 1), "holds a NaN"),
        (lambda a: metrics.pairwise_cosines(a[:1]), "expected 2 or more rows"),
        (lambda a: metrics.mean_cosine(a, torch.full_like(a, torch.nan)), "row 0 holds a NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(random_rows(9, 3))
