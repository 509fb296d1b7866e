"""The public functions of the ops: kernels, schemas, gradients, torch.compile and refused input."""

import inspect
from itertools import pairwise

import pytest
import torch
from support.op_checks import assert_accurate, exact, random_map, random_rows, require_compiled
from support.oracle import row_map
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

from realign_fast import add_scatter_, align_rows, backend_of, sum_rows
from realign_fast.ops import INSTRUCTION_SETS, OPS, cpu_instruction_set, reference

OP = torch.ops.realign_fast
MAP = random_map(7)
DOUBLE_MAP = (torch.tensor(MAP[0], dtype=torch.float64), *MAP[1:])


def aten_calls(function):
    """Return the names of the torch functions that ran inside ``function``."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    return {event.key for event in trace.key_averages()}


@pytest.mark.parametrize("name", OPS)
def test_the_compiled_kernel_is_the_one_that_runs(name):
    require_compiled()
    assert backend_of(name, "cpu").kernel == "cpu"
    assert any(
        f"compiled, {instruction_set} in use" == backend_of(name, "cpu").why.partition(" for ")[0]
        for instruction_set in INSTRUCTION_SETS[1:]
    )
    rows = random_rows(6, 7, torch.float32)
    sums = torch.zeros(7, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    calls = {
        "align_rows": lambda: align_rows(rows, *MAP),
        "align_rows_": lambda: align_rows(rows, *MAP, out=torch.empty_like(rows)),
        "align_rows_backward": lambda: OP.align_rows_backward(rows, rows, *DOUBLE_MAP),
        "sum_rows": lambda: sum_rows(rows, *MAP),
        "add_scatter_": lambda: add_scatter_(*sums, rows, torch.zeros(7)),
        "map_rows": lambda: align_rows(rows, torch.eye(7), *MAP[1:]),
        "map_rows_": lambda: align_rows(rows, torch.eye(7), *MAP[1:], out=rows.clone()),
    }
    ran = aten_calls(calls[name])
    assert f"realign_fast::{name}" in ran
    for of_the_reference in ("aten::linalg_vector_norm", "aten::isfinite", "aten::triu"):
        assert of_the_reference not in ran, "the reference answered"


def test_a_call_without_a_gradient_runs_the_kernel_and_nothing_else():
    """Layers of torch and checks in Python would take longer than the map of a small batch."""
    require_compiled()
    rows = random_rows(1, 7, torch.float32)
    for linear in (DOUBLE_MAP[0], torch.eye(7, dtype=torch.float64)):
        ran = aten_calls(lambda linear=linear: align_rows(rows, linear, *DOUBLE_MAP[1:]))
        assert {name for name in ran if "::" in name} <= {
            "realign_fast::align_rows",
            "realign_fast::map_rows",
            "aten::new_empty",
            "aten::empty",
        }
    # What the kernel refuses is converted, and what a gradient needs is recorded.
    columns_apart, narrow = rows.repeat_interleave(2, dim=1)[:, ::2], DOUBLE_MAP[1].float()
    expected = align_rows(rows, DOUBLE_MAP[0], narrow)
    assert torch.equal(align_rows(columns_apart, DOUBLE_MAP[0], narrow.double()), expected)
    learning = rows.clone().requires_grad_()
    assert align_rows(learning, *DOUBLE_MAP).requires_grad
    with torch.no_grad():
        assert not align_rows(learning, *DOUBLE_MAP).requires_grad


def test_the_profile_above_would_show_the_reference():
    rows = random_rows(6, 7)
    ran = aten_calls(lambda: reference.align_rows(rows, *DOUBLE_MAP, torch.float64))
    assert "aten::linalg_vector_norm" in ran


def test_the_public_functions_use_the_instruction_set_that_backend_of_names():
    require_compiled()
    rows, chosen_map = random_rows(64, 777, torch.float32), random_map(777)
    variant = {name: INSTRUCTION_SETS.index(backend_of(name, "cpu").why.split()[1]) for name in OPS}
    expected = OP.sum_rows(rows, None, None, None, True, variant["sum_rows"])[0]
    assert torch.equal(sum_rows(rows).total, expected)
    scale = torch.tensor(chosen_map[0], dtype=torch.float64)
    arguments = scale, *chosen_map[1:], torch.float32, 1.0, variant["align_rows"]
    expected = OP.align_rows(rows, *arguments)
    assert torch.equal(align_rows(rows, *chosen_map), expected)


def test_sums_have_the_bytes_of_avx2_where_a_newer_instruction_set_is_present():
    require_compiled()
    expected = "avx2" if cpu_instruction_set() == "avx512" else cpu_instruction_set()
    assert cpu_instruction_set("sum_rows") == expected


def test_the_variant_chooses_the_instruction_set():
    """Wider registers add in another order, so the last bits tell the instruction sets apart."""
    require_compiled()
    best = INSTRUCTION_SETS.index(cpu_instruction_set())
    rows, chosen_map = random_rows(64, 777, torch.float32), random_map(777)
    totals = [OP.sum_rows(rows, None, None, None, True, variant)[0] for variant in range(best + 1)]
    assert torch.equal(totals[0], totals[best]), "variant 0 takes the best"
    for narrower, wider in pairwise(totals[1:]):
        assert not torch.equal(narrower, wider)
    for variant in (-1, best + 1):
        with pytest.raises(RuntimeError, match=f"variant {variant} is not available here"):
            OP.sum_rows(rows, None, None, None, True, variant)
        with pytest.raises(RuntimeError, match=f"variant {variant} is not available here"):
            scale = torch.tensor(chosen_map[0], dtype=torch.float64)
            OP.align_rows(rows, scale, *chosen_map[1:], torch.float32, 1.0, variant)


def test_the_answer_for_a_device_without_kernels_says_so():
    assert backend_of("align_rows", "mps").kernel == "reference"
    assert "no kernel is compiled for mps" in backend_of("align_rows", "mps").why
    with pytest.raises(ValueError, match="no op 'align'; the ops are add_scatter_, align"):
        backend_of("align", "cpu")


@pytest.mark.parametrize("name", OPS)
def test_the_reference_takes_the_same_arguments(name):
    schema = [argument.name for argument in getattr(OP, name).default._schema.arguments]
    assert list(inspect.signature(getattr(reference, name)).parameters) == schema


@pytest.mark.parametrize(
    ("recentre", "strided"), [(None, True), (MAP[2], False)], ids=("half", "whole")
)
def test_opcheck(recentre, strided):
    rows = random_rows(5, 20)[:, 3:10] if strided else random_rows(5, 7)
    scale, shift = DOUBLE_MAP[:2]
    learning = rows.clone().requires_grad_()
    for samples, length in ((rows, 1.0), (learning, None), (rows[:0], 2.0)):
        arguments = (samples, scale, shift, recentre, torch.float32, length)
        torch.library.opcheck(OP.align_rows.default, arguments)
    out = torch.empty(5, 7, dtype=torch.bfloat16)
    torch.library.opcheck(OP.align_rows_.default, (out, rows, scale, shift, recentre))
    torch.library.opcheck(OP.sum_rows.default, (rows, scale, shift, recentre, True))
    torch.library.opcheck(OP.sum_rows.default, (rows.half(), None, None, None, False))


def test_compile_keeps_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(rows, out):
        sums = sum_rows(rows, *MAP)
        align_rows(rows, *MAP, out=out)
        return sums.total, sums.counts

    rows = random_rows(6, 7)
    out = torch.full_like(rows, torch.nan)
    total, counts = step(rows, out)
    assert torch.equal(out, align_rows(rows, *MAP))
    assert torch.equal(total, sum_rows(rows, *MAP).total)
    assert counts.tolist() == [6, 0, 0]


def test_compile_keeps_the_gradient():
    def loss(rows):
        aligned = align_rows(rows * 2, *MAP, length=None, out_dtype=torch.float32)
        return aligned[:, 0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    rows = random_rows(6, 7).requires_grad_()
    (expected,) = torch.autograd.grad(loss(rows), rows)
    (gradient,) = torch.autograd.grad(compiled(rows), rows)
    assert bool(gradient.any())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("recentre", (None, MAP[2]), ids=("half", "whole"))
def test_gradcheck(recentre):
    rows = random_rows(5, 7).requires_grad_()
    for length in (1.0, None, -2.0):
        assert gradcheck(lambda x, c=length: align_rows(x, *MAP[:2], recentre, length=c), rows)


def gradient(rows, weights, function):
    rows = rows.clone().requires_grad_()
    (function(rows) * weights).sum().backward()
    return rows.grad


def by_autograd(rows):
    """The formula in plain torch, differentiated by autograd."""
    u = rows / rows.norm(dim=1, keepdim=True)
    mapped = MAP[0] * u + MAP[1]
    mapped = mapped / mapped.norm(dim=1, keepdim=True) + MAP[2]
    return mapped / mapped.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("dtype", "size", "error"),
    [
        (torch.float64, 1.0, 1e-13),
        (torch.float64, 1e-120, 1e-13),
        (torch.float64, 1e200, 1e-13),
        (torch.float64, 1e-200, 1e-13),
        (torch.float32, 1.0, 1e-6),
        (torch.float32, 1e-30, 1e-6),
        (torch.float32, 1e30, 1e-6),
        # A gradient in 16 bits is rounded to 16 bits, and so are the weights that come in.
        (torch.float16, 1.0, 2e-3),
        (torch.bfloat16, 1.0, 1e-2),
    ],
    ids=str,
)
def test_gradient_for_every_dtype_and_size(dtype, size, error):
    """The map ignores the length of a row: the gradient at ``size x`` is that at ``x`` / size."""
    rows, weights = (random_rows(5, 7) * size).to(dtype), random_rows(5, 7, seed=8).to(dtype)
    result = gradient(rows, weights, lambda x: align_rows(x, *MAP))
    assert result.dtype == dtype
    expected = gradient(rows.double() / size, weights.double(), by_autograd)
    worst = (result.double() * size - expected).abs().max() / expected.abs().max()
    assert worst <= error


def test_a_bad_row_spoils_no_other_gradient():
    rows, weights = random_rows(5, 7), random_rows(5, 7, seed=8)
    expected = gradient(rows, weights, by_autograd)
    rows[1], rows[2, 3], rows[3, 0] = 0, torch.nan, torch.inf
    result = gradient(rows, weights, lambda x: align_rows(x, *MAP))
    longer = gradient(rows, weights, lambda x: align_rows(x, *MAP, length=4.0))
    assert torch.equal(longer, 4 * result)
    torch.testing.assert_close(result[[0, 4]], expected[[0, 4]], rtol=1e-12, atol=1e-14)
    assert bool((result[1] == 0).all()), "unit(0) = 0 has no direction to change"


def test_arguments_may_be_numbers_float32_or_absent():
    rows = random_rows(5, 7)
    scale, shift, _ = MAP
    expected = row_map(exact(rows), scale, exact(shift))
    assert_accurate(align_rows(rows, scale, shift), expected)
    assert_accurate(align_rows(rows, torch.tensor(scale, dtype=torch.float64), shift), expected)
    single = align_rows(rows, scale, shift.float())
    assert_accurate(single, row_map(exact(rows), scale, exact(shift.float())))
    assert align_rows(rows, scale, shift, out_dtype=torch.float16).dtype == torch.float16


ROWS = random_rows(5, 7)
REFUSED = {
    "one row without an axis": (lambda: align_rows(ROWS[0], *MAP), ValueError, r"shape \[7\]"),
    "three axes": (lambda: sum_rows(ROWS[None]), ValueError, r"sum_rows: .*shape \[1, 5, 7\]"),
    "no columns": (lambda: sum_rows(ROWS[:, :0]), ValueError, r"D >= 1, got shape \[5, 0\]"),
    "integers": (lambda: align_rows(ROWS.int(), *MAP), TypeError, "got torch.int32; convert"),
    "complex": (lambda: sum_rows(ROWS.cfloat()), TypeError, "got torch.complex64; convert"),
    "a map of other width": (
        lambda: align_rows(ROWS[:, :6], *MAP),
        ValueError,
        r"rows have 6 columns, shift has shape \[7\]",
    ),
    "a last step of other width": (
        lambda: sum_rows(ROWS, *MAP[:2], MAP[2][:3]),
        ValueError,
        r"rows have 7 columns, recentre has shape \[3\]",
    ),
    "half a map": (lambda: sum_rows(ROWS, MAP[0]), ValueError, "scale and shift together"),
    "a map without directions": (
        lambda: sum_rows(ROWS, *MAP, normalize=False),
        ValueError,
        "leave normalize=True",
    ),
    "several scales": (
        lambda: align_rows(ROWS, torch.ones(2), *MAP[1:]),
        ValueError,
        r"scale has shape \[2\]; expected a number, a diagonal \[D\] or a matrix",
    ),
    "a length that is no number": (
        lambda: align_rows(ROWS, *MAP, length=torch.nan),
        ValueError,
        "expected a finite length or None, got nan",
    ),
    "out of other shape": (
        lambda: align_rows(ROWS, *MAP, out=torch.empty(4, 7)),
        ValueError,
        r"out has shape \[4, 7\], the rows \[5, 7\]",
    ),
    "two dtypes for out": (
        lambda: align_rows(ROWS, *MAP, out=torch.empty(5, 7), out_dtype=torch.float16),
        TypeError,
        "out is torch.float32 but out_dtype says torch.float16",
    ),
    "out of integers": (
        lambda: align_rows(ROWS, *MAP, out=torch.empty(5, 7, dtype=torch.int32)),
        (TypeError, RuntimeError),
        "float16, .*float64",
    ),
    "out for a gradient": (
        lambda: align_rows(ROWS.clone().requires_grad_(), *MAP, out=torch.empty(5, 7)),
        RuntimeError,
        "out= keeps no gradient",
    ),
    "out that wants a gradient": (
        lambda: align_rows(ROWS, *MAP, out=torch.empty(5, 7, requires_grad=True)),
        RuntimeError,
        "out= keeps no gradient",
    ),
    "integers as out_dtype": (
        lambda: align_rows(ROWS, *MAP, out_dtype=torch.int32),
        TypeError,
        "out_dtype of torch.float16",
    ),
}
OVERLAPS = {
    "another part of the rows": lambda rows: (rows[:-1], rows[1:]),
    "one row many times": lambda rows: (rows, torch.zeros(7).expand(5, 7)),
    "the rows in another dtype": lambda rows: (rows, rows.view(torch.float16)[:, :7]),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_an_out_that_overlaps_is_refused_by_the_kernels(case):
    require_compiled()
    rows, out = OVERLAPS[case](ROWS.clone())
    with pytest.raises(RuntimeError, match="overlap"):
        align_rows(rows, *MAP, out=out)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_how_it_is_said(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_columns_apart_in_memory_are_copied():
    rows = random_rows(7, 5).T
    assert torch.equal(align_rows(rows, *MAP), align_rows(rows.contiguous(), *MAP))
    assert torch.equal(sum_rows(rows).total, sum_rows(rows.contiguous()).total)


def test_a_map_cut_out_of_a_matrix():
    apart = [torch.stack([vector, vector], dim=1)[:, 0] for vector in MAP[1:]]
    assert torch.equal(align_rows(ROWS, MAP[0], *apart), align_rows(ROWS, *MAP))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_a_bad_row_has_no_gradient(bad):
    rows = ROWS.clone()
    rows[2] = bad
    rows.requires_grad_()
    align_rows(rows, *MAP).nan_to_num().sum().backward()
    assert not rows.grad[2].any()
    assert rows.grad[[0, 1, 3, 4]].ne(0).all()


def test_devices_without_kernels_have_the_reference():
    assert backend_of("align_rows", "meta").kernel == "reference"


@pytest.mark.parametrize("needing", range(3), ids=["scale", "shift", "recentre"])
@pytest.mark.parametrize("trained_rows", [False, True])
def test_a_map_that_needs_a_gradient_is_refused(needing, trained_rows):
    row_map = [tensor.clone() for tensor in DOUBLE_MAP]
    row_map[needing].requires_grad_()
    rows = random_rows(5, 7).requires_grad_(trained_rows)
    with pytest.raises(RuntimeError, match="scale, shift and recentre are constants"):
        align_rows(rows, *row_map)
    with torch.no_grad():
        assert torch.equal(align_rows(rows, *row_map), align_rows(rows, *DOUBLE_MAP))
