"""Roots, whitening, colouring, transport and shrinkage: their theorems, in float64."""

import math
import threading
import warnings

import pytest
import torch
from support.op_checks import random_rows

from realign_fast._one_thread import at_once, one_thread, product
from realign_fast.whiten import (
    LowRank,
    blockwise,
    bures_distance,
    coral,
    eigen,
    inverse_root,
    optimal_transport,
    shrink,
    shrinkage,
    squared_bures_distance,
    symmetric_root,
    whitening,
)

SIZES = (1, 2, 7, 40)
KINDS = ("zca", "pca", "cholesky")


@pytest.fixture(autouse=True)
def no_warning_passes_unseen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def orthogonal(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gauss).Q


def covariance_of(values, seed=0):
    """A covariance with these eigenvalues and random axes."""
    values = torch.as_tensor(values, dtype=torch.float64)
    axes = orthogonal(len(values), seed)
    matrix = (axes * values) @ axes.T
    return (matrix + matrix.T) / 2


def conditioned(columns, condition=1e2, seed=0):
    return covariance_of(torch.logspace(0, -math.log10(condition), columns), seed)


def rank_deficient(columns, rank, seed=0):
    return covariance_of([1.0] * rank + [0.0] * (columns - rank), seed)


def identity(columns):
    return torch.eye(columns, dtype=torch.float64)


def close(a, b, share=1e-12):
    """``|a - b|_F`` is at most this share of ``|b|_F``."""
    assert a.dtype == torch.float64 and a.shape == b.shape
    error, allowed = float((a - b).norm()), share * max(float(b.norm()), 1e-300)
    assert error <= allowed, f"off by {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("columns", SIZES)
def test_roots_are_roots(columns):
    covariance = conditioned(columns)
    root, inverse = symmetric_root(covariance), inverse_root(covariance)
    assert torch.equal(root, root.T) and torch.equal(inverse, inverse.T)
    assert float(torch.linalg.eigvalsh(root).min()) > 0, "of all roots, the positive one"
    close(root @ root, covariance)
    close(inverse @ root, identity(columns))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", SIZES)
def test_whitening_whitens_and_its_inverse_undoes_it(columns, kind):
    covariance = conditioned(columns)
    matrix, inverse = whitening(covariance, kind)
    close(matrix @ covariance @ matrix.T, identity(columns))
    close(inverse @ matrix, identity(columns))
    close(inverse @ inverse.T, covariance)


def test_each_kind_is_what_its_name_says():
    values = torch.tensor([5.0, 3.0, 1.0, 0.2], dtype=torch.float64)
    covariance = covariance_of(values)
    zca, pca, cholesky = (whitening(covariance, kind) for kind in KINDS)
    assert torch.equal(zca.matrix, zca.matrix.T)
    close((pca.matrix @ pca.matrix.T).diagonal(), 1 / values)  # principal axes, largest first
    close(cholesky.inverse, torch.linalg.cholesky(covariance))
    assert torch.equal(cholesky.matrix, cholesky.matrix.tril())
    for other in (pca, cholesky):  # ZCA moves rows least: E|W u - u|^2
        moved = [(m - identity(4)) @ covariance @ (m - identity(4)).T for m in (zca[0], other[0])]
        assert float(moved[0].trace()) < float(moved[1].trace())


@pytest.mark.parametrize("make", (coral, optimal_transport))
@pytest.mark.parametrize("columns", SIZES)
def test_maps_bring_the_source_covariance_to_the_target(columns, make):
    source, target = conditioned(columns, seed=1), conditioned(columns, seed=2)
    matrix = make(source, target)
    close(matrix @ source @ matrix.T, target)
    close(make(source, source), identity(columns))
    close(make(4 * source, source), identity(columns) / 2)


def test_transport_is_symmetric_positive_and_inverted_by_the_way_back():
    source, target = conditioned(20, seed=1), conditioned(20, seed=2)
    there, back = optimal_transport(source, target), optimal_transport(target, source)
    assert torch.equal(there, there.T)
    assert float(torch.linalg.eigvalsh(there).min()) > 0
    close(there @ back, identity(20), 1e-11)


def test_transport_displaces_less_than_coral_and_by_the_bures_distance():
    source, target = conditioned(20, seed=1), conditioned(20, seed=2)
    squared = {}
    for make in (coral, optimal_transport):
        move = make(source, target) - identity(20)
        squared[make] = float((move @ source @ move.T).trace())
    assert squared[optimal_transport] < squared[coral]
    assert squared[optimal_transport] == pytest.approx(bures_distance(source, target) ** 2)


def test_transport_finds_a_known_map_at_condition_1e6():
    """The product ``S_y^1/2 S_x S_y^1/2`` has condition 1e12: formed, it costs all but 5 digits."""
    source, map_ = conditioned(60, 1e6, seed=1), conditioned(60, 10, seed=2)
    target = map_ @ source @ map_
    target = (target + target.T) / 2
    close(optimal_transport(source, target), map_, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_whitening_is_accurate_at_condition_1e6(kind):
    covariance = conditioned(60, 1e6)
    matrix, inverse = whitening(covariance, kind)
    assert float((matrix @ covariance @ matrix.T - identity(60)).norm()) < 1e-9
    close(inverse @ matrix, identity(60), 1e-11)


@pytest.mark.parametrize("make", (coral, optimal_transport))
def test_maps_are_accurate_at_condition_1e6(make):
    source, target = conditioned(60, 1e6, seed=1), conditioned(60, 1e6, seed=2)
    matrix = make(source, target)
    white = whitening(target).matrix @ matrix @ symmetric_root(source)
    assert float((white @ white.T - identity(60)).norm()) < 1e-7, "in the small directions too"


def test_bures_is_a_metric():
    a, b, c = (conditioned(12, seed=seed) for seed in (1, 2, 3))
    assert bures_distance(a, a) < 1e-13
    assert bures_distance(a, b) == pytest.approx(bures_distance(b, a), rel=1e-12)
    assert bures_distance(a, c) < bures_distance(a, b) + bures_distance(b, c)
    nudge = 1e-9 * identity(12)
    near = float((symmetric_root(a + nudge) - symmetric_root(a)).norm())  # they commute
    assert bures_distance(a, a + nudge) == pytest.approx(near, rel=1e-4), "no cancellation"
    assert bures_distance(4 * a, 4 * b) == pytest.approx(2 * bures_distance(a, b))
    singular = rank_deficient(12, 4)
    assert bures_distance(singular, 0 * singular) == pytest.approx(2), "sqrt of the trace"


def random_covariances(count, columns, seed=0):
    factors = random_rows(count * columns, columns, seed=seed).reshape(count, columns, columns)
    return factors @ factors.mT + 0.1 * identity(columns)


def test_the_squared_bures_distance_in_batches_and_its_gradient():
    a, b = random_covariances(3, 4), random_covariances(3, 4, seed=1)
    a[1], b[2] = 2 * identity(4), identity(4)  # repeated eigenvalues
    squared = squared_bures_distance(a, b)
    for each, s_a, s_b in zip(squared, a, b, strict=True):
        middle = symmetric_root(symmetric_root(s_a) @ s_b @ symmetric_root(s_a))
        close(each, (s_a + s_b - 2 * middle).trace(), 1e-12)
        assert float(each) == pytest.approx(bures_distance(s_a, s_b) ** 2, rel=1e-14)
    across = squared_bures_distance(a[:, None], b)
    assert across.shape == (3, 3) and torch.equal(across.diagonal(), squared)
    assert squared_bures_distance(a[0], b).shape == (3,)
    assert squared_bures_distance(a[:0], b[:0]).shape == (0,)
    assert float(squared_bures_distance(a[0].float(), b[0])) == pytest.approx(
        float(squared[0]), rel=1e-5
    )

    def of_halves(x, y):  # gradcheck moves one entry, and a covariance is symmetric
        return squared_bures_distance((x + x.mT) / 2, (y + y.mT) / 2)

    halves = [side[1:, :3, :3].detach().requires_grad_() for side in (a, b)]
    assert torch.autograd.gradcheck(of_halves, halves)
    a.requires_grad_()
    (at_itself,) = torch.autograd.grad(squared_bures_distance(a, a.detach()).sum(), a)
    assert float(at_itself.abs().max()) < 1e-12


def test_the_gradient_of_a_bures_distance_needs_full_rank():
    singular, full = torch.diag(torch.tensor([2.0, 1.0, 0.0])).double(), identity(3)
    expected = pytest.approx(
        float((torch.tensor([2.0, 1.0, 0.0]).double().sqrt() - 1).square().sum())
    )
    assert float(squared_bures_distance(singular, full)) == expected
    singular.requires_grad_()
    with pytest.raises(ValueError, match=r"1 of 3 eigenvalues of a covariance are 0, .* ridge"):
        squared_bures_distance(singular, full)
    squared_bures_distance(singular.detach(), full.requires_grad_()).backward()
    close(full.grad.diagonal(), 1 - singular.detach().diagonal().sqrt())
    with torch.no_grad():
        assert float(squared_bures_distance(singular, full)) == expected
    with pytest.raises(ValueError, match=r"first is \[3\], expected \[D, D\]"):
        squared_bures_distance(torch.ones(3), full)
    with pytest.raises(ValueError, match="the first has 3 columns, the second 1"):
        squared_bures_distance(full, identity(1))


def test_bures_of_commuting_covariances_is_that_of_their_roots():
    values_a, values_b = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    a, b = covariance_of(values_a, seed=4), covariance_of(values_b, seed=4)
    expected = float((values_a.double().sqrt() - values_b.double().sqrt()).norm())
    assert bures_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("inside", (1, 4, 11, 12))
def test_blockwise_matches_each_block_and_keeps_the_blocks_apart(inside):
    source, target = conditioned(12, seed=1), conditioned(12, seed=2)
    axes = orthogonal(12, seed=3)
    u, v = axes[:, :inside], axes[:, inside:]
    matrix = blockwise(source, target, u)
    for block in (u, v):
        result = block.T @ matrix @ source @ matrix.T @ block
        close(result, block.T @ target @ block)
    assert float((u.T @ matrix @ v).norm()) + float((v.T @ matrix @ u).norm()) < 1e-12
    close(blockwise(source, target, u @ orthogonal(inside, seed=5)), matrix)  # U is a subspace
    close(blockwise(source, source, u), identity(12))
    if inside == 12:
        close(matrix, coral(source, target))


@pytest.mark.parametrize("scale", (1e-12, 1.0, 1e12))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_a_block_that_is_rounding_of_the_whole_counts_as_zero(scale, dtype):
    """S has rank 3 and U holds it, so that the block on V is rounding, neither spread nor skew."""
    factor = gaussian_rows(3, 20)
    s, eye = (scale * factor.T @ factor).to(dtype), (scale * identity(20)).to(dtype)
    u = torch.linalg.qr(factor.T).Q
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    with pytest.warns(RuntimeWarning, match="17 of 20"):
        from_s = blockwise(s, eye, u)
    on_u = u.T @ s.double() @ u / scale
    close(from_s, u @ coral(on_u, identity(3)) @ u.T, tolerance)
    close(blockwise(eye, s, u), u @ coral(identity(3), on_u) @ u.T, tolerance)


def test_a_rotation_of_everything_rotates_every_map():
    source, target, turn = conditioned(9, seed=1), conditioned(9, seed=2), orthogonal(9, seed=3)
    frame = orthogonal(9, seed=4)[:, :3]
    for make in (coral, optimal_transport):
        turned = make(turn @ source @ turn.T, turn @ target @ turn.T)
        close(turned, turn @ make(source, target) @ turn.T)
    turned = blockwise(turn @ source @ turn.T, turn @ target @ turn.T, turn @ frame)
    close(turned, turn @ blockwise(source, target, frame) @ turn.T)


def test_equal_eigenvalues_are_nothing_special():
    covariance = covariance_of([2.0] * 5 + [0.5] * 5)
    for kind in KINDS:
        matrix = whitening(covariance, kind).matrix
        close(matrix @ covariance @ matrix.T, identity(10))
    close(symmetric_root(3 * identity(4)), math.sqrt(3) * identity(4))
    close(optimal_transport(identity(4), 9 * identity(4)), 3 * identity(4))


@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_whitening_leaves_directions_out(kind):
    covariance = rank_deficient(10, 4)
    with pytest.warns(RuntimeWarning, match=r"6 of 10 directions.* 2\.2e-15 of the") as caught:
        matrix, inverse = whitening(covariance, kind)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller"
    white = matrix @ covariance @ matrix.T
    close(white @ white, white)
    assert float(white.trace()) == pytest.approx(4)
    close(inverse @ matrix, covariance)  # the projector on its range
    close(inverse @ inverse.T, covariance)


def test_rank_deficient_maps_are_finite_and_warn_once():
    source, target = rank_deficient(10, 4, seed=1), conditioned(10, seed=2)
    frame = orthogonal(10, seed=3)[:, :7]
    for make in (coral, optimal_transport, lambda s, t: blockwise(s, t, frame)):
        with pytest.warns(RuntimeWarning, match="of 10 directions") as caught:
            matrix = make(source, target)
        assert len(caught) == 1
        assert bool(torch.isfinite(matrix).all())
        assert float(matrix.norm()) < 10, "nothing is blown up"
    with pytest.warns(RuntimeWarning, match="6 of 10"):
        matrix = coral(source, target)
    root = symmetric_root(target)
    close(matrix @ source @ matrix.T, root @ source @ root)  # source is its own range's projector
    with pytest.warns(RuntimeWarning, match="6 of 10"):
        matrix = optimal_transport(source, target)
    close(matrix @ source @ matrix, source @ target @ source)
    for make in (coral, optimal_transport):  # a flat target is no reason to warn
        matrix = make(target, source)
        close(matrix @ target @ matrix.T, source, 1e-7 if make is optimal_transport else 1e-12)


def test_a_zero_matrix_maps_to_zero():
    zero = torch.zeros(5, 5)
    assert torch.equal(symmetric_root(zero), zero.double())
    for call in (inverse_root, lambda s: coral(s, identity(5)), lambda s: whitening(s).inverse):
        with pytest.warns(RuntimeWarning, match="5 of 5 directions"):
            assert torch.equal(call(zero), zero.double())
    assert shrinkage(zero, "oas", count=10) == 0


def test_the_floor_decides_what_is_left_out():
    covariance = conditioned(4, 1e3)  # 1, 0.1, 0.01, 0.001
    with pytest.warns(RuntimeWarning, match="2 of 4 .* under 5"):
        inverse = inverse_root(covariance, floor=0.05)
    assert torch.linalg.matrix_rank(inverse) == 2
    assert float(inverse.trace()) == pytest.approx(1 + math.sqrt(10))
    close(inverse_root(covariance, floor=0), inverse_root(covariance))
    for matrix in (  # of the source, not of the target
        coral(identity(4), covariance, floor=0.05),
        blockwise(identity(4), covariance, torch.linalg.eigh(covariance)[1][:, 1:], floor=0.05),
    ):
        close(matrix @ matrix.T, covariance)
    with pytest.raises(ValueError, match=r"floor=1, expected a share"):
        inverse_root(covariance, floor=1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_rounded_zeros_count_as_zeros_for_the_dtype_they_came_in(dtype):
    covariance = rank_deficient(8, 3).to(dtype)
    with pytest.warns(RuntimeWarning, match="5 of 8"):
        inverse = inverse_root(covariance)
    assert inverse.dtype == torch.float64 and float(inverse.norm()) < 2
    with pytest.warns(RuntimeWarning, match="5 of 8"):
        low = LowRank.of(covariance, 4)
    assert int((low.values > 0).sum()) == 3 and low.rest == 0
    frame = orthogonal(8, seed=1)[:, :4]
    with pytest.warns(RuntimeWarning, match="2 of 8"):  # each block of 4 has rank 3
        matrix = blockwise(covariance, covariance, frame)
    assert float(matrix.norm()) < 3


def test_shrinking_keeps_the_trace_and_the_axes():
    covariance = conditioned(8)
    for amount in (0, 0.25, 1):
        shrunk = shrink(covariance, amount)
        assert float(shrunk.trace()) == pytest.approx(float(covariance.trace()))
        close(shrunk @ covariance, covariance @ shrunk)
    assert torch.equal(shrink(covariance, None), covariance)
    close(shrink(covariance, 1.0), covariance.trace() / 8 * identity(8))
    values = torch.linalg.eigvalsh(covariance)
    close(torch.linalg.eigvalsh(shrink(covariance, 0.1)), 0.9 * values + 0.1 * values.mean())


def gaussian_rows(count, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    return rows * torch.linspace(0.2, 1, columns) + 0.3


def moments_of(rows):
    mean = rows.mean(dim=0)
    centred = rows - mean
    fourth = float(centred.square().sum(dim=1).square().mean())
    return mean, centred.T @ centred / len(rows), fourth


def test_unit_rows_need_no_fourth_moment():
    rows = gaussian_rows(50, 12)
    mean, covariance, fourth = moments_of(rows / rows.norm(dim=1, keepdim=True))
    from_mean = shrinkage(covariance, "ledoit-wolf", count=50, mean=mean)
    from_fourth = shrinkage(covariance, "ledoit-wolf", count=50, fourth_moment=fourth)
    assert from_mean == pytest.approx(from_fourth, rel=1e-12)
    assert 0.01 < from_mean < 0.99


@pytest.mark.parametrize("method", ("oas", "ledoit-wolf"))
def test_shrinkage_falls_with_the_rows_and_on_average_brings_s_nearer_to_the_truth(method):
    truth = torch.diag(torch.linspace(0.2, 1, 12, dtype=torch.float64) ** 2)

    def shrunk_once(count, seed):
        _, covariance, fourth = moments_of(gaussian_rows(count, 12, seed))
        needed = {"fourth_moment": fourth} if method == "ledoit-wolf" else {}
        amount = shrinkage(covariance, method, count=count, **needed)
        return amount, covariance, shrink(covariance, method, count=count, **needed)

    amounts = [shrunk_once(count, 0)[0] for count in (10, 100, 1000, 100_000)]
    assert amounts == sorted(amounts, reverse=True)
    assert 0 < amounts[-1] < 0.01 < amounts[0] <= 1
    errors = [
        [float((s - truth).square().sum()) for s in shrunk_once(10, seed)[1:]]
        for seed in range(100)
    ]
    plain, shrunk = torch.tensor(errors).mean(dim=0)
    assert shrunk < 0.8 * plain


def test_shrinkage_of_two_columns_by_hand():
    """``|S|_F^2 = 10``, ``tr S = 4``, so ``|S - 2 I|_F^2 = 2``."""
    covariance = torch.diag(torch.tensor([3.0, 1.0]))
    assert shrinkage(covariance, "oas", count=49) == pytest.approx((10 + 16) / 50 / 2)
    assert shrinkage(covariance, "oas", count=4) == 1
    amount = shrinkage(covariance, "ledoit-wolf", count=10, fourth_moment=20.0)
    assert amount == pytest.approx((20 - 10) / 10 / 2)
    assert shrinkage(covariance, "ledoit-wolf", count=1, fourth_moment=20.0) == 1


@pytest.mark.parametrize("method", ("oas", "ledoit-wolf"))
def test_one_column_has_no_axes_to_shrink(method):
    needed = {"fourth_moment": 3.0} if method == "ledoit-wolf" else {}
    assert shrinkage(torch.ones(1, 1), method, count=5, **needed) == 0


@pytest.mark.parametrize(
    ("method", "needed", "words"),
    [
        ("lasso", {}, "'lasso' is none of oas"),
        (1.5, {}, r"1\.5, expected a number in \[0, 1\]"),
        (math.nan, {}, "nan, expected a number"),
        ("oas", {}, "'oas' needs the count of rows, got None"),
        ("ledoit-wolf", {"count": 9}, "either the mean of unit rows or the fourth_moment"),
        ("ledoit-wolf", {"count": 9, "mean": torch.ones(3)}, r"E\|u\|\^2 = 6, expected 1"),
        ("ledoit-wolf", {"count": 9, "fourth_moment": 3.0}, r"at least tr\(S\)\^2 = 9"),
    ],
)
def test_shrinkage_refuses_what_it_cannot_use(method, needed, words):
    with pytest.raises(ValueError, match=words):
        shrink(identity(3), method, **needed)


def spiked(columns, spikes, rest, seed=0):
    """``U diag(spikes) U' + rest (I - U U')``, built without an eigendecomposition."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(columns, len(spikes), generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(gauss).Q
    inside = torch.as_tensor(spikes, dtype=torch.float64) - rest
    return (axes * inside) @ axes.T + rest * identity(columns)


def test_low_rank_at_full_rank_is_the_whole_matrix():
    source, target, rows = conditioned(20, seed=1), conditioned(20, seed=2), gaussian_rows(9, 20)
    low, low_target = LowRank.of(source, 20), LowRank.of(target, 20)
    close(low.root(rows), rows @ symmetric_root(source))
    close(low.inverse_root(rows), rows @ inverse_root(source))
    close(low.coral(rows, low_target), rows @ coral(source, target).T)


@pytest.mark.parametrize("columns", (40, 1100), ids=("eigh", "krylov"))
def test_low_rank_of_a_spiked_covariance_is_exact(columns):
    spikes = [4.0, 3.0, 3.0, 3.0, 1.0]
    covariance, rows = spiked(columns, spikes, 0.01), gaussian_rows(9, columns)
    low = LowRank.of(covariance, 5)
    close(low.values, torch.tensor(spikes, dtype=torch.float64))
    assert low.rest == pytest.approx(0.01, rel=1e-10)
    close(low.vectors.T @ low.vectors, identity(5))
    close(low.root(low.root(rows)), rows @ covariance, 1e-11)
    close(low.inverse_root(low.root(rows)), rows, 1e-11)
    close(low.inverse_root(low.inverse_root(rows)) @ covariance, rows, 1e-10)


def test_low_rank_finds_many_equal_eigenvalues_and_none():
    """More equal ones than a block has columns: the Krylov space alone would close before them."""
    low = LowRank.of(spiked(1100, [2.0] * 30, 0.01), 30)
    close(low.values, torch.full((30,), 2.0, dtype=torch.float64))
    low = LowRank.of(identity(1100), 3)
    close(low.values, torch.ones(3, dtype=torch.float64))
    assert low.rest == pytest.approx(1)
    with pytest.warns(RuntimeWarning, match="1100 of 1100"):
        low = LowRank.of(0 * identity(1100), 3)
    assert not low.values.any() and low.rest == 0


def test_low_rank_leading_pairs_are_those_of_eigh():
    values = 1 / torch.arange(1, 1101, dtype=torch.float64)
    axes = orthogonal(1100)
    covariance = (axes * values) @ axes.T
    low = LowRank.of((covariance + covariance.T) / 2, 24)
    close(low.values, values[:24], 1e-6)
    assert float((axes[:, :24].T @ low.vectors).norm()) ** 2 == pytest.approx(24, rel=1e-6)
    assert low.rest == pytest.approx(float(values[24:].mean()), rel=1e-6)


def test_low_rank_of_a_large_rank_is_that_of_eigh():
    """A Krylov space of 4 directions for each one asked for would have more than there are."""
    values = torch.linspace(2, 1, 1100, dtype=torch.float64)
    low = LowRank.of(covariance_of(values), 300)
    close(low.values, values[:300])
    close(low.vectors.T @ low.vectors, identity(300))


def test_low_rank_is_the_same_for_the_same_seed():
    covariance = spiked(1100, torch.linspace(2, 1, 200), 0.01)
    first, again, other = (LowRank.of(covariance, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)


def test_low_rank_of_a_singular_covariance_leaves_directions_out():
    covariance, rows = spiked(40, [2.0, 1.0], 0.0), gaussian_rows(9, 40)
    with pytest.warns(RuntimeWarning, match="38 of 40 directions") as caught:
        low = LowRank.of(covariance, 5)
    assert len(caught) == 1 and caught[0].filename == __file__
    inside = low.inverse_root(low.root(rows))  # rows on the range of S
    close(low.inverse_root(low.root(inside)), inside)
    close(low.root(low.root(rows)), rows @ covariance)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_low_rank_maps_rows_in_their_dtype(dtype):
    low, rows = LowRank.of(conditioned(20), 6), gaussian_rows(50, 20).to(dtype)
    mapped = low.inverse_root(rows)
    assert mapped.dtype == dtype
    exact = low.inverse_root(rows.double())
    close(mapped.double(), exact, 4 * torch.finfo(dtype).eps)
    if dtype != torch.float32:  # the arithmetic is float32's: rounded once, at the end
        assert float((mapped == exact.to(dtype)).double().mean()) > 0.98


BAD = torch.eye(3)
BAD[1, 2] = torch.nan


@pytest.mark.parametrize(
    "call",
    [
        symmetric_root,
        inverse_root,
        whitening,
        lambda s: coral(s, identity(3)),
        lambda s: optimal_transport(identity(3), s),
        lambda s: bures_distance(s, identity(3)),
        lambda s: blockwise(s, identity(3), identity(3)[:, :1]),
        lambda s: LowRank.of(s, 1),
        lambda s: shrink(s, 0.5),
    ],
)
@pytest.mark.parametrize(
    ("covariance", "error", "words"),
    [
        (torch.ones(3, 4), ValueError, r"is \[3, 4\], expected \[D, D\]"),
        (torch.ones(3), ValueError, r"is \[3\], expected \[D, D\]"),
        (torch.ones(0, 0), ValueError, r"is \[0, 0\], expected \[D, D\]"),
        (BAD, ValueError, "1 of 9 entries of the .* are not finite"),
        (torch.ones(3, 3).triu(), ValueError, "is not symmetric: entries differ by 1 from"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, r"got torch\.int64"),
        ([[1.0]], TypeError, "got list"),
    ],
)
def test_one_clear_error_for_what_is_no_covariance(call, covariance, error, words):
    with pytest.raises(error, match=words):
        call(covariance)


def test_other_refusals_name_what_and_what_to_do():
    with pytest.raises(ValueError, match=r"eigenvalue -0\.5 \(largest 1\), expected none below"):
        symmetric_root(torch.diag(torch.tensor([1.0, -0.5])))
    for make in (coral, optimal_transport, lambda s, t: blockwise(s, t, identity(3)[:, :1])):
        with pytest.raises(ValueError, match="source has 3 columns, the target 2"):
            make(identity(3), identity(2))
    with pytest.raises(ValueError, match="kind='ica' is none of zca, pca, cholesky"):
        whitening(identity(3), "ica")
    with pytest.raises(ValueError, match=r"frame is \[2, 1\], expected \[3, q\]"):
        blockwise(identity(3), identity(3), identity(2)[:, :1])
    with pytest.raises(ValueError, match="off the identity by 3"):
        blockwise(identity(3), identity(3), 2 * identity(3)[:, :1])
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"rank={rank}, expected 1 to D = 3"):
            LowRank.of(identity(3), rank)
    with pytest.raises(ValueError, match=r"rows are \[5, 2\], expected \[N, 3\]"):
        LowRank.of(identity(3), 3).root(torch.ones(5, 2))


def test_rounding_asymmetry_is_no_error_and_the_argument_is_left_alone():
    covariance = conditioned(6)
    skewed = covariance.clone()
    skewed[0, 1] *= 1 + 1e-12
    before = skewed.clone()
    close(symmetric_root(skewed), symmetric_root(covariance), 1e-10)
    shrink(skewed, 0.5), whitening(skewed), LowRank.of(skewed, 2)
    assert torch.equal(skewed, before)


def test_where_the_eigh_of_torch_fails_that_of_numpy_answers(monkeypatch):
    honest, matrix = torch.linalg.eigh, conditioned(30)
    expected = matrix @ matrix

    def unconverged(_):
        raise torch.linalg.LinAlgError("did not converge")

    for failing in (unconverged, lambda given: (honest(given)[0], given * torch.nan)):
        monkeypatch.setattr(torch.linalg, "eigh", failing)
        close(eigen.floored_eigen(matrix, None).power(2), expected)


ALGEBRA = {
    **{f"whitening {kind}": lambda s, kind=kind: whitening(s, kind) for kind in KINDS},
    "symmetric_root": symmetric_root,
    "inverse_root": inverse_root,
    "coral": lambda s: coral(s, s.flip(0, 1)),
    "optimal_transport": lambda s: optimal_transport(s, s.flip(0, 1)),
    "bures_distance": lambda s: torch.tensor(bures_distance(s, s.flip(0, 1))),
    "blockwise": lambda s: blockwise(s, s.flip(0, 1), identity(len(s))[:, :100]),
    "shrink": lambda s: shrink(s, "oas", count=500),
    "low rank, eigh": lambda s: LowRank.of(s, 50).vectors,
    "low rank, krylov": lambda s: LowRank.of(torch.block_diag(s, s, s, s), 8).vectors,
}


@pytest.mark.parametrize("algebra", ALGEBRA.values(), ids=ALGEBRA)
def test_bytes_do_not_depend_on_threads(algebra, set_threads):
    covariance, found = conditioned(300), []
    for threads in (1, 2, 4):
        set_threads(threads)
        with torch.inference_mode(threads == 4):
            results = algebra(covariance)
        found.append(results if isinstance(results, tuple) else (results,))
        assert torch.get_num_threads() == threads, "the caller's threads are put back"
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_product_in_panels_is_the_product():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(600, 520, dtype=torch.float64, generator=generator) for _ in range(2))
    close(product(a, b.T), a @ b.T, 1e-12)
    close(product(a.T, b), a.T @ b, 1e-12)


@pytest.mark.parametrize(
    ("threads", "rows", "is_met"),
    [(2, 256, True), (4, 256, True), (1, 256, False), (2, 255, False)],
)
def test_independent_calls_run_at_once_on_the_threads_of_the_caller(
    threads, rows, is_met, set_threads
):
    meeting = threading.Barrier(2)

    def meets():
        """Return whether another call is in progress, and the threads that torch would use."""
        try:
            meeting.wait(timeout=10 if is_met else 0.05)
        except threading.BrokenBarrierError:
            meeting.reset()
            return False, torch.get_num_threads()
        return True, torch.get_num_threads()

    set_threads(threads)
    for algebra in (one_thread(at_once), one_thread(one_thread(at_once))):
        assert algebra([meets, meets], torch.ones(rows, 1)) == [(is_met, 1)] * 2
        assert torch.get_num_threads() == threads


def test_an_error_on_either_side_is_that_of_the_side():
    fine, broken = conditioned(256), -identity(256)
    for pair, name in (((broken, fine), "source"), ((fine, broken), "target")):
        with pytest.raises(ValueError, match=f"the {name} has the eigenvalue -1"):
            coral(*pair)
