"""Roots, whitening, colouring, transport and shrinkage: their theorems, in float64."""

import math
import threading
import warnings

import pytest
import torch

from realign_fast._one_thread import at_once, one_thread, product
from realign_fast.whiten import (
    blockwise,
    bures_distance,
    coral,
    eigen,
    inverse_root,
    optimal_transport,
    shrink,
    shrinkage,
    symmetric_root,
)

SIZES = (1, 2, 7, 40)


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


@pytest.mark.parametrize("columns", SIZES)
def test_the_inverse_root_whitens_and_moves_rows_least(columns):
    covariance = conditioned(columns)
    matrix = inverse_root(covariance)
    close(matrix @ covariance @ matrix.T, identity(columns))
    turned = orthogonal(columns, seed=1) @ matrix  # whitens too
    moved = [
        (m - identity(columns)) @ covariance @ (m - identity(columns)).T for m in (matrix, turned)
    ]
    assert float(moved[0].trace()) <= float(moved[1].trace()) + 1e-12


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


def test_whitening_is_accurate_at_condition_1e6():
    covariance = conditioned(60, 1e6)
    matrix = inverse_root(covariance)
    assert float((matrix @ covariance @ matrix.T - identity(60)).norm()) < 1e-9
    close(symmetric_root(covariance) @ matrix, identity(60), 1e-11)


@pytest.mark.parametrize("make", (coral, optimal_transport))
def test_maps_are_accurate_at_condition_1e6(make):
    source, target = conditioned(60, 1e6, seed=1), conditioned(60, 1e6, seed=2)
    matrix = make(source, target)
    white = inverse_root(target) @ matrix @ symmetric_root(source)
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
    matrix = inverse_root(covariance)
    close(matrix @ covariance @ matrix.T, identity(10))
    close(symmetric_root(3 * identity(4)), math.sqrt(3) * identity(4))
    close(optimal_transport(identity(4), 9 * identity(4)), 3 * identity(4))


def test_rank_deficient_whitening_leaves_directions_out():
    covariance = rank_deficient(10, 4)
    with pytest.warns(RuntimeWarning, match=r"6 of 10 directions.* 2\.2e-15 of the") as caught:
        matrix = inverse_root(covariance)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller"
    close(matrix @ covariance @ matrix.T, covariance)  # the projector on its range
    close(symmetric_root(covariance) @ matrix, covariance)


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
    for call in (inverse_root, lambda s: coral(s, identity(5))):
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


def test_the_mean_of_unit_rows_is_enough_for_ledoit_wolf():
    """``E|u - mu|^4`` is what the rows say."""
    rows = gaussian_rows(50, 12)
    rows = rows / rows.norm(dim=1, keepdim=True)
    mean = rows.mean(dim=0)
    covariance, fourth = (
        torch.cov(rows.T, correction=0),
        (rows - mean).square().sum(1).square().mean(),
    )
    square = covariance.square().sum()
    expected = (fourth - square) / 50 / (square - covariance.trace() ** 2 / 12)
    found = shrinkage(covariance, "ledoit-wolf", count=50, mean=mean)
    assert found == pytest.approx(float(expected), rel=1e-12) and 0.01 < found < 0.99


def test_shrinkage_falls_with_the_rows_and_on_average_brings_s_nearer_to_the_truth():
    truth = torch.diag(torch.linspace(0.2, 1, 12, dtype=torch.float64) ** 2)

    def shrunk_once(count, seed):
        covariance = torch.cov(gaussian_rows(count, 12, seed).T, correction=0)
        return covariance, shrink(covariance, "oas", count=count)

    amounts = [shrinkage(shrunk_once(n, 0)[0], "oas", count=n) for n in (10, 100, 1000, 100_000)]
    assert amounts == sorted(amounts, reverse=True)
    assert 0 < amounts[-1] < 0.01 < amounts[0] <= 1
    errors = [
        [float((s - truth).square().sum()) for s in shrunk_once(10, seed)] for seed in range(100)
    ]
    plain, shrunk = torch.tensor(errors).mean(dim=0)
    assert shrunk < 0.8 * plain


def test_shrinkage_of_two_columns_by_hand():
    """``|S|_F^2 = 10``, ``tr S = 4``, so ``|S - 2 I|_F^2 = 2``; and a tenth of S for unit rows."""
    covariance = torch.diag(torch.tensor([3.0, 1.0]))
    assert shrinkage(covariance, "oas", count=49) == pytest.approx((10 + 16) / 50 / 2)
    assert shrinkage(covariance, "oas", count=4) == 1
    tenth, mean = covariance.double() / 10, torch.tensor([0.6**0.5, 0.0], dtype=torch.float64)
    amount = shrinkage(tenth, "ledoit-wolf", count=100, mean=mean)  # mu'S mu = .18
    assert amount == pytest.approx((0.4**2 + 4 * 0.18 - 0.1) / 100 / 0.02)
    assert shrinkage(tenth, "ledoit-wolf", count=1, mean=mean) == 1


def test_one_column_has_no_axes_to_shrink():
    assert shrinkage(torch.ones(1, 1), "oas", count=5) == 0
    s, mean = torch.tensor([[0.36]]).double(), torch.tensor([0.8]).double()
    assert shrinkage(s, "ledoit-wolf", count=5, mean=mean) == 0


@pytest.mark.parametrize(
    ("method", "needed", "words"),
    [
        ("lasso", {}, "'lasso' is none of oas"),
        (1.5, {}, r"1\.5, expected a number in \[0, 1\]"),
        (math.nan, {}, "nan, expected a number"),
        ("oas", {}, "'oas' needs the count of rows, got None"),
        ("ledoit-wolf", {"count": 9}, "needs the mean of the unit rows"),
        ("ledoit-wolf", {"count": 9, "mean": torch.ones(3)}, r"E\|u\|\^2 = 6, expected 1"),
    ],
)
def test_shrinkage_refuses_what_it_cannot_use(method, needed, words):
    with pytest.raises(ValueError, match=words):
        shrink(identity(3), method, **needed)


BAD = torch.eye(3)
BAD[1, 2] = torch.nan


@pytest.mark.parametrize(
    "call",
    [
        symmetric_root,
        inverse_root,
        lambda s: coral(s, identity(3)),
        lambda s: optimal_transport(identity(3), s),
        lambda s: bures_distance(s, identity(3)),
        lambda s: blockwise(s, identity(3), identity(3)[:, :1]),
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
    with pytest.raises(ValueError, match=r"frame is \[2, 1\], expected \[3, q\]"):
        blockwise(identity(3), identity(3), identity(2)[:, :1])
    with pytest.raises(ValueError, match="off the identity by 3"):
        blockwise(identity(3), identity(3), 2 * identity(3)[:, :1])


def test_rounding_asymmetry_is_no_error_and_the_argument_is_left_alone():
    covariance = conditioned(6)
    skewed = covariance.clone()
    skewed[0, 1] *= 1 + 1e-12
    before = skewed.clone()
    close(symmetric_root(skewed), symmetric_root(covariance), 1e-10)
    shrink(skewed, 0.5), inverse_root(skewed)
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
    "symmetric_root": symmetric_root,
    "inverse_root": inverse_root,
    "coral": lambda s: coral(s, s.flip(0, 1)),
    "optimal_transport": lambda s: optimal_transport(s, s.flip(0, 1)),
    "bures_distance": lambda s: torch.tensor(bures_distance(s, s.flip(0, 1))),
    "blockwise": lambda s: blockwise(s, s.flip(0, 1), identity(len(s))[:, :100]),
    "shrink": lambda s: shrink(s, "oas", count=500),
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
