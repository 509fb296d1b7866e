"""Metrics from moments: distances of distributions, spectra; values, theorems, standard errors."""

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import exact, random_rows

from realign_fast import Moments, metrics


def measured(rows, **flags):
    return Moments(covariance=True, **flags).update(rows)


def two_sides(count=300, columns=8, seed=0):
    """Source and target rows with different means and spectra, float64."""
    source = random_rows(count, columns, seed=seed) * torch.linspace(0.3, 2, columns).double()
    target = random_rows(count + 37, columns, seed=seed + 1000)
    target[:, 0] += 2
    return source, target


def rotation(columns, seed=3):
    matrix, _ = torch.linalg.qr(random_rows(columns, columns, seed=seed))
    return matrix


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def test_distances_against_two_pass_formulas():
    source, target = two_sides()
    y, x = (oracle.stats(oracle.unit(exact(rows))) for rows in (source, target))
    y, x = (one._replace(covariance=np.float64(one.covariance)) for one in (y, x))
    a, b = measured(source), measured(target)
    assert metrics.centroid_gap(a, b) == pytest.approx(float(np.linalg.norm(x.mean - y.mean)))
    assert metrics.trace_ratio(a, b) == pytest.approx(float(y.trace / x.trace))
    apart = np.linalg.norm(x.covariance - y.covariance) / np.linalg.norm(x.covariance)
    assert metrics.covariance_distance(a, b) == pytest.approx(apart)
    for correction, options in ((1, {}), (0, {"correction": 0})):  # numpy.cov and FID divide by n-1
        s_x, s_y = (
            np.cov(oracle.unit(exact(rows)).astype(float).T, ddof=correction)
            for rows in (target, source)
        )
        middle = root(root(s_x) @ s_y @ root(s_x))
        frechet = ((x.mean - y.mean) ** 2).sum() + np.trace(s_x + s_y - 2 * middle)
        expected = pytest.approx(float(frechet), rel=1e-10)
        assert metrics.frechet_distance(a, b, **options) == expected
        assert metrics.frechet_distance(b, a, **options) == expected
    with pytest.raises(ValueError, match="1 rows leave nothing to divide by with correction=1"):
        metrics.frechet_distance(measured(source[:1]), b)


def test_frechet_of_commuting_covariances_is_a_distance_of_standard_deviations():
    """Down to variances of 1e-14, where a root of a product of covariances has no digits left."""
    small = torch.tensor([1.0, 1e-3, 1e-7]).double()
    points = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    a = measured(points * small, normalize=False)
    b = measured(points * small * torch.tensor([1, 1, 3]), normalize=False)
    assert metrics.frechet_distance(a, b) == pytest.approx((2e-7) ** 2 / 2.5, rel=1e-6)
    c = measured(points * small + 2, normalize=False)
    assert metrics.frechet_distance(a, c) == pytest.approx(12, rel=1e-12)


def test_a_corpus_has_no_distance_from_itself():
    a = measured(two_sides()[0])
    assert metrics.centroid_gap(a, a) == metrics.covariance_distance(a, a) == 0
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-28)
    assert metrics.trace_ratio(a, a) == 1


def spread_and_error(measure, repeats):
    """Spread of a figure over independent samples, and the mean of its own standard errors."""
    estimates = [measure(seed) for seed in range(repeats)]
    assert all(type(one) is metrics.Estimate for one in estimates)
    return np.std(estimates, ddof=1), np.mean([one.standard_error for one in estimates])


def test_the_standard_error_of_the_gap_is_that_of_repeated_sampling():
    def measure(seed):
        return metrics.centroid_gap(*map(measured, two_sides(400, seed=seed)))

    spread, error = spread_and_error(measure, 300)
    assert error == pytest.approx(spread, rel=0.15)


def test_a_standard_error_that_is_not_known_is_nan():
    source, target = two_sides()
    plain = [Moments().update(rows) for rows in (source, target)]
    raw = [measured(rows, normalize=False) for rows in (source, target)]
    assert math.isnan(metrics.centroid_gap(*plain).standard_error)
    assert not math.isnan(metrics.centroid_gap(*raw).standard_error)


def test_two_samples_of_one_distribution_keep_the_sampling_gap():
    gaps = []
    for seed in range(200):
        rows = random_rows(300, 5, seed=seed)
        a, b = Moments().update(rows[:100]), Moments().update(rows[100:])
        gaps.append((metrics.centroid_gap(a, b), metrics.sampling_gap(b.trace, 100, 200)))
    observed, expected = np.square(gaps).mean(axis=0)
    assert observed == pytest.approx(expected, rel=0.15)


def test_an_estimate_is_a_float_with_an_error():
    values = random_rows(50, 1)[:, 0]
    one = metrics.Estimate.of_mean(values)
    assert one == pytest.approx(float(values.mean()))
    assert one.standard_error == pytest.approx(np.std(values.numpy(), ddof=1) / math.sqrt(50))
    assert json.dumps(metrics.Estimate(0.5, 0.1)) == "0.5"
    assert f"{metrics.Estimate(0.5, 0.1):.3f}" == "0.500"
    assert type(one + 1) is float
    again = pickle.loads(pickle.dumps(one))
    assert (again, again.standard_error) == (one, one.standard_error)
    assert repr(metrics.Estimate(0.5, 0.125)) == "0.5 ± 0.12"
    assert repr(metrics.Estimate(0.5)) == "0.5", "an unknown error is not printed"
    assert math.isnan(metrics.Estimate.of_mean(values[:1]).standard_error)


def test_the_effective_rank_of_known_spectra():
    for equal in (1, 3, 7):
        values = torch.zeros(7).double()
        values[:equal] = 0.25
        assert metrics.effective_rank(values) == pytest.approx(equal)
    values = random_rows(40, 1, seed=2)[:, 0].abs().sort(descending=True).values
    p = values.numpy() / values.numpy().sum()
    assert metrics.effective_rank(values) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    for scale in (1e-6, 1e6):
        assert metrics.effective_rank(values * scale) == pytest.approx(
            metrics.effective_rank(values)
        )


def test_figures_of_known_spectra():
    ranks = torch.arange(1, 41).double()
    assert metrics.participation_ratio(torch.ones(7)) == pytest.approx(7)
    assert metrics.participation_ratio(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)
    assert metrics.anisotropy(torch.ones(7)) == pytest.approx(1)
    assert metrics.anisotropy(torch.tensor([3.0, 1.0, 0.0, 0.0])) == pytest.approx(3)
    for alpha in (0.5, 1.5):
        values = 7 * ranks**-alpha
        assert metrics.power_law_exponent(values) == pytest.approx(alpha)
        values[20:] = 0
        assert metrics.power_law_exponent(values) == pytest.approx(alpha), "the first half"
    noisy = (values[:20] * random_rows(20, 1, seed=3)[:, 0].exp()).sort(descending=True).values
    slope = np.polyfit(ranks[:10].log(), noisy[:10].log(), 1)[0]
    assert metrics.power_law_exponent(noisy) == pytest.approx(-slope)
    assert math.isnan(metrics.power_law_exponent(torch.ones(4)))
    a, b = (random_rows(9, 1, seed=seed)[:, 0].abs().sort().values.flip(0) for seed in (4, 5))
    expected = np.corrcoef(a.log(), b.log())[0, 1]
    assert metrics.log_spectrum_correlation(a, b) == pytest.approx(expected)
    cut = b.clone()
    cut[7:] = 1e-12 * b[0]
    expected = np.corrcoef(a[:7].log(), b[:7].log())[0, 1]
    assert metrics.log_spectrum_correlation(a, cut) == pytest.approx(expected), "rounding counts"
    assert math.isnan(metrics.log_spectrum_correlation(a[:2], b[:2]))


def test_subspace_overlap_of_random_subspaces_is_chance():
    eye = torch.eye(6).double()
    assert metrics.subspace_overlap(eye, eye[:, [1, 0, 2, 3, 4, 5]], 2) == 1
    assert metrics.subspace_overlap(eye, eye.flip(1), 3) == 0
    chance = torch.Generator().manual_seed(0)
    drawn = (torch.randn(60, 60, generator=chance).double() for _ in range(40))
    turns = [torch.linalg.qr(rows)[0] for rows in drawn]
    found = [metrics.subspace_overlap(*two, 6) for two in itertools.pairwise(turns)]
    assert np.mean(found) == pytest.approx(6 / 60, rel=0.1)


def test_the_spectrum_is_that_of_the_rows():
    rows = random_rows(200, 6)
    values, vectors = metrics.spectrum_of(measured(rows))
    u = oracle.unit(rows.numpy())
    singular = np.linalg.svd(u - u.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(values, singular**2 / 200, rtol=1e-10)
    covariance = measured(rows).covariance
    np.testing.assert_allclose(covariance @ vectors, vectors * values, atol=1e-14)
    assert (values.diff() <= 0).all()


def test_what_does_not_fit_is_refused():
    a, b = measured(random_rows(9, 3)), measured(random_rows(9, 4))
    for name in ("centroid_gap", "trace_ratio", "covariance_distance", "frechet_distance"):
        with pytest.raises(ValueError, match=f"{name}: the source has 3 columns, the target"):
            getattr(metrics, name)(a, b)
    with pytest.raises(ValueError, match="covariance was not asked for"):
        metrics.frechet_distance(Moments().update(random_rows(9, 3)), a)
    for values in (torch.eye(2), torch.tensor([1.0, -1e-3]), torch.ones(0)):
        with pytest.raises(ValueError, match="effective_rank: expected eigenvalues"):
            metrics.effective_rank(values)
    assert math.isnan(metrics.effective_rank(torch.zeros(3)))
    assert math.isnan(metrics.trace_ratio(b, measured(torch.eye(4)[:1])))
