"""csrc/cuda on the machine that runs its PTX: every kernel, the same bytes, wrong kernels noticed.

The numbers of the ops are tested in test_<op>.py under the name "ptx", with the same checks for
bounds and races as here. ``pytest -s`` prints the score of the mutants.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import ptx_machine
from support.op_checks import DTYPES, kernel_or_skip, random_map, random_rows
from support.ptx_machine import mutants

from realign_fast.ops import reference

HALF, BFLOAT, FLOAT, DOUBLE = DTYPES
# Of a warp for each row of 1024 float16 entries, with some room.
MOST_INSTRUCTIONS = {
    "align_kernel": 750,
    "backward_kernel": 1300,
    "pack_kernel": 1200,
    "finish_rows": 1500,
}
pytestmark = pytest.mark.skipif(bool(ptx_machine.why_not()), reason=ptx_machine.why_not())


@pytest.fixture
def machine():
    machine = ptx_machine.load()
    yield machine
    machine.configure()


@pytest.fixture
def kernel(machine):
    return kernel_or_skip("ptx")


def results(kernel, rows, columns):
    row_map = random_map(columns)
    weights = torch.linspace(0.1, 2, len(rows), dtype=torch.float64)
    matrix = torch.eye(columns).double() + 0.01 * random_rows(columns, columns, seed=3)
    found = [kernel.align(rows, *row_map, length=length) for length in (1.0, None)]
    found += [kernel.gradient(rows, rows.flip(0), row_map)]
    found += kernel.sum(rows, *row_map)
    found += [kernel.sum(rows, normalize=False).total]
    if columns < 100:  # (the product is the same for any width)
        found += [kernel.map(rows, matrix, *row_map[1:])]
    for accurate in (False, True) if columns < 1000 else ():
        scatter = torch.zeros(columns, columns, dtype=torch.float64)
        total = torch.zeros(columns, dtype=torch.float64)
        kernel.add_scatter(scatter, total, rows, row_map[1], weights, True, accurate)
        found += [scatter, total]
    return found


@pytest.mark.parametrize("columns", (70, 300, 1100), ids=("a warp a row", "more tiles", "a block"))
def test_same_bytes_for_any_order_of_threads_and_size_of_device(machine, kernel, columns):
    """A partition that asks the device for its size, or sums in any order, would change them."""
    rows = random_rows(300 if columns < 100 else 70, columns, HALF)
    rows[[3, 17]] = 0
    rows[5, 2] = torch.nan
    expected = results(kernel, rows, columns)
    for order, multiprocessors in (("backward", 1), ("shuffled", 7)):
        machine.configure(order, multiprocessors)
        others = results(kernel, rows, columns)
        for a, b in zip(expected, others, strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def test_more_slices_and_chunks_than_one(kernel):
    """2500 rows are three slices of a product, and a part of one."""
    rows, centre = random_rows(2500, 20, FLOAT), random_map(20)[1].float().double()
    for variant, share in ((0, 4e-7), (1, 2e-4)):
        scatter, total = torch.zeros(20, 20).double(), torch.zeros(20).double()
        expected = [scatter.clone(), total.clone()]
        options = (rows, centre, None, True, False)
        counts = kernel.functions.add_scatter_(scatter, total, *options, variant)
        assert torch.equal(counts, reference.add_scatter_(*expected, *options))
        error = float((scatter - expected[0]).norm() / expected[0].norm())
        assert error < share, f"variant {variant}: {error:.1e}"


@pytest.mark.parametrize("accurate", (False, True))
def test_no_byte_depends_on_where_a_chunk_ends(kernel, monkeypatch, accurate):
    """The rows of a chunk are a matter of memory and speed."""
    rows, centre = random_rows(3000, 20, HALF), random_map(20)[1]
    weights = torch.linspace(0.1, 2, len(rows), dtype=torch.float64)
    few, matrix = random_rows(300, 20, FLOAT), 0.3 * random_rows(20, 20, seed=3)
    found = []
    for kibibytes in (1 << 20, 1):  # one chunk, and chunks of one slice
        monkeypatch.setenv("REALIGN_FAST_CUDA_CHUNK_KIB", str(kibibytes))
        scatter, total = torch.zeros(20, 20).double(), torch.zeros(20).double()
        kernel.add_scatter(scatter, total, rows, centre, weights, True, accurate)
        mapped = kernel.map(few.double() if accurate else few, matrix, centre, centre)
        found.append((scatter, total, mapped))
    for one_chunk, many_chunks in zip(*found, strict=True):
        assert torch.equal(one_chunk, many_chunks)


def test_the_grids_fill_a_large_device(machine, kernel):
    """At 16 rows a block the packing of 1,000 rows is 63 blocks; no sum is left to one block."""
    rows = random_rows(2500, 20, HALF)
    before = machine.usage()
    zeros = torch.zeros(20).double()
    kernel.add_scatter(torch.diag(zeros), zeros.clone(), rows, zeros, None, True, False)
    blocks = Counter()
    for name, use in machine.usage().items():
        blocks[ptx_machine.readable(name).split("<")[0]] += use.blocks - before[name].blocks
    assert blocks["pack_kernel"] == 158
    assert blocks["product_kernel"] == 3  # slices, of one tile
    assert blocks["add_slices"] == 16
    assert blocks["finish_scatter"] == 64


def test_the_instructions_of_a_row(machine):
    """PTX instructions that a warp executes for one more row of 1024 float16 entries.

    docs/kernels.md says what they were, and what they are in machine code.
    """
    row_map = number(1.0), *random_map(1024)[1:]
    matrix = torch.eye(1024).double()

    def add(count):
        sums = torch.zeros(1024, 1024).double(), torch.zeros(1024).double()
        rows = random_rows(count, 1024, HALF)
        machine.add_scatter_(*sums, rows, row_map[1], None, True, False, 0)

    calls = {
        ("align_kernel", 24): lambda count: machine.align_rows(
            random_rows(count, 1024, HALF), *row_map, HALF, 1.0, 0
        ),
        ("backward_kernel", 24): lambda count: machine.align_rows_backward(
            *random_rows(2 * count, 1024, HALF).chunk(2), *row_map, 1.0, True, 0
        ),
        ("pack_kernel", 32): add,
        ("finish_rows", 128): lambda count: machine.map_rows(
            random_rows(count, 1024, HALF), matrix, *row_map[1:], HALF, 1.0, 0
        ),
    }
    machine.configure(find_races=False)
    found = {}
    for (kernel, count), call in calls.items():
        steps = []
        for rows in (count, 2 * count):
            before = machine.usage()
            call(rows)
            steps.append(
                sum(
                    use.steps - before[name].steps
                    for name, use in machine.usage().items()
                    if kernel in name
                )
            )
        found[kernel] = (steps[1] - steps[0]) / count
    print(f"\ninstructions of a row: {found}")
    for kernel, most in MOST_INSTRUCTIONS.items():
        assert found[kernel] <= most, f"{kernel}: {found[kernel]}"


@pytest.mark.parametrize("columns", (20, 70, 136))
def test_float16_rows_are_multiplied_as_they_are_or_copied(machine, kernel, columns):
    """Rows whose addresses are no multiples of 16 bytes are packed, and give the same bytes."""
    rows, matrix = random_rows(150, columns, HALF), 0.3 * random_rows(columns, columns, seed=3)
    rows[3], rows[7, 2], rows[9] = 0, torch.inf, rows[9] * 1e-4
    _, shift, recentre = random_map(columns)
    aligned = torch.zeros(150, 144, dtype=HALF)[:, :columns].copy_(rows)
    shifted = torch.zeros(150, 145, dtype=HALF)[:, 1 : columns + 1].copy_(rows)
    packed = [name for name in machine.usage() if "pack_kernelIN3c104HalfES" in name]
    results = []
    for source, packs in ((aligned, 0), (shifted, 1)):
        before = machine.usage()
        result = kernel.map(source, matrix, shift, recentre)
        after = machine.usage()
        assert sum(after[name].launches - before[name].launches for name in packed) == packs
        results.append(result.nan_to_num(9))
    assert torch.equal(*results)
    assert_close(result, reference.map_rows(rows, matrix, shift, recentre, DOUBLE), 1e-3)


def test_the_low_terms_squares_come_back_to_the_diagonal(kernel):
    """The trace of two float16 terms would otherwise always be low by about 2^-24 of itself.

    The machine's tensor cores cut sums off, a bias too; so rows whose products need no rounding
    are used: each has one entry, one bit high and one bit in the low term.
    """
    value = 1 + 2.0**-12
    rows = torch.diag(torch.full((16,), value, dtype=torch.float64)).float()
    scatter, total = torch.zeros(16, 16).double(), torch.zeros(16).double()
    centre = torch.zeros(16, dtype=torch.float64)
    kernel.add_scatter(scatter, total, rows, centre, None, False, False)
    assert scatter.diagonal().tolist() == [value**2] * 16
    assert total.tolist() == [value] * 16


def test_columns_of_very_different_size_keep_their_digits(kernel):
    """Rows taken as they are: each column has its own power of two."""
    size = torch.logspace(-12, 12, 25, dtype=torch.float64)
    rows = (random_rows(200, 25) * size).float()
    scatter, total = torch.zeros(25, 25).double(), torch.zeros(25).double()
    expected = [scatter.clone(), total.clone()]
    options = (rows, torch.zeros(25).double(), None, False, False)
    kernel.add_scatter(scatter, total, *options)
    reference.add_scatter_(*expected, *options)
    error = ((scatter - expected[0]) / torch.outer(size, size)).abs().max() / len(rows)
    assert float(error) < 1e-6


def test_what_does_not_exist_is_refused(kernel):
    rows, zeros = random_rows(3, 4), torch.zeros(4).double()
    with pytest.raises(
        RuntimeError, match="variant 2 is not available here; on CUDA it is 0, or 1"
    ):
        kernel.functions.add_scatter_(
            torch.zeros(4, 4).double(), zeros.clone(), rows, zeros, None, True, False, 2
        )
    with pytest.raises(RuntimeError, match="overlap"):
        kernel.functions.align_rows_(rows[1:], rows[:-1], zeros[0], zeros, None)


def test_a_fault_of_a_kernel_becomes_the_error_of_a_cuda_call(machine):
    """Here every thread does the work of the first one."""
    rows, scale, shift = random_rows(5, 40, HALF), number(1.0), torch.ones(40).double()
    kernel = next(name for name in machine.usage() if "align_kernelIN3c104HalfEfLi32" in name)
    text = machine.text_of(kernel)
    machine.load_ptx(".entry " + text.replace("%tid.x", "%ctaid.x"))
    try:
        with pytest.raises(RuntimeError, match=f"a CUDA call failed: race in .* in {kernel}"):
            machine.align_rows(rows, scale, shift, None, HALF, 1.0, 0)
    finally:
        machine.load_ptx(".entry " + text)


# ---- Every instantiation of every kernel


def assert_close(result, expected, share):
    assert torch.equal(result.isnan(), expected.isnan())
    distance = (result.double() - expected.double()).nan_to_num().abs().amax()
    assert float(distance) <= share * float(expected.double().nan_to_num().abs().amax())


def number(value):
    return torch.tensor(value, dtype=DOUBLE)


SHARE = {HALF: 1e-3, BFLOAT: 8e-3, FLOAT: 4e-6, DOUBLE: 1e-12}


def unusual_rows(count, columns, dtype):
    """Rows of which some are zero, non-finite, huge or tiny."""
    rows = random_rows(count, columns, dtype)
    rows[::37] = 0
    rows[4::50, columns // 2] = torch.nan
    if dtype not in (HALF, BFLOAT):
        rows[2::40] *= 1e-22
        rows[3::41] *= 1e18
    return rows


def align_all(machine, dtype, columns, count=13):
    rows, (scale, *vectors) = unusual_rows(count, columns, dtype), random_map(columns)
    rows[-1] = (-vectors[0] / vectors[0].norm()).to(dtype)  # cancels
    for out in DTYPES:
        expected = reference.align_rows(rows[:-1], number(scale), *vectors, DOUBLE)
        result = machine.align_rows(rows, number(scale), *vectors, out, 1.0, 0)
        assert_close(result[:-1], expected, SHARE[out])


def backward_all(machine, dtype, columns, count=13):
    rows, (scale, *vectors) = unusual_rows(count, columns, dtype), random_map(columns)
    rows[-1] = (-vectors[0] / vectors[0].norm()).to(dtype)  # cancels
    grad = random_rows(count, columns, seed=8)
    grad *= rows.double().square().mean(dim=1, keepdim=True).sqrt().nan_to_num(1)
    grad[5], grad[6, 1] = 0, torch.inf
    for grad_dtype in DTYPES:
        for options in ((vectors[1], 1.0, True), (None, 1.0, False), (None, None, True)):
            arguments = grad.to(grad_dtype), number(scale), vectors[0], *options
            expected = reference.align_rows_backward(rows.double(), *arguments)
            result = machine.align_rows_backward(rows, *arguments, 0)
            for i in range(count):
                if i not in (6, count - 1):
                    assert_close(result[i], expected[i].to(dtype).double(), SHARE[dtype])
            assert not bool(result[6].isfinite().all())


def sum_all(machine, dtype, columns, count=130):
    rows, (scale, *vectors) = unusual_rows(count, columns, dtype), random_map(columns)
    for options in ((number(scale), *vectors, True), (None, None, None, True)):
        sums = machine.sum_rows(rows, *options, 0)
        expected = reference.sum_rows(rows, *options)
        assert_close(sums[0], expected[0], 2e-6)
        assert_close(sums[1], expected[1], 1e-6)
        assert torch.equal(sums[2], expected[2])
    options = (None, None, None, False)
    expected = reference.sum_rows(rows, *options)
    assert_close(machine.sum_rows(rows, *options, 0)[0], expected[0], 1e-12)


def add_all(machine, dtype, columns, count=150, modes=((False, 0), (False, 1), (True, 0))):
    rows, centre = unusual_rows(count, columns, dtype), random_map(columns)[1].float().double()
    weights = torch.rand(count, generator=torch.Generator().manual_seed(1)).double()
    weights /= rows.double().abs().amax(dim=1).nan_to_num(1).clamp(min=1) ** 2
    some = slice(
        max(columns - 300, 0), columns
    )  # of the columns; they take long where all are many
    for (accurate, variant), normalize in itertools.product(modes, (True, False)):
        if columns > 1000 and not normalize:
            continue
        options = (weights, normalize, accurate)
        scatter, total = torch.zeros(columns, columns).double(), torch.zeros(columns).double()
        counts = machine.add_scatter_(scatter, total, rows, centre, *options, variant)
        scatter, total = scatter[some, some], total[some]
        expected = torch.zeros_like(scatter), torch.zeros_like(total)
        units = rows.double() + 0 * rows.double().sum(dim=1, keepdim=True)  # NaN in all of a row
        units = reference.unit(units) if normalize else units
        expected_counts = reference.add_scatter_(
            *expected, units[:, some], centre[some], weights, False, accurate
        )
        assert torch.equal(counts, expected_counts)
        share = 1e-12 if accurate or dtype == DOUBLE else 2e-3 if variant else 6e-6
        assert_close(scatter, expected[0], share)
        assert_close(total, expected[1], share)


def map_all(machine, dtype, columns, count=13):
    rows, (_, *vectors) = unusual_rows(count, columns, dtype), random_map(columns)
    diagonal = 1 + random_rows(1, columns, seed=4)[0] / 9
    matrix = torch.diag(diagonal) + 0.3 * random_rows(columns, columns, seed=3) / columns**0.5
    for linear in (matrix, diagonal) if columns < 1000 else (diagonal,):
        for out, variant in itertools.product({dtype, FLOAT, DOUBLE}, (0, 1)):
            result = machine.map_rows(rows, linear, *vectors, out, 1.0, variant)
            expected = reference.map_rows(rows, linear, *vectors, DOUBLE)
            fast = 2e-3 if variant and linear.dim() == 2 else 0
            assert_close(result, expected, SHARE[out] + fast)


def widths(dtype):
    """Return numbers of columns for a warp a row, a block a row, and rows that are read again."""
    entries = 16 // dtype.itemsize
    return 20, 32 * 4 * entries + 1, 128 * 4 * entries + 1


OPS = {"align_rows": align_all, "align_rows_backward": backward_all, "sum_rows": sum_all}
OPS |= {"add_scatter": add_all, "map_rows": map_all}


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_instantiation_is_launched(machine, op):
    before = machine.usage()
    for dtype in DTYPES:
        for columns in widths(dtype):
            if op != "add_scatter" or columns < 1000:
                OPS[op](machine, dtype, columns)
            else:  # (one mode of each kind of operand, and fewer rows)
                modes = ((False, 0), (True, 0)) if dtype != DOUBLE else ((True, 0),)
                add_all(machine, dtype, columns, 9, modes)
    if op == "sum_rows":
        sum_all(machine, HALF, 20, 300)  # more than one chunk
    usage = machine.usage()
    kernels = machine.kernels[op]
    never = [name for name in kernels if usage[name].launches == before[name].launches]
    assert not never, "never launched:\n" + "\n".join(map(ptx_machine.readable, never))
    executed, total = (
        sum(getattr(usage[name], field) for name in kernels)
        for field in ("executed", "instructions")
    )
    print(f"\n{op}: {len(kernels)} kernels launched, {executed / total:.0%} of their PTX executed")


# ---- Wrong kernels: the checks above must notice each


def sum_many(machine):
    """More chunks than blocks, so that a block sums several."""
    machine.configure(multiprocessors=1)
    sum_all(machine, FLOAT, 20, 2500)


def sum_many_wide(machine):
    machine.configure(multiprocessors=1)
    sum_all(machine, FLOAT, 520, 2300)


def map_cancelling(machine, columns=140, count=70, dtype=FLOAT):
    """Rows whose image cancels are mapped step by step, two of them by one block."""
    rows, (_, shift, recentre) = unusual_rows(count, columns, dtype), random_map(columns)
    matrix = torch.eye(columns).double() + 0.3 * random_rows(columns, columns) / columns**0.5
    rows[[20, 68]] = (torch.linalg.solve(matrix, -shift).float() * (1 + 1e-3)).to(dtype)
    result = machine.map_rows(rows, matrix, shift, recentre, DOUBLE, 1.0, 0)
    others = [i for i in range(count) if i not in (20, 68)]
    expected = reference.map_rows(rows, matrix, shift, recentre, DOUBLE)
    assert_close(result[others], expected[others], 1e-12)
    result = machine.map_rows(rows, matrix, shift, recentre, FLOAT, 1.0, 0)
    assert_close(result, expected, 1e-5)


# Of each kernel, by a part of its symbol: calls that reach all of it.
WORK: dict[str, Callable] = {
    "align_kernelIffLi128ELi4": partial(align_all, dtype=FLOAT, columns=600),
    "align_kernelIN3c108BFloat16EdLi128ELi0": partial(align_all, dtype=BFLOAT, columns=4100),
    "backward_kernelIfffLi128ELi4": partial(backward_all, dtype=FLOAT, columns=600),
    "backward_kernelIN3c108BFloat16ES": partial(backward_all, dtype=BFLOAT, columns=4100),
    "sum_kernelIffLi32ELi4": sum_many,
    "sum_kernelIffLi128ELi4": sum_many_wide,
    "pack_kernelIfN3c104HalfELi32ELi4": partial(add_all, dtype=FLOAT, columns=100),
    "pack_kernelIfN3c104HalfELi128ELi4": partial(
        add_all, dtype=FLOAT, columns=520, count=140, modes=((False, 0),)
    ),
    "product_kernelINS_8HalfTileILb0ELi2": partial(add_all, dtype=HALF, columns=140, count=200),
    "product_kernelINS_8HalfTileILb0ELi1": partial(add_all, dtype=HALF, columns=140, count=200),
    "product_kernelINS_10DoubleTileILb0E": partial(add_all, dtype=HALF, columns=140, count=200),
    "product_kernelINS_8HalfTileILb1ELi2": partial(map_all, dtype=FLOAT, columns=140, count=130),
    "product_kernelINS_8HalfTileILb1ELi1ELi2": partial(map_all, dtype=HALF, columns=140, count=130),
    "product_kernelINS_8HalfTileILb1ELi1ELi1": partial(map_all, dtype=HALF, columns=140, count=130),
    "product_kernelINS_10DoubleTileILb1E": partial(map_all, dtype=HALF, columns=140, count=130),
    "finish_rowsIffLb0": map_cancelling,
    "finish_rowsIN3c104HalfEfLb1": partial(map_cancelling, dtype=HALF),
    "prepare_vectorsIfLi8E": partial(align_all, dtype=HALF, columns=300),
    "12weight_peaks": partial(add_all, dtype=HALF, columns=20, count=600),
    "13matrix_scales": partial(map_all, dtype=HALF, columns=140),
    "11pack_matrixI": partial(map_all, dtype=HALF, columns=140),
}
# Mutants that compute the same, by kernel: how many, and why.
ONE_TEAM = (
    "a block of one team clears and adds each column with the same thread, and each sum over the "
    "team has a barrier before threads use the columns of others"
)
EQUIVALENT = {
    "sum_kernelIffLi128ELi4": (2, f"after clearing, and before step-by-step rows: {ONE_TEAM}"),
    "pack_kernelIfN3c104HalfELi128ELi4": (
        2,
        f"before step-by-step rows, and at the end: {ONE_TEAM}",
    ),
}
QUICK = ("sum_kernelIffLi32", "pack_kernelIfN3c104HalfELi32", "product_kernelINS_8HalfTileILb0ELi2")


def survivors(machine, key):
    """Return how many mutants of a kernel there are, and those that its work does not notice."""
    kernel = next(name for name in machine.usage() if key in name)
    text = machine.text_of(kernel)
    WORK[key](machine)
    count, unnoticed = 0, []
    for mutant in mutants.all_mutants(kernel, text):
        count += 1
        machine.load_ptx(mutant.module)
        try:
            WORK[key](machine)
            unnoticed.append(f"{ptx_machine.readable(kernel)} {mutant.change}")
        except (AssertionError, RuntimeError):
            pass
        finally:
            machine.load_ptx(".entry " + text)
    return count, unnoticed


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([key for key in WORK if key.startswith(QUICK)], id="some kernels"),
        pytest.param(list(WORK), id="all kernels", marks=pytest.mark.slow),
    ],
)
def test_wrong_kernels_are_noticed(machine, keys):
    total, noticed, unexplained = 0, 0, []
    for key in keys:
        count, unnoticed = survivors(machine, key)
        total, noticed = total + count, noticed + count - len(unnoticed)
        explained, reason = EQUIVALENT.get(key, (0, ""))
        if len(unnoticed) > explained:
            unexplained += unnoticed
        elif unnoticed:
            print("\n" + "\n".join(unnoticed) + f"\n    {reason}")
    print(f"\n{noticed} of {total} wrong kernels noticed ({noticed / total:.0%})")
    assert not unexplained, "\n".join(unexplained)
    assert noticed >= 0.95 * total
