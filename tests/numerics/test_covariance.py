"""Moments(covariance=True): torch.cov's weights, accuracy on hard cases, merging, order."""

import math

import numpy as np
import pytest
import torch
from support.op_checks import DTYPES, random_rows

from realign_fast import Moments
from realign_fast.covariance_sums import _far, _holds_a_far_row


def spread_rows(count, columns, condition, mean, normalize, seed=0):
    """float32 rows with |mean| and a covariance of that condition; NUMERICS' hard case."""
    generator = torch.Generator().manual_seed(seed)
    kind = dict(generator=generator, dtype=torch.float64)
    values = torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(columns, columns, **kind))[0]
    centre = torch.nn.functional.normalize(torch.randn(columns, **kind), dim=0) * mean
    if normalize:
        values *= (1 - mean**2) / values.sum()
    rows = torch.randn(count, columns, **kind) * values.sqrt() @ axes.T + centre
    return (torch.nn.functional.normalize(rows, dim=1) if normalize else rows).float()


def covariance(rows, normalize):
    """Two passes in float64, the mean refined once."""
    rows = rows.double()
    if normalize:
        rows = rows / rows.norm(dim=1, keepdim=True)
    mean = rows.mean(dim=0)
    rows = rows - mean - (rows - mean).mean(dim=0)
    return rows.T @ rows / len(rows)


def whitening_residual(estimate, truth):
    """``|L^-1 C L^-T - I|_2`` with ``L L^T`` the estimate."""
    factor = torch.linalg.cholesky(estimate)
    half = torch.linalg.solve_triangular(factor, truth, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return float(torch.linalg.matrix_norm(whole - torch.eye(len(truth)).double(), 2))


@pytest.mark.parametrize("accurate", (False, True))
@pytest.mark.parametrize(("normalize", "mean"), ((True, 0.8), (False, 204.0)))
def test_accuracy_where_others_lose_the_small_directions(normalize, mean, accurate):
    """A sixth of the benchmark's rows and columns; it shows the peers' errors beside ours."""
    rows = spread_rows(50_000, 128, 1e5, mean, normalize)
    truth = covariance(rows, normalize)
    moments = Moments(covariance=True, normalize=normalize, accurate=accurate)
    for batch in rows.split(7000):
        moments.update(batch)
    ours = moments.covariance
    assert float((ours - truth).norm() / truth.norm()) <= (1e-13 if accurate else 3e-8)
    assert whitening_residual(ours, truth) <= (1e-8 if accurate else 1e-3)
    least, expected = (torch.linalg.eigvalsh(s)[0] for s in (ours, truth))
    assert abs(float(least / expected) - 1) <= 0.01
    assert torch.equal(ours, ours.T)


@pytest.mark.parametrize("correction", (0, 1, 2))
@pytest.mark.parametrize("which", ("none", "f", "a", "f and a"))
def test_weights_and_correction_are_those_of_torch_cov(which, correction):
    rows = random_rows(400, 9)
    generator = torch.Generator().manual_seed(1)
    fweights = torch.randint(0, 4, (400,), generator=generator) if "f" in which else None
    aweights = torch.rand(400, generator=generator).double() if "a" in which[-1] else None
    weights = {"fweights": fweights, "aweights": aweights}
    moments, halves = (Moments(covariance=True, normalize=False) for _ in range(2))
    moments.update(rows, **weights)
    for part in (slice(150), slice(150, None)):
        part_weights = {k: None if w is None else w[part] for k, w in weights.items()}
        other = Moments(covariance=True, normalize=False).update(rows[part], **part_weights)
        halves.merge(other)
    expected = torch.cov(rows.T, correction=correction, **weights)
    for one in (moments, halves):
        torch.testing.assert_close(one.cov(correction), expected, rtol=1e-12, atol=1e-13)
    if fweights is not None:
        assert moments.count == int(fweights.sum())
        repeated = rows.repeat_interleave(fweights, dim=0)
        again = None if aweights is None else aweights.repeat_interleave(fweights)
        as_rows = Moments(covariance=True, normalize=False).update(repeated, aweights=again)
        torch.testing.assert_close(as_rows.mean, moments.mean, rtol=1e-12, atol=1e-13)
    average = torch.as_tensor(
        np.average(rows.numpy(), axis=0, weights=_product(fweights, aweights))
    )
    torch.testing.assert_close(moments.mean, average, rtol=1e-12, atol=1e-13)


def _product(*weights):
    given = [w.double().numpy() for w in weights if w is not None]
    return np.prod(given, axis=0) if given else None


def test_bad_rows_take_their_weight_with_them():
    rows, weights = random_rows(50, 5), torch.arange(50)
    rows[3], rows[7, 2] = 0, torch.nan
    good = torch.ones(50, dtype=torch.bool)
    good[7] = False
    kept = Moments(covariance=True).update(
        rows, fweights=weights, aweights=weights / 50, bad_rows="keep"
    )
    expected = Moments(covariance=True).update(
        rows[good], fweights=weights[good], aweights=weights[good] / 50, bad_rows="keep"
    )
    torch.testing.assert_close(kept.cov(), expected.cov(), rtol=1e-13, atol=1e-15)
    assert (kept.count, kept.zero_rows, kept.nonfinite_rows) == (int(weights.sum()) - 7, 3, 7)
    good[3] = False
    skipped = Moments(covariance=True).update(rows, fweights=weights, bad_rows="skip")
    expected = Moments(covariance=True).update(rows[good], fweights=weights[good])
    torch.testing.assert_close(skipped.cov(), expected.cov(), rtol=1e-13, atol=1e-15)
    assert skipped.count == int(weights[good].sum())


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ({"fweights": torch.ones(9).long()}, ValueError, r"fweights have shape \[9\], the rows"),
        ({"fweights": torch.ones(10)}, TypeError, "expected whole numbers as fweights"),
        ({"fweights": -torch.ones(10).long()}, ValueError, "negative or not finite"),
        ({"aweights": torch.full((10,), torch.inf)}, ValueError, "negative or not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, error, words):
    moments = Moments(covariance=True)
    with pytest.raises(error, match=words):
        moments.update(random_rows(10, 4), **weights)
    assert moments.count == 0
    with pytest.raises(ValueError, match=r"need Moments\(covariance=True\)"):
        Moments().update(random_rows(10, 4), aweights=torch.ones(10))
    with pytest.raises(ValueError, match="1 rows leave nothing to divide by with correction=1"):
        Moments(covariance=True).update(random_rows(1, 4)).cov()


def test_a_weight_of_nothing_has_no_mean():
    moments = Moments(covariance=True).update(random_rows(4, 3), aweights=torch.zeros(4))
    with pytest.raises(ValueError, match="sum of the weights is 0"):
        _ = moments.mean


def test_counts_go_past_32_bits():
    rows = random_rows(6, 4)
    weights = torch.tensor([2**33, 1, 5, 2**34, 0, 7])
    moments = Moments(covariance=True, normalize=False).update(rows, fweights=weights)
    assert moments.count == int(weights.sum()) > 2**34
    expected = torch.cov(rows.T, fweights=weights)
    torch.testing.assert_close(moments.cov(), expected, rtol=1e-12, atol=1e-13)


def test_counts_that_float64_does_not_hold_are_refused_and_change_nothing(tmp_path):
    rows, most = random_rows(4, 4), Moments(covariance=True)
    most.update(rows[:1], fweights=torch.tensor([2**53]))
    assert most.count == 2**53
    before, covariance = most.counts.tolist(), most.covariance
    for frequencies in ([2**53, 1000], [2**62 + 5] * 4):  # the latter are above 0 after a wrap
        weights = torch.tensor(frequencies)
        with pytest.raises(ValueError, match=r"fweights of more than 2\^53 rows"):
            most.update(rows[: len(weights)], fweights=weights)
    assert most.counts.tolist() == before and torch.equal(most.covariance, covariance)
    most.counts[0] = -5  # as a merge of version 0.1.0 could leave it
    most.save(tmp_path / "wrapped.safetensors")
    with pytest.raises(ValueError, match=r"wrapped\.safetensors: .*a negative number of rows"):
        Moments.load(tmp_path / "wrapped.safetensors")


def test_shards_with_far_means_merge_in_any_order():
    """The centres differ by 1000 times the spread: moving them must not cost the covariance."""
    parts = [random_rows(500, 6, seed=k) + 300 * k for k in range(4)]
    whole = torch.cat(parts)
    expected = covariance(whole, False)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged = Moments(covariance=True, normalize=False)
        for k in order:
            merged.merge(Moments(covariance=True, normalize=False).update(parts[k]))
        error = (merged.covariance - expected).norm() / expected.norm()
        assert float(error) <= 1e-13
        least = torch.linalg.eigvalsh(merged.covariance)[0] / torch.linalg.eigvalsh(expected)[0]
        assert float(least) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_of_whole_blocks_give_the_bytes_of_one_update(dtype):
    """The kernel's blocks are of 1024 rows, so batches of a multiple change nothing."""
    rows = random_rows(9000, 20, dtype)
    whole = Moments(covariance=True).update(rows)
    batches = Moments(covariance=True)
    for batch in rows.split(2048):
        batches.update(batch)
    assert torch.equal(whole.covariance, batches.covariance)
    assert torch.equal(whole.mean, batches.mean)


def test_rows_before_the_first_finite_one():
    rows = random_rows(3000, 5)
    rows[:1500] = torch.nan
    moments = Moments(covariance=True).update(rows[:1200], bad_rows="keep")
    assert (moments.count, moments.nonfinite_rows, moments.dimension) == (0, 1200, 5)
    moments.update(rows[1200:], bad_rows="keep")
    torch.testing.assert_close(
        moments.covariance, covariance(rows[1500:], True), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("cut", (1200, 500, 37))
@pytest.mark.parametrize(
    "outliers", (slice(5, 6), slice(1190, 1191), slice(60), slice(0, 1200, 50))
)
@pytest.mark.parametrize(("far", "dtype"), ((1e4, torch.bfloat16), (1e6, torch.float32)))
def test_far_rows_cost_the_others_no_digits(far, outliers, cut, dtype):
    """The variance across the far rows is that of the others, whatever the cut of the batches."""
    rows, direction = random_rows(1200, 8, seed=1), torch.linspace(0.7, 1.3, 8).double()
    rows[outliers] = far * direction
    rows = rows.to(dtype)
    across = torch.zeros(8, dtype=torch.float64)
    far_row = rows[outliers][0].double()
    across[0], across[1] = far_row[1], -far_row[0]
    across /= across.norm()
    moments = Moments(covariance=True, normalize=False)
    for batch in rows.split(cut):
        moments.update(batch)
    expected = covariance(rows, False)
    found, truth = (float(across @ s @ across) for s in (moments.covariance, expected))
    assert found == pytest.approx(truth, rel=1e-5, abs=1e-14 * float(expected.abs().max()))


@pytest.mark.parametrize("off", (10.0, 1e3, 1e5))
@pytest.mark.parametrize("batches", ((1, 4000), (1, 1, 3999), (2000, 2001)))
def test_a_first_row_far_from_the_rest_costs_no_digits(off, batches):
    """The centre is the mean of the first batch; what lies far from it gets one of its own."""
    rows = random_rows(4001, 16).float()
    rows[0] = off
    moments = Moments(covariance=True, normalize=False)
    for batch in rows.split(batches):
        moments.update(batch)
    expected = covariance(rows, False)
    error = (moments.covariance - expected).abs().max() / expected.abs().max()
    assert float(error) <= 2e-7
    if batches[0] == 1:
        least, truth = (torch.linalg.eigvalsh(s)[0] for s in (moments.covariance, expected))
        assert float(least) == pytest.approx(float(truth), rel=1e-4)


def test_clusters_far_apart_keep_their_small_spread():
    centres = torch.nn.functional.normalize(random_rows(2, 64), dim=1)
    rows = torch.cat([centres[:1], centres[1] + 1e-3 * (random_rows(20_000, 64, seed=3) - 0.3)])
    rows = rows.float()
    moments = Moments(covariance=True).update(rows[:1]).update(rows[1:])
    expected = covariance(rows, True)
    for ours, truth in zip(
        torch.linalg.eigvalsh(moments.covariance), torch.linalg.eigvalsh(expected), strict=True
    ):
        assert float(ours) == pytest.approx(float(truth), rel=1e-2, abs=1e-12)


def test_weights_that_no_float_can_carry_are_refused():
    for size in (1e-200, 1e37):
        with pytest.raises(ValueError, match=r"within 1e-20\.\.1e20"):
            Moments(covariance=True).update(
                random_rows(5, 3), aweights=torch.full((5,), size, dtype=torch.float64)
            )
    as_list = Moments(covariance=True).update(random_rows(5, 3), aweights=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert float(as_list.scatter.weights[0]) == 15


def test_arrays_are_rows_and_lists_are_named():
    rows = random_rows(3, 4)
    assert Moments().update(rows.numpy()).mean.equal(Moments().update(rows).mean)
    with pytest.raises(
        TypeError, match=r"expected rows as a tensor of floating-point numbers, got list"
    ):
        Moments().update(rows.tolist())
    with pytest.raises(ValueError, match=r"got shape \[3, 0\]"):
        Moments().update(torch.zeros(3, 0))


def test_rows_through_a_function_are_taken_as_they_come():
    rows = random_rows(50, 4)
    moments = Moments(covariance=True).update(rows, through=lambda batch: 3 * batch)
    torch.testing.assert_close(moments.mean, 3 * rows.mean(dim=0))
    torch.testing.assert_close(moments.covariance, 9 * covariance(rows, False))
    assert moments.energy == pytest.approx(9 * float(rows.square().sum(dim=1).mean()))


def test_a_narrow_cone_keeps_its_small_spread_beside_a_row_at_60_degrees():
    """A mean off the centre by 1 is far for rows that spread by 1e-3, and not for random ones."""
    rows = 1e-3 * random_rows(8000, 16, seed=5)
    rows[:, :2] += torch.tensor([0.5, 0.75**0.5])
    first = torch.nn.functional.one_hot(torch.tensor([0]), 16).float()
    rows = torch.cat([first, rows.float()])
    moments = Moments(covariance=True).update(rows[:1]).update(rows[1:])
    across = torch.zeros(16, dtype=torch.float64)
    across[:2] = torch.tensor([0.75**0.5, 0.5])  # no part of the distance of the two
    found, truth = (
        float(across @ s @ across) for s in (moments.covariance, covariance(rows, True))
    )
    assert found == pytest.approx(truth, rel=1e-5)


def test_what_is_far_is_known():
    """A block about another mean, and one that holds a row 40 times as far out as half of them."""
    mean = torch.tensor([0.6, 0.0], dtype=torch.float64)
    assert not _far(mean, mean, 0.64) and not _far(mean, 0.5 * mean, 0.64)
    assert _far(mean, -mean, 0.64) and not _far(mean, -mean, 1.45)
    rows = random_rows(1000, 16).float()
    assert not _holds_a_far_row(rows)
    for place in (0, 3, 999):
        far = rows.clone()
        far[place] = 50.0  # of norm 200; half of the rows lie within 4 of the median
        assert _holds_a_far_row(far)
