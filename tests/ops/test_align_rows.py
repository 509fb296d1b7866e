"""align_rows: every kernel against the float64 oracle, for every shape and number a row can have.

Rows lie in a buffer of NaN and results go into a buffer of NaN, so that an entry read beside a row,
left out, or written beside it shows.
"""

import os

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import DTYPES, assert_accurate, assert_near, exact, random_map, random_rows

# Of the row's largest entry: half an ulp of what is stored, and the roundings before it.
NEAR = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6, torch.float64: 1e-14}
COLUMNS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 127, 512, 1000, 16384)


def truth(rows, scale, shift, recentre=None, length=1.0):
    recentre = None if recentre is None else exact(recentre)
    return oracle.row_map(exact(rows), scale, exact(shift), recentre, length)


def surrounded(rows):
    """Return the rows as a view into a larger buffer of NaN: odd offset, row stride beyond D."""
    count, columns = rows.shape
    buffer = rows.new_full((count + 2, columns + 5), torch.nan)
    view = buffer[1:-1, 3 : 3 + columns]
    view.copy_(rows)
    return view, buffer


def align_checked(kernel, rows, row_map, dtype=None, length=1.0):
    """Return the kernel's result after checking that it wrote every entry and no other."""
    rows, _ = surrounded(rows.to(kernel.device))
    blank = torch.full_like(rows, torch.nan, dtype=dtype or rows.dtype)
    out, buffer = surrounded(blank)
    kernel.align_into(out, rows, *row_map, length=length)
    result = out.clone()
    out.fill_(torch.nan)
    assert bool(buffer.isnan().all()), "written outside the rows"
    allocated = kernel.align(rows, *row_map, dtype=dtype, length=length)
    assert torch.equal(allocated.nan_to_num(9), result.cpu().nan_to_num(9)), "out= differs"
    return result.cpu()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_for_every_dtype_and_width(kernel, dtype, columns):
    rows, row_map = random_rows(9, columns, dtype), random_map(columns)
    assert_accurate(align_checked(kernel, rows, row_map), truth(rows, *row_map))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes_with_and_without_the_last_step(kernel, dtype, out_dtype):
    rows, (scale, shift, recentre) = random_rows(13, 77, dtype), random_map(77)
    for row_map in ((scale, shift, recentre), (scale, shift)):
        result = align_checked(kernel, rows, row_map, out_dtype)
        assert result.dtype == out_dtype
        assert_accurate(result, truth(rows, *row_map))


LENGTHS = (None, 3.7, -0.3)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_another_length_and_without_the_last_normalisation(kernel, dtype, out_dtype):
    rows, row_map = random_rows(11, 45, dtype), random_map(45)
    rows[[2, 10]] = 0
    rows[5, 9] = torch.nan
    good = [i for i in range(11) if i != 5]
    for steps, length in [(steps, length) for steps in (2, 3) for length in LENGTHS]:
        result = align_checked(kernel, rows, row_map[:steps], out_dtype, length)
        expected = truth(rows[good], *row_map[:steps], length=length)
        assert bool(result[5].isnan().all())
        assert_near(result[good], expected, NEAR[out_dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_lengths_that_float32_coefficients_cannot_hold(kernel, dtype):
    rows, (scale, shift, recentre) = random_rows(9, 33, dtype), random_map(33)
    rows[::2] *= 1e14
    for length in (0.0, 1e-32, 1e-20, 1e22):
        result = align_checked(kernel, rows, (scale, shift, recentre), length=length)
        assert_near(result, truth(rows, scale, shift, recentre, length), NEAR[dtype])
    for size in (1e-32, 1e22):  # of s u + b, which is the result
        half = scale * size, shift * size
        assert_near(
            align_checked(kernel, rows, half, length=None), truth(rows, *half, None, None), 1e-6
        )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_one_ulp_for_each_of_a_million_entries(kernel, dtype):
    """Entries that cancel to nearly nothing included: float32 arithmetic is not enough for them."""
    rows, row_map = random_rows(1366, 768, dtype, seed=2), random_map(768, seed=12)
    assert_accurate(kernel.align(rows, *row_map), truth(rows, *row_map))


# The other kernels compute in float64, or promise an ulp.
@pytest.mark.parametrize("kernel", ("baseline", "avx2", "avx512", "cuda", "ptx"), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_bfloat16_results_are_rounded_float64_values_to_the_bit(kernel, dtype):
    """Also where entries are near a tie, cancel, underflow or leave the range of float32."""
    scale, shift, recentre = random_map(197)
    rows = random_rows(400, 197, seed=4)
    rows[100:200] = -shift * (1 + rows[100:200, :1]) + 1e-3 * rows[100:200]
    rows[200:] *= torch.logspace(-44, 37, 200, dtype=torch.float64)[:, None]
    rows, faint = rows.to(dtype), shift * torch.logspace(-45, 0, 197, dtype=torch.float64)
    for row_map, length in (
        ((scale, shift, recentre), 1.0),
        ((scale, shift), -3e-20),
        ((1e-6 * scale, faint, recentre), None),
    ):
        exact_rows = kernel.align(rows, *row_map, dtype=torch.float64, length=length)
        expected = exact_rows.float().bfloat16()
        result = kernel.align(rows, *row_map, dtype=torch.bfloat16, length=length)
        assert torch.equal(result.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("count", (0, 1, 2, 3, 4, 5))
def test_few_rows_and_none(kernel, count):
    rows, row_map = random_rows(count, 19, torch.float32), random_map(19)
    for length in (1.0, None):
        result = align_checked(kernel, rows, row_map, length=length)
        assert result.shape == (count, 19)
        if count:
            assert_accurate(result, truth(rows, *row_map, length=length))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_non_finite_row_becomes_nan_and_its_neighbours_do_not_notice(kernel, dtype, bad):
    rows, row_map = random_rows(9, 21, dtype), random_map(21)
    clean = kernel.align(rows, *row_map)
    for where in range(9):  # every place in a group of rows that a kernel takes at once
        spoiled = rows.clone()
        spoiled[where, (5 * where) % 21] = bad
        result = align_checked(kernel, spoiled, row_map)
        assert bool(result[where].isnan().all())
        others = [i for i in range(9) if i != where]
        assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_row_maps_as_the_zero_vector_does(kernel, dtype):
    rows, row_map = random_rows(9, 21, dtype), random_map(21)
    rows[[2, 7, 8]] = 0
    assert_accurate(align_checked(kernel, rows, row_map), truth(rows, *row_map))
    nothing = torch.zeros(21, dtype=torch.float64)
    assert bool((align_checked(kernel, rows, (1.0, nothing))[[2, 7, 8]] == 0).all())


MAGNITUDES = {
    torch.float16: (6e-8, 1e-6, 1e4, 65504.0),  # the first two are subnormal
    torch.bfloat16: (1e-39, 1e-30, 1e-20, 1e18, 1e30, 3e38),
    torch.float32: (1e-44, 1e-39, 1e-30, 1e-20, 1e-15, 1e15, 1e18, 1e30, 3e38),
    torch.float64: (5e-324, 1e-310, 1e-200, 1e-159, 1e-140, 1e140, 1e153, 1e200, 1e308),
}


@pytest.mark.parametrize(
    ("dtype", "size"), [(d, s) for d, sizes in MAGNITUDES.items() for s in sizes], ids=str
)
def test_norms_that_overflow_or_underflow_when_squared(kernel, dtype, size):
    """The largest entry is `size`; in a group of four, one row of usual size sits between."""
    rows = random_rows(8, 33)
    rows = rows / rows.abs().amax(dim=1, keepdim=True)
    rows = (rows * size).to(dtype)
    rows[5] = random_rows(1, 33, dtype)[0]
    row_map = random_map(33)
    for length in (1.0, None):
        result = align_checked(kernel, rows, row_map, length=length)
        assert_accurate(result, truth(rows, *row_map, length=length))


def cancelling(step, closeness, count=40, columns=65):
    """Rows (float64) and a map for which ``s u + b`` or ``e' + h`` is of size ``closeness``."""
    scale, shift, recentre = random_map(columns)
    noise = random_rows(count, columns, seed=6)
    noise = closeness * noise / noise.norm(dim=1, keepdim=True)
    if step == "s u + b":
        scale, shift = 1.0, shift / shift.norm()
        return noise - shift, (scale, shift, recentre)
    centre = random_rows(1, columns, seed=9)
    recentre = -torch.from_numpy(truth(centre, scale, shift)[0].astype(np.float64))
    return centre + noise * centre.norm(), (scale, shift, recentre)


@pytest.mark.parametrize("closeness", (0.8, 0.6, 0.5, 0.45, 0.3, 1e-1, 1e-2, 1e-4, 1e-6))
@pytest.mark.parametrize("step", ("s u + b", "e' + h"))
def test_float32_where_the_expansion_cancels(kernel, step, closeness):
    rows, row_map = cancelling(step, closeness)
    rows = rows.float()
    assert_accurate(align_checked(kernel, rows, row_map), truth(rows, *row_map))
    ended = row_map[:2] if step == "s u + b" else row_map  # the result is what cancels
    result = align_checked(kernel, rows, ended, length=None)
    assert_accurate(result, truth(rows, *ended, length=None))


@pytest.mark.parametrize("closeness", (0.6, 0.45, 1e-2, 1e-6))
@pytest.mark.parametrize("step", ("s u + b", "e' + h"))
def test_float64_where_the_expansion_cancels(kernel, step, closeness):
    """One rounding of u moves the result by 1/closeness roundings, and no method escapes that."""
    rows, row_map = cancelling(step, closeness)
    expected = truth(rows, *row_map)
    error = np.abs(exact(kernel.align(rows, *row_map)) - expected).max()
    assert error <= 1e-14 * np.abs(expected).max() / closeness


def test_exact_opposites_reach_the_zero_vector(kernel):
    shift = torch.zeros(20, dtype=torch.float64)
    shift[3] = -1.0
    recentre = random_rows(1, 20)[0]
    rows = torch.zeros(5, 20)
    rows[:, 3] = 7.0  # s u + b = 0, so unit(0) = 0 and the result is unit(h)
    assert_accurate(kernel.align(rows, 1.0, shift, recentre), truth(rows, 1.0, shift, recentre))
    assert bool((kernel.align(rows, 1.0, shift) == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(kernel, dtype):
    rows, row_map = random_rows(11, 50, dtype).to(kernel.device), random_map(50)
    expected = kernel.align(rows, *row_map)
    kernel.align_into(rows, rows, *row_map)
    assert torch.equal(rows.cpu(), expected)


def test_rows_expanded_from_one(kernel):
    row, row_map = random_rows(1, 50, torch.float16), random_map(50)
    expected = kernel.align(row, *row_map).expand(7, 50)
    assert torch.equal(kernel.align(row.expand(7, 50), *row_map), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("columns", "stride", "offset"), ((512, 512, 0), (520, 544, 0), (512, 512, 3))
)
def test_a_result_too_large_for_the_caches_has_the_same_bytes(
    compiled_kernel, dtype, columns, stride, offset
):
    """Above 16 MiB the kernels may write past the caches, which needs aligned rows (offset 0)."""
    count = (16 << 20) // (512 * dtype.itemsize) + 1
    rows, row_map = random_rows(50, columns, dtype).repeat(-(-count // 50), 1), random_map(columns)
    storage = torch.full((len(rows) * stride + offset,), torch.nan, dtype=dtype)
    out = storage.to(compiled_kernel.device)[offset:].view(len(rows), stride)[:, :columns]
    compiled_kernel.align_into(out, rows.to(compiled_kernel.device), *row_map)
    expected = compiled_kernel.align(rows[:50], *row_map)
    assert bool((out.cpu().view(-1, 50, columns) == expected).all())


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_row_has_the_same_bytes_in_any_company(kernel, dtype, out_dtype):
    """A batch, its rows one by one, or from the second on: where a row stands changes no bit.

    This is what makes results independent of batch size, shards, workers and threads.
    """
    rows, row_map = random_rows(258, 65, dtype), random_map(65)
    together = kernel.align(rows, *row_map, dtype=out_dtype)
    alone = range(0, len(rows), 32 if "TRITON_INTERPRET" in os.environ else 1)  # (50 ms a call)
    one_by_one = [kernel.align(rows[i, None], *row_map, dtype=out_dtype) for i in alone]
    assert torch.equal(together[:: alone.step], torch.cat(one_by_one))
    assert torch.equal(together[1:], kernel.align(rows[1:], *row_map, dtype=out_dtype))


@pytest.mark.parametrize("out_dtype", (torch.float16, torch.float64), ids=str)
def test_same_bytes_for_any_number_of_threads(compiled_kernel, set_threads, out_dtype):
    rows, row_map = random_rows(50_001, 65, torch.float32), random_map(65)
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(compiled_kernel.align(rows, *row_map, dtype=out_dtype))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("place", (0, 3, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_entry_decides_wherever_it_stands(compiled_kernel, dtype, place):
    """It is the largest by far, the only one, or the only one that is not finite."""
    limits, row_map = torch.finfo(dtype), random_map(9)
    rows = random_rows(6, 9, dtype)
    rows[:4] = 0
    rows[[0, 1, 2, 3, 4], place] = torch.tensor(
        [limits.max, -limits.tiny, limits.smallest_normal / 4, 1.5, limits.max], dtype=dtype
    )
    rows[5, place] = torch.nan
    result = align_checked(compiled_kernel, rows, row_map, torch.float64)
    assert_near(result[:5], truth(rows[:5], *row_map), 1e-6 if dtype != torch.float64 else 1e-14)
    assert bool(result[5].isnan().all())
