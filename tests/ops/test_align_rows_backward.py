"""align_rows_backward on every kernel against the oracle in longdouble, and its use by autograd.

An error is a share of the largest entry that the gradient of the result has after all divisions by
lengths, without the projections: rounding that gradient alone moves the result by as much.
"""

import os
from itertools import product

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import DTYPES, exact, random_map, random_rows, require_compiled
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from realign_fast import align_rows
from realign_fast.ops import reference
from realign_fast.ops.dispatch import rows_gradient

HALF, BFLOAT, FLOAT, DOUBLE = DTYPES
# Half an ulp of what is stored, and the roundings before it.
NEAR = {HALF: 5.5e-4, BFLOAT: 4.5e-3, FLOAT: 1e-6, DOUBLE: 2e-14}
OP = torch.ops.realign_fast.align_rows_backward.default


def gradients(rows, dtype=None, seed=8):
    """Random gradients as large as the rows, so that the results are neither large nor small."""
    sizes = rows.double().abs().amax(dim=1, keepdim=True).nan_to_num(1, 1)
    sizes = torch.where(sizes > 0, sizes, 1)
    return (random_rows(*rows.shape, seed=seed) * sizes / 8).to(dtype or rows.dtype)


def assert_near(result, rows, grad, row_map, length=1.0, normalize=True, error=None):
    vectors = [exact(torch.as_tensor(value, dtype=torch.float64)) for value in row_map]
    arguments = exact(rows), exact(grad), *vectors, *[None] * (3 - len(row_map))
    truth, factors = oracle.row_map_gradient(*arguments, length, normalize)
    largest = np.abs(truth).max(axis=1, keepdims=True, initial=0)
    size = np.maximum(largest, factors * np.abs(exact(grad)).max(axis=1, keepdims=True, initial=0))
    off = np.abs(exact(result) - truth) / np.where(size > 0, size, 1)
    assert off.max(initial=0) <= (error or NEAR[result.dtype])


def surrounded(rows, extra):
    """Return the rows as a view into a larger buffer of NaN: odd offset, row stride beyond D."""
    buffer = rows.new_full((len(rows) + 2, rows.shape[1] + 2 + extra), torch.nan)
    view = buffer[1:-1, 1 : 1 + rows.shape[1]]
    return view.copy_(rows)


def checked(kernel, rows, grad, row_map, length=1.0, normalize=True):
    """Return the result, after checking that strided rows between NaN have the same bytes."""
    result = kernel.gradient(rows, grad, row_map, length, normalize)
    assert result.dtype == rows.dtype and result.is_contiguous()
    apart = surrounded(rows.to(kernel.device), 1), surrounded(grad.to(kernel.device), 4)
    strided = kernel.gradient(*apart, row_map, length, normalize)
    assert torch.equal(strided.nan_to_num(9), result.nan_to_num(9)), "a stride changes bytes"
    return result


@pytest.mark.parametrize("columns", (1, 2, 7, 8, 33, 127, 512, 1000, 4100))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_for_every_dtype_and_width(kernel, dtype, columns):
    rows, row_map = random_rows(7, columns, dtype), random_map(columns)
    grad = gradients(rows)
    assert_near(checked(kernel, rows, grad, row_map), rows, grad, row_map)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes_and_every_kind_of_map(kernel, dtype, grad_dtype):
    rows, row_map = random_rows(7, 45, dtype), random_map(45)
    grad = gradients(rows, grad_dtype)
    for steps, length, normalize in product((2, 3), (1.0, None, -3.7), (True, False)):
        options = row_map[:steps], length, normalize
        assert_near(checked(kernel, rows, grad, *options), rows, grad, *options)


@pytest.mark.parametrize("count", (0, 1, 2, 3, 5))
def test_few_rows_and_none(kernel, count):
    rows, row_map = random_rows(count, 19, HALF), random_map(19)
    for grad in (gradients(rows), gradients(rows, FLOAT), gradients(rows, DOUBLE)):
        result = kernel.gradient(rows, grad, row_map)
        assert (result.shape, result.dtype) == ((count, 19), HALF)
        assert_near(result, rows, grad, row_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_has_no_gradient_and_its_neighbours_do_not_notice(kernel, dtype):
    rows, row_map = random_rows(9, 21, dtype), random_map(21)
    grad = gradients(rows)
    clean = kernel.gradient(rows, grad, row_map)
    spoiled, bad = rows.clone(), [1, 2, 4, 8]
    spoiled[1], spoiled[2, 3], spoiled[4, 20], spoiled[8, 0] = 0, torch.nan, torch.inf, -torch.inf
    for grad_there in (grad, grad.index_fill(0, torch.tensor(bad), torch.nan)):
        result = checked(kernel, spoiled, grad_there, row_map)
        others = [i for i in range(9) if i not in bad]
        assert torch.equal(result[others], clean[others])
        assert not bool(result[bad].any()), "0, whatever the gradient is there"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_zero_or_not_finite(kernel, dtype):
    rows, row_map = random_rows(7, 21, dtype), random_map(21)
    grad = gradients(rows)
    clean = kernel.gradient(rows, grad, row_map)
    grad[1], grad[3, 5], grad[6, 20] = 0, torch.nan, torch.inf
    result = checked(kernel, rows, grad, row_map)
    assert not bool(result[1].any())
    assert bool(result[3].isnan().all()) and not bool(result[6].isfinite().all())
    assert torch.equal(result[[0, 2, 4, 5]], clean[[0, 2, 4, 5]])


MAGNITUDES = {
    HALF: (6e-8, 1e-6, 1e4, 65504.0),
    BFLOAT: (1e-39, 1e-20, 1e18, 3e38),
    FLOAT: (1e-44, 1e-30, 1e-15, 1e15, 1e30, 3e38),
    DOUBLE: (1e-290, 1e-200, 1e-140, 1e140, 1e200, 1e306),
}


@pytest.mark.parametrize(
    ("dtype", "size"), [(d, s) for d, sizes in MAGNITUDES.items() for s in sizes], ids=str
)
def test_norms_that_overflow_or_underflow_when_squared(kernel, dtype, size):
    """Of the rows and, in other rows, of their gradients; both differ by a factor that is kept."""
    rows, row_map = random_rows(6, 33), random_map(33)
    rows = rows / rows.abs().amax(dim=1, keepdim=True)
    wide = dtype if dtype == DOUBLE else FLOAT
    rows[:4] *= size
    rows = rows.to(dtype)
    grad = gradients(rows, wide)
    assert_near(checked(kernel, rows, grad, row_map), rows, grad, row_map)
    if dtype in (FLOAT, DOUBLE):  # small gradients of usual rows, and the reverse
        grad = (random_rows(6, 33, seed=8) / 5 * torch.tensor(size, dtype=torch.float64)).to(dtype)
        result = checked(kernel, rows, grad, row_map)
        if dtype == DOUBLE or 1e-31 < size < 1e31:
            assert_near(result[4:], rows[4:], grad[4:], row_map)


@pytest.mark.parametrize("closeness", (0.6, 0.45, 0.3, 1e-1, 1e-3, 1e-6))
@pytest.mark.parametrize("step", ("s u + b", "e' + h"))
def test_where_the_expansion_cancels(kernel, step, closeness):
    rows, (scale, shift, recentre) = random_rows(30, 65, seed=6), random_map(65)
    noise = closeness * rows / rows.norm(dim=1, keepdim=True)
    if step == "s u + b":
        scale, shift = 1.0, shift / shift.norm()
        rows = (noise - shift).float()
    else:
        centre = random_rows(1, 65, seed=9)
        image = oracle.row_map(exact(centre), scale, exact(shift))[0]
        recentre = -torch.from_numpy(image.astype(np.float64))
        rows = (centre + noise * centre.norm()).float()
    grad = random_rows(30, 65, FLOAT, seed=8)
    row_map = scale, shift, recentre
    for length in (1.0, None):
        result = checked(kernel, rows, grad, row_map, length)
        assert_near(result, rows, grad, row_map, length, error=2e-6)


def test_a_gradient_along_the_result_vanishes(kernel):
    """The length of the result is fixed. Errors stay as small as those of the gradient itself."""
    rows, row_map = random_rows(20, 300, FLOAT), random_map(300)
    along = reference.align_rows(rows, torch.tensor(row_map[0]).double(), *row_map[1:], FLOAT)
    result = kernel.gradient(rows, along, row_map)
    assert_near(result, rows, along, row_map)
    assert float(result.abs().max()) < 1e-6


@pytest.mark.parametrize("vector", ("s u + b", "e' + h"))
def test_vectors_that_are_exactly_zero_have_no_gradient(kernel, vector):
    shift, rows = torch.zeros(20, dtype=torch.float64), torch.zeros(3, 20)
    shift[3], rows[:, 3], rows[1, 4] = -1.0, 7.0, 1.0
    row_map = (1.0, shift) if vector == "s u + b" else (1.0, 0 * shift, shift)
    result = kernel.gradient(rows, torch.full_like(rows, torch.nan), row_map)
    assert not bool(result[[0, 2]].any()) and bool(result[1].isnan().all())


@pytest.mark.parametrize("dtype", (FLOAT, DOUBLE), ids=str)
def test_a_row_has_the_same_bytes_in_any_company(kernel, dtype):
    rows, row_map = random_rows(70, 65, dtype), random_map(65)
    grad = gradients(rows)
    together = kernel.gradient(rows, grad, row_map)
    step = 32 if "TRITON_INTERPRET" in os.environ else 1
    one_by_one = [
        kernel.gradient(rows[i, None], grad[i, None], row_map) for i in range(0, 70, step)
    ]
    assert torch.equal(together[::step], torch.cat(one_by_one))
    assert torch.equal(together[1:], kernel.gradient(rows[1:], grad[1:], row_map))


def test_same_bytes_for_any_number_of_threads(compiled_kernel, set_threads):
    rows, row_map = random_rows(9001, 65, FLOAT), random_map(65)
    grad, results = gradients(rows), []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(compiled_kernel.gradient(rows, grad, row_map))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_what_does_not_fit_is_refused():
    require_compiled()
    rows, (_, shift, recentre) = random_rows(3, 4), random_map(4)
    one = torch.ones((), dtype=torch.float64)
    for grad, words in (
        (rows[:2], r"a gradient of the shape of the rows, \[3, 4\], got \[2, 4\]"),
        (rows.T.contiguous().T, "contiguous columns"),
    ):
        with pytest.raises(RuntimeError, match=words):
            OP(rows, grad, one, shift, recentre)


# ---- What autograd makes of it

COLUMNS = 6
MATRIX = torch.eye(COLUMNS).double() + 0.3 * random_rows(COLUMNS, COLUMNS, seed=3)
LINEAR = {"number": 1.2, "diagonal": MATRIX.diagonal().clone(), "matrix": MATRIX}


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_every_kind_of_map(linear, dtype):
    """Also of a sum, whose gradient is one number with strides of 0, and of bad rows."""
    rows, (_, *vectors) = random_rows(40, COLUMNS, dtype), random_map(COLUMNS)
    rows[3], rows[5, 2], rows[7] = 0, torch.nan, rows[7] * 1e-3
    good = [i for i in range(40) if i not in (3, 5)]
    for steps, length, out_dtype in product((1, 2), (1.0, None), (dtype, FLOAT)):
        leaf = rows.clone().requires_grad_()
        row_map = LINEAR[linear], *vectors[:steps]
        align_rows(leaf, *row_map, length=length, out_dtype=out_dtype).sum().backward()
        assert not bool(leaf.grad[[3, 5]].any())
        grad = torch.ones(len(good), COLUMNS, dtype=out_dtype)
        error = 4e-6 if dtype == FLOAT else None
        assert_near(leaf.grad[good], rows[good], grad, row_map, length, error=error)


@pytest.mark.parametrize("linear", LINEAR)
def test_first_and_second_derivatives(linear):
    rows, (_, *vectors) = random_rows(3, COLUMNS).requires_grad_(), random_map(COLUMNS)
    for steps, length in product((1, 2), (1.0, None, -2.0)):
        row_map = LINEAR[linear], *vectors[:steps]
        for check in (gradcheck, gradgradcheck):
            assert check(lambda x, m=row_map, c=length: align_rows(x, *m, length=c), rows)


@pytest.mark.parametrize("linear", LINEAR)
def test_the_kernel_answers_and_for_a_second_derivative_the_reference(linear):
    require_compiled()
    rows, (_, *vectors) = random_rows(5, COLUMNS, FLOAT).requires_grad_(), random_map(COLUMNS)
    loss = align_rows(rows, LINEAR[linear], *vectors).square().sum()
    for twice in (False, True):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            torch.autograd.grad(loss, rows, retain_graph=True, create_graph=twice)
        ran = {event.key for event in trace.key_averages()}
        assert ("realign_fast::align_rows_backward" in ran) != twice
        assert ("aten::linalg_vector_norm" in ran) == twice


@pytest.mark.parametrize("linear", LINEAR)
def test_compiled_functions_have_the_same_gradient(linear):
    row_map = LINEAR[linear], *random_map(COLUMNS)[1:]

    def loss(rows):
        return align_rows(rows * 2, *row_map)[:, 0].square().sum()

    rows = random_rows(5, COLUMNS, FLOAT).requires_grad_()
    (expected,) = torch.autograd.grad(loss(rows), rows)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(rows), rows)
    torch.testing.assert_close(gradient, expected)


def test_opcheck():
    rows, (scale, shift, recentre) = random_rows(5, 7), random_map(7)
    scale = torch.tensor(scale, dtype=torch.float64)
    grad = gradients(rows, FLOAT)
    for last, length, normalize in ((recentre, 1.0, True), (None, None, False)):
        torch.library.opcheck(OP, (rows, grad, scale, shift, last, length, normalize))
    assert torch.equal(
        rows_gradient(rows, grad.T.contiguous().T, scale, shift, recentre, 1.0),
        OP(rows, grad, scale, shift, recentre),
    )
