"""map_rows: ``unit(unit(A u + b) + h)`` on every kernel against float64, row by row."""

import functools
from itertools import product

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import DTYPES, assert_near, exact, random_map, random_rows
from torch.autograd import gradcheck

from realign_fast import align_rows, sum_rows
from realign_fast.ops import reference

# Of the row's largest entry: float32 sums of D products, and half an ulp of what is stored.
SHARE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 4e-6, torch.float64: 1e-13}


def matrix_map(columns, kind="matrix", seed=3):
    """A (near the identity, not symmetric), b and h, of the sizes that fits give."""
    noise = random_rows(columns, columns, seed=seed) - 0.3
    matrix = torch.eye(columns, dtype=torch.float64) + 0.3 * noise / columns**0.5
    return (matrix if kind == "matrix" else matrix.diagonal().clone(), *random_map(columns)[1:])


def truth(rows, matrix, shift, recentre=None, length=1.0):
    """Compute the map in longdouble from the definition alone."""
    recentre = None if recentre is None else exact(recentre)
    return oracle.row_map(exact(rows), exact(matrix), exact(shift), recentre, length)


def assert_accurate(result, expected):
    assert_near(result, expected, SHARE[result.dtype])


def map_checked(kernel, rows, row_map, dtype=None, length=1.0):
    """Return the result, and check that it is the same in strided rows that held NaN."""
    result = kernel.map(rows, *row_map, dtype=dtype, length=length)
    wide = torch.full((len(rows), rows.shape[1] + 3), torch.nan, dtype=result.dtype)
    wide = wide.to(kernel.device)
    kernel.map_into(wide[:, : rows.shape[1]], rows, *row_map, length=length)
    assert torch.equal(wide[:, : rows.shape[1]].cpu().nan_to_num(), result.nan_to_num())
    assert bool(wide[:, rows.shape[1] :].isnan().all()), "written beyond the row"
    return result


@functools.cache
def wide_case(dtype, columns, kind):
    """Rows, a map and their truth, which takes seconds and is the same for every kernel."""
    rows, row_map = random_rows(70, columns, dtype), matrix_map(columns, kind)
    return rows, row_map, truth(rows, *row_map)


@pytest.mark.parametrize("kind", ("matrix", "diagonal"))
@pytest.mark.parametrize("columns", (1, 2, 7, 16, 33, 100, 257, 1101))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_for_every_dtype_and_width(kernel, dtype, columns, kind):
    rows, row_map, expected = wide_case(dtype, columns, kind)
    assert_accurate(map_checked(kernel, rows, row_map), expected)


@pytest.mark.parametrize("kind", ("matrix", "diagonal"))
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes_with_and_without_the_last_step(kernel, dtype, out_dtype, kind):
    rows, row_map = random_rows(9, 40, dtype), matrix_map(40, kind)
    for chosen, length in product((row_map, row_map[:2]), (1.0, None, 3.7)):
        result = map_checked(kernel, rows, chosen, out_dtype, length)
        assert_accurate(result, truth(rows, *chosen, length=length))


@pytest.mark.parametrize("count", (0, 1, 3, 7, 8, 9, 63, 64, 65, 200))
def test_every_number_of_rows(kernel, count):
    rows, row_map = random_rows(count, 37, torch.float16), matrix_map(37)
    result = map_checked(kernel, rows, row_map)
    assert result.shape == (count, 37)
    assert_accurate(result, truth(rows, *row_map))


@pytest.mark.parametrize("kind", ("matrix", "diagonal"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_non_finite_huge_and_tiny_rows(kernel, dtype, kind):
    rows, row_map = random_rows(80, 21, dtype), matrix_map(21, kind)
    clean = kernel.map(rows, *row_map)
    rows[[2, 70]] = 0
    rows[[4, 65], 7] = torch.tensor([torch.nan, -torch.inf], dtype=dtype)
    rows[9] *= 1e-7 if dtype == torch.float16 else 1e-35
    rows[10] *= 1e4 if dtype == torch.float16 else 1e35
    others = [i for i in range(80) if i not in (4, 65)]
    for length in (None, 1.0):
        result = map_checked(kernel, rows, row_map, length=length)
        assert bool(result[[4, 65]].isnan().all())
        assert_accurate(result[others], truth(rows[others], *row_map, length=length))
    untouched = [i for i in range(80) if i not in (2, 4, 9, 10, 65, 70)]
    assert torch.equal(result[untouched], clean[untouched]), "a row depends on its neighbours"


@pytest.mark.parametrize("step", ("A u + b", "e' + h"))
@pytest.mark.parametrize("closeness", (0.5, 0.1, 1e-3, 1e-5))
def test_float32_where_a_norm_cancels(kernel, step, closeness):
    """Rows for which ``A u + b`` (or ``e' + h``) nearly vanishes keep every digit of float32."""
    matrix, shift, recentre = matrix_map(24)
    noise = random_rows(30, 24, seed=6)
    noise = closeness * noise / noise.norm(dim=1, keepdim=True)
    centre = torch.nn.functional.normalize(random_rows(1, 24, seed=9), dim=1)
    rows = torch.nn.functional.normalize(centre + noise, dim=1).float()
    if step == "A u + b":
        shift = -(centre @ matrix.T)[0]
    else:
        recentre = -torch.from_numpy(truth(centre, matrix, shift)[0].astype(np.float64))
    assert_accurate(
        map_checked(kernel, rows, (matrix, shift, recentre)), truth(rows, matrix, shift, recentre)
    )


def test_a_multiple_of_the_identity_is_align_rows(kernel):
    rows, (_, shift, recentre) = random_rows(50, 33, torch.float32), matrix_map(33)
    matrix = 0.9 * torch.eye(33, dtype=torch.float64)
    expected = kernel.align(rows, 0.9, shift, recentre)
    for a in (matrix, matrix.diagonal().clone()):
        torch.testing.assert_close(
            kernel.map(rows, a, shift, recentre), expected, rtol=0, atol=1e-6
        )
        huge = kernel.map(rows, a, shift, recentre, length=1e22)
        torch.testing.assert_close(huge / 1e22, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ("matrix", "diagonal"))
def test_same_bytes_for_any_number_of_threads(compiled_kernel, set_threads, kind):
    rows, row_map = random_rows(1000, 90, torch.float16), matrix_map(90, kind)
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(compiled_kernel.map(rows, *row_map))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("kind", ("matrix", "diagonal"))
def test_gradients(kind):
    rows, row_map = random_rows(4, 6).requires_grad_(), matrix_map(6, kind)
    for steps, length in product((2, 3), (1.0, None, -2.0)):
        assert gradcheck(lambda x, s=steps, c=length: align_rows(x, *row_map[:s], length=c), rows)
    op = torch.ops.realign_fast.map_rows.default
    torch.library.opcheck(op, (rows, *row_map, torch.float64, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_through_a_matrix(dtype):
    rows, row_map = random_rows(300, 12, dtype), matrix_map(12)
    rows[3], rows[7, 2] = 0, torch.nan
    sums = sum_rows(rows, *row_map)
    good = [i for i in range(300) if i != 7]
    expected = truth(rows[good], *row_map)
    error = 1e-12 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(exact(sums.total), expected.sum(axis=0), rtol=0, atol=error)
    assert float(sums.energy) == pytest.approx(299, abs=error)
    assert sums.counts.tolist() == [299, 1, 1]


def test_the_reference_is_what_it_says():
    """(The other tests would not notice if oracle and reference had one reading too few.)"""
    rows, (matrix, shift, recentre) = random_rows(5, 4), matrix_map(4)
    out = reference.map_rows(rows, matrix, shift, recentre, torch.float64)
    for row, result in zip(rows, out, strict=True):
        half = matrix @ (row / row.norm()) + shift
        whole = half / half.norm() + recentre
        torch.testing.assert_close(result, whole / whole.norm(), rtol=0, atol=1e-14)


def test_what_is_no_tensor_or_does_not_fit_is_named():
    rows, (matrix, shift, recentre) = random_rows(5, 4), matrix_map(4)
    same = align_rows(rows, matrix.numpy(), shift, recentre)
    assert torch.equal(same, align_rows(rows, matrix, shift, recentre))
    for call, error, words in (
        (lambda: align_rows(rows.numpy(), matrix, shift), TypeError, "as a tensor, got ndarray"),
        (lambda: align_rows(rows, matrix, None), TypeError, "shift as a tensor"),
        (lambda: align_rows(rows, matrix[:3], shift), ValueError, r"scale has shape \[3, 4\]"),
        (lambda: align_rows(rows, matrix, shift, out=rows.long()), TypeError, "expected out of"),
        (
            lambda: align_rows(rows, matrix, shift, out=torch.empty(4, 5).double().T),
            ValueError,
            "columns of out lie 5 apart",
        ),
    ):
        with pytest.raises(error, match=words):
            call()
