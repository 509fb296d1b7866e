"""The field's own implementations against ours, at 1e-8 in float64."""

import numpy as np
import pytest
import torch

from realign_fast import Moments
from realign_fast.whiten import (
    bures_distance,
    inverse_root,
    optimal_transport,
    shrink,
    shrinkage,
    symmetric_root,
)


@pytest.fixture
def ot():
    return pytest.importorskip("ot", reason="POT, the peer for optimal transport, is not here")


@pytest.fixture
def erasure():
    return pytest.importorskip(
        "concept_erasure.optimal_transport",
        reason="concept-erasure, the peer for roots and transport, is not here",
    )


@pytest.fixture
def sklearn_covariance():
    return pytest.importorskip(
        "sklearn.covariance", reason="scikit-learn, the peer for shrinkage, is not here"
    )


def correlated_rows(count, columns, seed):
    """Rows with a mean and covariance of their own, condition about 1e3."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mix = torch.linalg.qr(mix).Q * torch.logspace(0, -1.5, columns)
    return torch.randn(count, columns, generator=generator, dtype=torch.float64) @ mix.T + 0.5


def raw_moments(rows):
    return Moments(covariance=True, normalize=False).update(rows)


@pytest.fixture
def source():
    return correlated_rows(400, 12, seed=1)


@pytest.fixture
def target():
    return correlated_rows(300, 12, seed=2)


@pytest.fixture
def covariances(source, target):
    return raw_moments(source).covariance, raw_moments(target).covariance


def close(ours, theirs, error=1e-8):
    ours, theirs = (np.asarray(value, dtype=np.float64) for value in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= error * np.linalg.norm(theirs)


def test_transport_map_and_distance_are_those_of_pot(ot, source, target, covariances):
    means = source.mean(dim=0), target.mean(dim=0)
    arguments = [tensor.numpy() for tensor in (*means, *covariances)]
    theirs, _ = ot.gaussian.bures_wasserstein_mapping(*arguments)
    close(optimal_transport(*covariances), theirs)
    squared = float((means[0] - means[1]).square().sum()) + bures_distance(*covariances) ** 2
    close(squared**0.5, ot.gaussian.bures_wasserstein_distance(*arguments))


def test_transported_rows_and_their_way_back_are_those_of_pot(ot, source, target, covariances):
    ridge = 1e-3
    peer = ot.da.LinearTransport(reg=ridge).fit(Xs=source.numpy(), Xt=target.numpy())
    s, t = (covariance + ridge * torch.eye(12) for covariance in covariances)
    mean_s, mean_t = source.mean(dim=0), target.mean(dim=0)
    forth = (source - mean_s) @ optimal_transport(s, t).T + mean_t
    back = (target - mean_t) @ optimal_transport(t, s).T + mean_s
    close(forth, peer.transform(Xs=source.numpy()))
    close(back, peer.inverse_transform(Xt=target.numpy()))


def test_roots_map_and_distance_are_those_of_concept_erasure(erasure, covariances):
    root, inverse = erasure.psd_sqrt_rsqrt(covariances[0])
    close(symmetric_root(covariances[0]), root)
    close(inverse_root(covariances[0]), inverse)
    close(optimal_transport(*covariances), erasure.ot_map(*covariances))
    close(bures_distance(*covariances), erasure.ot_distance(*covariances))


@pytest.mark.filterwarnings("ignore:whiten. 5 of 12 directions:RuntimeWarning")
def test_a_singular_covariance_is_treated_as_concept_erasure_does(erasure, source, covariances):
    singular = raw_moments(source[:8]).covariance
    root, inverse = erasure.psd_sqrt_rsqrt(singular)
    close(symmetric_root(singular), root)
    close(inverse_root(singular), inverse)
    close(optimal_transport(singular, covariances[1]), erasure.ot_map(singular, covariances[1]))


@pytest.mark.parametrize("count", (5, 40, 400))
def test_oas_is_that_of_scikit_learn(sklearn_covariance, source, count):
    rows = source[:count]
    peer = sklearn_covariance.OAS().fit(rows.numpy())
    moments = raw_moments(rows)
    close(shrinkage(moments.covariance, "oas", count=count), peer.shrinkage_)
    close(shrink(moments.covariance, "oas", count=count), peer.covariance_)


@pytest.mark.parametrize("count", (5, 40, 400))
def test_ledoit_wolf_of_unit_rows_from_their_moments_alone(sklearn_covariance, source, count):
    moments = Moments(covariance=True).update(source[:count])
    unit = source[:count] / source[:count].norm(dim=1, keepdim=True)
    theirs, amount = sklearn_covariance.ledoit_wolf(unit.numpy())
    needed = {"count": moments.count, "mean": moments.mean}
    close(shrinkage(moments.covariance, "ledoit-wolf", **needed), amount)
    close(shrink(moments.covariance, "ledoit-wolf", **needed), theirs)


@pytest.mark.parametrize("offset", (0.0, 100.0))
def test_covariance_is_that_of_torch(source, offset):
    close(raw_moments(source + offset).covariance, torch.cov((source + offset).T, correction=0))


def test_uneven_batches_and_a_merge_are_what_concept_erasure_streams(source):
    erasure = pytest.importorskip(
        "concept_erasure", reason="concept-erasure, the peer for streamed moments, is not here"
    )
    batches = source.split([1, 7, 0, 250, 142])
    peer = erasure.LeaceFitter(12, 1, dtype=torch.float64, shrinkage=False)
    for batch in batches:
        if len(batch):  # theirs refuses an empty batch
            peer.update(batch, torch.zeros(len(batch), 1))
    left, right = Moments(True, False), Moments(True, False)
    for batch in batches[:2]:
        left.update(batch)
    for batch in batches[2:]:
        right.update(batch)
    left.merge(right)
    assert left.count == int(peer.n)
    close(left.mean, peer.mean_x)
    close(left.covariance, peer.sigma_xx * 399 / 400)  # theirs divides by n - 1
