"""Theorem B.14: what normalising does to a mean, to second order, and how far the rest goes."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.op_checks import random_rows

from realign_fast.frame import phantom_drift
from realign_fast.ops.reference import unit

MEAN = torch.tensor([0.9, -0.4, 0.7, 0.2]).double()
SPREAD = torch.tensor([1.0, 0.5, 0.2, 0.05]).double()


def design(skewed):
    """Points [n, 4] and weights [n] of noise with mean 0 and covariance diag(SPREAD^2)."""
    one = ((2.0, 1 / 3), (-1.0, 2 / 3)) if skewed else ((1.0, 0.5), (-1.0, 0.5))
    size = math.sqrt(sum(weight * value**2 for value, weight in one))
    corners = list(itertools.product(one, repeat=4))
    points = np.array([[value / size for value, _ in corner] for corner in corners])
    weights = np.array([math.prod(weight for _, weight in corner) for corner in corners])
    return torch.from_numpy(points) * SPREAD, torch.from_numpy(weights)


def drift(points, weights, size):
    return weights @ unit(MEAN + size * points) - unit(MEAN)


@pytest.mark.parametrize(("skewed", "order"), ((False, 4), (True, 3)))
def test_the_rest_falls_with_the_order_that_symmetry_gives(skewed, order):
    """Exact expectations over a finite design, so that the order is not drowned in sampling."""
    points, weights = design(skewed)
    torch.testing.assert_close(weights @ points, torch.zeros(4).double())
    covariance = points.T @ (weights[:, None] * points)
    torch.testing.assert_close(covariance, SPREAD.square().diag())
    rest = []
    for size in (0.02, 0.01, 0.005):
        predicted = phantom_drift(MEAN, size**2 * covariance)
        rest.append(float((drift(points, weights, size) - predicted).norm()))
        assert rest[-1] < 0.2 * float(predicted.norm())
    assert rest[0] / rest[1] == pytest.approx(2**order, rel=0.08)
    assert rest[1] / rest[2] == pytest.approx(2**order, rel=0.04)


def test_against_monte_carlo_of_gaussian_noise():
    """Antithetic pairs take the first-order noise away; what is left shrinks as 1/sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * SPREAD * torch.randn(200_000, 4, generator=generator).double()
    pairs = (unit(MEAN + noise) + unit(MEAN - noise)) / 2 - unit(MEAN)
    error = pairs.std(dim=0) / math.sqrt(len(pairs))
    predicted = phantom_drift(MEAN, (0.05 * SPREAD).square().diag())
    remainder = float((0.05 * SPREAD).square().sum()) ** 2 * 3  # fourth order
    assert ((pairs.mean(dim=0) - predicted).abs() < 5 * error + remainder).all()
    assert float(predicted.norm()) > 30 * float(error.norm()), "the check could not fail"


@pytest.mark.parametrize("t", (0.2, 0.1, 0.05))
def test_two_dimensions(t):
    """``mu = (1, 0)``, ``e = (0, +-t)``: the centroid is ``1 / sqrt(1 + t^2) = 1 - t^2 / 2 ...``"""
    predicted = phantom_drift(torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([0.0, t * t])))
    torch.testing.assert_close(predicted, torch.tensor([-t * t / 2, 0.0]).double())
    assert abs(float(predicted[0]) - (1 / math.sqrt(1 + t * t) - 1)) < 3 / 8 * t**4


def test_the_tangential_part_is_zero_iff_isotropic():
    for seed in range(5):
        mean = random_rows(1, 6, seed=seed)[0]
        along = unit(mean)

        def tangential(covariance, mean=mean, along=along):
            d = phantom_drift(mean, covariance)
            return float((d - along * (along @ d)).norm()) / float(d.norm())

        assert tangential(0.3 * torch.eye(6)) < 1e-14
        assert tangential(torch.diag(torch.arange(1.0, 7))) > 0.01
        stretched = torch.eye(6).double() + 5 * torch.outer(along, along)
        assert tangential(stretched) < 1e-14, "a stretch along the mean itself does not turn it"
    isotropic = phantom_drift(2 * along, 0.3 * torch.eye(6).double())
    # -(1/4) (.3 + .3 * 6 / 2 - 3/2 * .3) = -(1/4) * .75
    torch.testing.assert_close(isotropic, -0.1875 * along)


def test_it_turns_with_the_space_and_does_not_know_the_unit_of_length():
    rows = random_rows(7, 4)
    covariance = rows.T @ rows / 7
    turn, _ = torch.linalg.qr(random_rows(4, 4, seed=1))
    one = phantom_drift(MEAN, covariance)
    torch.testing.assert_close(phantom_drift(MEAN @ turn, turn.T @ covariance @ turn), one @ turn)
    torch.testing.assert_close(phantom_drift(10 * MEAN, 100 * covariance), one)
    torch.testing.assert_close(phantom_drift(MEAN, 3 * covariance), 3 * one)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected mean \[D\] and covariance \[D, D\], got \[4\]"):
        phantom_drift(MEAN, torch.eye(3))
    with pytest.raises(ValueError, match="the mean is 0"):
        phantom_drift(torch.zeros(3), torch.eye(3))
