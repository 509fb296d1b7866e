"""add_scatter_: every kernel against float64, what is left alone, same bytes for any threads."""

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import DTYPES, exact, random_rows

from realign_fast import add_scatter_
from realign_fast.ops import reference

FLOAT32_SHARE = 6e-6  # 256 equal products added up in float32 (D = 1); 1e-8 for many mixed ones


def truth(rows, centre, weights=None, normalize=True):
    """Scatter (upper triangle), total and counts in longdouble, straight from the definition."""
    x = exact(rows)
    finite = np.isfinite(x).all(axis=1)
    zero = (x == 0).all(axis=1)
    x = np.where(finite[:, None], x, 0)
    u = (oracle.unit(x) if normalize else x) - exact(centre)
    w = finite * (np.ones(len(x)) if weights is None else exact(weights))
    scatter = np.triu((w[:, None] * u).T @ u)
    counts = [int(finite.sum()), int(zero.sum()), int((~finite).sum())]
    return scatter, (w[:, None] * u).sum(axis=0), np.abs(w[:, None] * u).sum(axis=0), counts


def assert_adds(kernel, rows, centre, weights=None, normalize=True, accurate=False):
    """Add to sums that are not zero; the lower triangle holds NaN and must keep it."""
    columns = rows.shape[1]
    scatter = torch.ones(columns, columns, dtype=torch.float64)
    scatter[torch.tril(torch.ones_like(scatter), -1) > 0] = torch.nan
    total = torch.full((columns,), 2.0, dtype=torch.float64)
    counts = kernel.add_scatter(scatter, total, rows, centre, weights, normalize, accurate)
    expected, sums, magnitudes, numbers = truth(rows, centre, weights, normalize)
    share = 1e-14 if accurate or rows.dtype == torch.float64 else FLOAT32_SHARE
    if kernel.name == "reference":
        share = 1e-14
    upper = np.triu(np.ones((columns, columns), bool))
    error = np.abs(exact(scatter) - 1 - expected)[upper].max()
    largest = float(np.abs(expected).max())
    assert error <= share * largest + 1e-15, f"error {error:.1e}, largest entry {largest:.1e}"
    assert scatter[~torch.from_numpy(upper)].isnan().all(), "the lower triangle was touched"
    error = np.abs(exact(total) - 2 - sums).max()
    assert error <= share * float(magnitudes.max()) + 1e-14, f"total off by {error:.1e}"
    assert counts.tolist() == numbers


def centre_of(columns, seed=5):
    return (0.1 * random_rows(1, columns, seed=seed)[0]).float().double()


@pytest.mark.parametrize("columns", (1, 2, 7, 16, 31, 33, 48, 100, 257))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_for_every_dtype_and_width(kernel, dtype, columns):
    assert_adds(kernel, random_rows(300, columns, dtype), centre_of(columns))


@pytest.mark.parametrize("count", (0, 1, 3, 63, 64, 65, 255, 256, 257, 1023, 1025, 2500))
@pytest.mark.parametrize("weighted", (False, True))
def test_every_number_of_rows(kernel, count, weighted):
    rows = random_rows(count, 37, torch.float32)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(2)).double()
    assert_adds(kernel, rows, centre_of(37), weights if weighted else None)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("accurate", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes(kernel, dtype, accurate, normalize):
    rows = random_rows(700, 65, dtype)
    weights = torch.rand(700, generator=torch.Generator().manual_seed(3)).double()
    assert_adds(kernel, rows, centre_of(65), weights, normalize, accurate)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_non_finite_rows(kernel, dtype, normalize):
    rows = random_rows(400, 33, dtype)
    rows[[0, 5, 399]] = 0
    rows[7, 3], rows[64, 0], rows[65, 32] = torch.nan, torch.inf, -torch.inf
    weights = torch.rand(400, generator=torch.Generator().manual_seed(4)).double()
    assert_adds(kernel, rows, centre_of(33), None, normalize)
    assert_adds(kernel, rows, centre_of(33), weights, normalize)
    assert_adds(kernel, torch.full((5, 33), torch.nan, dtype=dtype), centre_of(33), None, normalize)


@pytest.mark.parametrize("size", (1e-30, 1e-19, 1e19, 1e30))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_norms_that_float32_cannot_square(kernel, dtype, normalize, size):
    """As directions they are rows like any other; as they are, their block is done in float64."""
    rows = (random_rows(300, 20) * size).to(dtype)
    rows[:100] = random_rows(100, 20, dtype)
    centre = centre_of(20) if normalize else centre_of(20) * min(size, 1)
    assert_adds(kernel, rows, centre, None, normalize)


# Squares of the roots 1e40 and 1e-50 leave the range of float32, and so do the roots themselves.
@pytest.mark.parametrize("size", (1e-300, 1e-100, 1e-60, 1e30, 1e80, 1e300))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_any_size(kernel, dtype, normalize, size):
    rows, centre = random_rows(150, 20, dtype), centre_of(20)
    weights = torch.rand(150, generator=torch.Generator().manual_seed(6)).double() * size
    weights[:5] *= 1e-200  # (underflows to zero beside the smallest sizes)
    scatter, total = torch.zeros(20, 20).double(), torch.zeros(20).double()
    kernel.add_scatter(scatter, total, rows, centre, weights, normalize, False)
    expected, sums, magnitudes, _ = truth(rows, centre, weights, normalize)
    share = 1e-14 if kernel.name == "reference" or dtype == torch.float64 else FLOAT32_SHARE
    assert np.abs(exact(scatter) - expected).max() <= share * np.abs(expected).max()
    assert np.abs(exact(total) - sums).max() <= share * magnitudes.max()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_weights_that_undo_the_size_of_rows(kernel, dtype):
    """Each row counts alike, although neither its entries nor its weight do."""
    size = torch.logspace(-9, 9, 200, dtype=torch.float64)[:, None]
    rows = (random_rows(200, 20) * size).to(dtype)
    assert_adds(kernel, rows, torch.zeros(20).double(), size[:, 0] ** -2, normalize=False)


@pytest.mark.parametrize("normalize", (True, False))
def test_a_column_too_small_for_float32_is_added_as_far_as_float32_holds_it(kernel, normalize):
    rows = random_rows(100, 20, torch.float32)
    rows[:, 3] *= 1e-42
    assert_adds(kernel, rows, torch.zeros(20).double(), None, normalize)


def test_strided_rows(kernel):
    wide = random_rows(600, 90, torch.float32)
    assert_adds(kernel, wide[::3, 10:70], centre_of(60))


def test_a_far_mean_costs_no_digits(compiled_kernel):
    """|mean| = 200 and a spread of 1: the shift comes before the rounding."""
    rows = (random_rows(5000, 24) + 40).float()
    centre = rows[:500].double().mean(dim=0).float().double()
    scatter, total = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    compiled_kernel.add_scatter(scatter, total, rows, centre, None, False, False)
    expected = np.triu(truth(rows, centre, None, False)[0])
    error = np.linalg.norm(scatter.numpy() - expected.astype(float))
    # Tensor cores cut sums off (see test_cuda.py): 2.4e-7 as simulated where a rounded sum takes
    # over every 64 rows, as in csrc/cuda, and by arithmetic 4e-6 every 1024, as in Triton.
    allowed = {"cuda": 5e-7, "triton": 5e-6}.get(compiled_kernel.name, 2e-7)
    assert error <= allowed * np.linalg.norm(expected.astype(float))


@pytest.mark.parametrize("accurate", (False, True))
def test_same_bytes_for_any_number_of_threads(compiled_kernel, set_threads, accurate):
    rows, centre = random_rows(3333, 150, torch.float16), centre_of(150)
    weights = torch.rand(3333).double()
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        scatter, total = torch.zeros(150, 150).double(), torch.zeros(150).double()
        compiled_kernel.add_scatter(scatter, total, rows, centre, weights, True, accurate)
        results.append((scatter, total))
    for scatter, total in results[1:]:
        assert torch.equal(scatter, results[0][0]) and torch.equal(total, results[0][1])


def test_the_public_function_checks_and_converts():
    rows, columns = random_rows(10, 6, torch.float32), 6
    scatter, total = torch.zeros(6, 6).double(), torch.zeros(6).double()
    counts = add_scatter_(scatter, total, rows.T.contiguous().T, torch.zeros(6), torch.ones(10))
    expected = torch.zeros(6, 6).double()
    reference.add_scatter_(
        expected, total.clone(), rows, torch.zeros(6).double(), None, True, False
    )
    torch.testing.assert_close(scatter, expected, rtol=1e-6, atol=1e-6)
    assert counts.tolist() == [10, 0, 0]
    good = dict(scatter=scatter, total=total, rows=rows, centre=torch.zeros(columns))
    for wrong, error, words in (
        (dict(scatter=torch.zeros(5, 6).double()), ValueError, r"scatter has shape \[5, 6\]"),
        (dict(scatter=torch.zeros(6, 6)), TypeError, r"float64 scatter, got torch\.float32"),
        (dict(total=torch.zeros(7).double()), ValueError, r"total has shape \[7\]"),
        (dict(centre=torch.zeros(3)), ValueError, r"centre has shape \[3\]"),
        (dict(weights=torch.ones(9)), ValueError, r"10 rows, but weights of shape \[9\]"),
        (dict(weights=-torch.ones(10)), ValueError, "negative or not finite"),
        (dict(weights=torch.full((10,), torch.nan)), ValueError, "negative or not finite"),
        (dict(rows=rows.long()), TypeError, "expected rows of"),
    ):
        with pytest.raises(error, match=words):
            add_scatter_(**(good | wrong))


def test_opcheck():
    rows = random_rows(9, 5, torch.float32)
    scatter, total = torch.zeros(5, 5).double(), torch.zeros(5).double()
    op = torch.ops.realign_fast.add_scatter_.default
    arguments = (scatter, total, rows, torch.zeros(5).double(), None, True, False)
    torch.library.opcheck(op, arguments)
