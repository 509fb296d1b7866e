"""sum_rows: sums, energies and counts of every kernel against the float64 oracle."""

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import DTYPES, exact, random_map, random_rows, require_compiled

from realign_fast import Moments

# What is summed: (how many of scale, shift, recentre are given, normalize).
MODES = {"rows": (0, False), "directions": (0, True), "drift pass": (2, True), "map": (3, True)}
# A mean of unit rows: float32 arithmetic adds 64 rows before float64 takes over, 64 roundings of
# 6e-8 that mostly cancel; float64 arithmetic, and rows summed as they are, round at 1e-16.
MEAN_ERROR = {torch.float64: 1e-14}
NARROW_ERROR = 5e-7


def summands(rows, mode):
    """Return the terms of the op's sum, [N, D] in longdouble."""
    given, normalize = MODES[mode]
    if not given:
        return oracle.unit(exact(rows)) if normalize else exact(rows)
    scale, *vectors = random_map(rows.shape[1])[:given]
    return oracle.row_map(exact(rows), scale, *(exact(vector) for vector in vectors))


def exact_or_number(value):
    return value if isinstance(value, float) else exact(value)


def run(kernel, rows, mode):
    given, normalize = MODES[mode]
    return kernel.sum(rows, *random_map(rows.shape[1])[:given], normalize=normalize)


def assert_sums(sums, expected, dtype, mode, zero=0, nonfinite=0):
    """Compare the sums with ``expected`` [N, D], the terms of the rows that take part."""
    assert sums.counts.tolist() == [len(expected), zero, nonfinite]
    assert sums.total.dtype == sums.energy.dtype == torch.float64
    share = 1e-14 if mode == "rows" else MEAN_ERROR.get(dtype, NARROW_ERROR)
    size = max(np.sqrt((expected**2).sum(axis=1)).sum(), 1e-300)  # sum of the rows' norms
    error = np.abs(exact(sums.total) - expected.sum(axis=0)).max()
    assert error <= share * size, f"total: error {error / size:.1e}, allowed {share:.0e}"
    energy = (expected**2).sum()
    assert abs(np.longdouble(sums.energy.item()) - energy) <= share * max(energy, 1e-300)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", (1, 2, 7, 8, 15, 17, 33, 127, 1000, 16384))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_width(kernel, dtype, columns, mode):
    """The rows lie in a buffer of NaN: an entry read beside them would show."""
    buffer = torch.full((11, columns + 5), torch.nan, dtype=dtype)
    rows = buffer[1:-1, 3 : 3 + columns]
    rows.copy_(random_rows(9, columns, dtype))
    assert_sums(run(kernel, rows, mode), summands(rows, mode), dtype, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", (0, 1, 2, 3, 4, 5, 63, 64, 65, 511, 512, 513, 1030))
def test_every_border_of_groups_blocks_and_chunks(kernel, count, mode):
    rows = random_rows(count, 19, torch.float32)
    expected = summands(rows, mode) if count else np.zeros((0, 19), np.longdouble)
    assert_sums(run(kernel, rows, mode), expected, torch.float32, mode)


@pytest.mark.parametrize("count", (524_288, 524_289, 600_011))
def test_no_row_is_lost_or_taken_twice(kernel, count):
    """Rows along the axes have sums that are whole numbers, and the count of each is known.

    Beyond 1024 * 512 rows the chunks grow: the two sizes are the border of that.
    """
    axis = torch.arange(count) % 3
    sums = kernel.sum(torch.eye(3, dtype=torch.float16)[axis] * 5)
    assert sums.total.tolist() == torch.bincount(axis, minlength=3).tolist()
    assert sums.energy.item() == count
    assert sums.counts.tolist() == [count, 0, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_count_and_non_finite_rows_do_not(kernel, dtype, mode):
    rows = random_rows(23, 21, dtype)
    rows[[0, 6, 22]] = 0
    rows[[3, 9, 12, 13, 14, 15], [20, 0, 5, 16, 1, 7]] = torch.nan
    rows[10, 20], rows[21, 0] = torch.inf, -torch.inf
    good = rows[torch.isfinite(rows).all(dim=1)]
    sums = run(kernel, rows, mode)
    assert_sums(sums, summands(good, mode), dtype, mode, zero=3, nonfinite=8)


def test_nothing_but_bad_rows(kernel):
    rows = torch.zeros(6, 5)
    rows[:4] = torch.nan
    sums = kernel.sum(rows)
    assert sums.counts.tolist() == [2, 2, 4]
    assert sums.energy.item() == 0 and bool((sums.total == 0).all())


SIZES = [(torch.float16, 6e-8), (torch.float16, 65504.0), (torch.bfloat16, 1e-39)]
SIZES += [(torch.bfloat16, 3e38), (torch.float32, 1e-44), (torch.float32, 1e-30)]
SIZES += [(torch.float32, 1e-20), (torch.float32, 1e18), (torch.float64, 1e-159)]
SIZES += [(torch.float32, 1e30), (torch.float32, 3e38), (torch.float64, 5e-324)]
SIZES += [(torch.float64, 1e-200), (torch.float64, 1e200), (torch.float64, 1e308)]


@pytest.mark.parametrize("mode", ("directions", "drift pass", "map"))
@pytest.mark.parametrize(("dtype", "size"), SIZES, ids=str)
def test_norms_that_overflow_or_underflow_when_squared(kernel, dtype, size, mode):
    rows = random_rows(9, 33)
    rows = (rows / rows.abs().amax(dim=1, keepdim=True) * size).to(dtype)
    rows[5] = random_rows(1, 33, dtype)[0]
    zero = int((rows == 0).all(dim=1).sum())
    assert_sums(run(kernel, rows, mode), summands(rows, mode), dtype, mode, zero)


@pytest.mark.parametrize("closeness", (0.6, 0.45, 1e-2, 1e-4))
def test_rows_whose_image_cancels_are_summed_exactly_too(kernel, closeness):
    shift = random_rows(1, 65, seed=5)[0]
    shift = shift / shift.norm()
    noise = random_rows(40, 65, seed=6)
    rows = (closeness * noise / noise.norm(dim=1, keepdim=True) - shift).float()
    expected = oracle.row_map(exact(rows), 1.0, exact(shift))
    assert_sums(kernel.sum(rows, 1.0, shift), expected, torch.float32, "drift pass")


def test_rows_expanded_from_one(kernel):
    row = random_rows(1, 50, torch.float16)
    sums = kernel.sum(row.expand(700, 50))
    assert_sums(sums, summands(row, "directions").repeat(700, 0), torch.float16, "directions")


@pytest.fixture(scope="module")
def million():
    """10^6 float16 rows around an offset, and the true means of u and of unit(s u + b)."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1_000_000, 64, generator=generator).add_(0.3).half()
    scale, shift, _ = random_map(64)
    total = np.zeros((2, 64))
    for block in rows.split(50_000):
        directions = oracle.unit(block.double().numpy())
        total[0] += directions.sum(axis=0)
        total[1] += oracle.unit(scale * directions + shift.numpy()).sum(axis=0)
    return rows, (scale, shift), total / len(rows)


def test_means_over_a_million_float16_rows_are_within_1e_7(compiled_kernel, million):
    rows, row_map, (mean, drift_mean) = million
    for sums, expected in (
        (compiled_kernel.sum(rows), mean),
        (compiled_kernel.sum(rows, *row_map), drift_mean),
    ):
        assert np.abs(sums.total.numpy() / len(rows) - expected).max() <= 1e-7
        assert abs(sums.energy.item() / len(rows) - 1) <= 1e-7


def test_the_trace_of_a_million_rows_follows_without_a_second_pass(million):
    rows, _, (mean, _) = million
    assert Moments().update(rows).trace == pytest.approx(1 - (mean**2).sum(), abs=1e-7)


@pytest.mark.parametrize("spread", (0.1, 0.03, 0.003, 0.0))
@pytest.mark.parametrize("given", (0, 2, 3), ids=("directions", "drift pass", "map"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_spread_of_nearly_equal_rows(kernel, dtype, given, spread):
    """``E|u|^2 - |E u|^2`` cancels; the error of float32 shows where 64 equal rows are added up."""
    rows = (1 + spread * random_rows(300, 65) + random_rows(1, 65, seed=3)).to(dtype)
    rows[7], rows[11, 5] = rows[8], torch.nan
    row_map = random_map(65)[:given]
    directions = oracle.unit(exact(rows[[i for i in range(300) if i != 11]]))
    images = oracle.row_map(directions, *map(exact_or_number, row_map)) if given else directions
    expected = ((images - images.mean(axis=0)) ** 2).sum() / 299
    sums = kernel.sum(rows, *row_map)
    spread_of_sums = float(sums.energy) / 299 - float((sums.total / 299).square().sum())
    in_float64 = kernel.name == "reference" or dtype == torch.float64
    assert abs(spread_of_sums - float(expected)) <= (1e-13 if in_float64 else 2e-6)


@pytest.mark.parametrize(("spread", "error"), [(0.03, 3e-7), (0.003, 3e-7), (0.0, 2e-6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trace_of_clustered_rows_with_covariance(dtype, spread, error):
    """The documented bound without covariance, and a relative error with it."""
    require_compiled()
    rows = (1 + spread * random_rows(2000, 64)).to(dtype)
    u = oracle.unit(exact(rows))
    expected = float(((u - u.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert abs(Moments().update(rows).trace - expected) <= error
    moments = Moments(covariance=True, accurate=True).update(rows)
    assert moments.trace == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_same_bytes_for_any_number_of_threads(compiled_kernel, set_threads, mode):
    rows = random_rows(100_001, 64, torch.float16)
    rows[::1000] = 0
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(run(compiled_kernel, rows, mode))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
