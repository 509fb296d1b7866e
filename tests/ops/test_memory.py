"""Rows without memory, tensors that share it, and tensors whose numbers do not lie in it."""

import itertools

import pytest
import torch
from support.op_checks import random_map, random_rows, require_compiled

from realign_fast import Moments, ReAlign, add_scatter_, align_rows, sum_rows

OP = torch.ops.realign_fast
SCALE, SHIFT, RECENTRE = random_map(4)
MATRIX = torch.eye(4, dtype=torch.float64) + 0.1 * random_rows(4, 4, seed=3)
EMPTY = {
    "columns apart": lambda: torch.ones(5, 8)[:0, ::2],
    "transposed": lambda: torch.empty(4, 0).t(),
    "expanded": lambda: torch.empty(1, 4)[:0].expand(0, 4),
    "strides of 7 and 3": lambda: torch.empty(0).as_strided((0, 4), (7, 3)),
    "strides of 0": lambda: torch.empty(0).as_strided((0, 4), (0, 0)),
}


def scattered(rows, centre, weights=None, sums=None):
    """Return scatter and total of the rows, which are added to zeros or to ``sums``."""
    scatter, total = sums or (torch.zeros(4, 4).double(), torch.zeros(4).double())
    add_scatter_(scatter, total, rows, centre, weights)
    return torch.cat([torch.triu(scatter), total[None]])


@pytest.mark.parametrize("case", EMPTY)
def test_no_rows_are_no_rows_whatever_their_strides(kernel, case):
    rows = EMPTY[case]().to(kernel.device)
    assert rows.shape == (0, 4)
    assert kernel.sum(rows).counts.tolist() == [0, 0, 0]
    assert kernel.sum(rows, SCALE, SHIFT, RECENTRE).total.tolist() == [0] * 4
    assert kernel.align(rows, SCALE, SHIFT, RECENTRE).shape == (0, 4)
    kernel.align_into(EMPTY[case]().to(kernel.device), rows, SCALE, SHIFT)
    for linear in (MATRIX, MATRIX.diagonal().contiguous()):
        assert kernel.map(rows, linear, SHIFT, RECENTRE).shape == (0, 4)
        kernel.map_into(EMPTY[case]().to(kernel.device), rows, linear, SHIFT)
    scatter, total = torch.ones(4, 4).double(), torch.ones(4).double()
    counts = kernel.add_scatter(scatter, total, rows, SHIFT, rows[:, 0].double(), True, False)
    assert counts.tolist() == [0, 0, 0]
    assert bool((scatter == 1).all()) and bool((total == 1).all())


@pytest.mark.parametrize("case", EMPTY)
def test_public_functions_take_no_rows_whatever_their_strides(case):
    rows = EMPTY[case]()
    aligner = ReAlign.fit(random_rows(9, 4), random_rows(9, 4, seed=2))
    assert aligner(rows).shape == align_rows(rows, MATRIX, SHIFT).shape == (0, 4)
    assert align_rows(rows, SCALE, SHIFT, out=EMPTY[case]()).shape == (0, 4)
    assert sum_rows(rows, MATRIX, SHIFT).counts.tolist() == [0, 0, 0]
    assert not scattered(rows, SHIFT).any()
    for covariance in (False, True):
        moments = Moments(covariance=covariance).update(rows).update(random_rows(9, 4))
        assert moments.count == 9


def cancelling_rows(shift):
    """Rows of which the last ones cancel against the shift: kernels read the map again for them."""
    rows = random_rows(400, 4, torch.float32)
    rows[300:] = -shift + 1e-9 * random_rows(100, 4)
    return rows


SHARED = ("scale", "diagonal", "matrix", "shift", "recentre")


@pytest.mark.parametrize("name", SHARED)
def test_a_map_inside_of_out_is_read_before_it_is_overwritten(name):
    out = random_rows(400, 4)
    place = {"scale": out[0, 0], "matrix": out[1:5], "shift": out[5], "recentre": out[6]}
    place["diagonal"] = out[7]
    row_map = {"scale": torch.tensor(1.0), "shift": SHIFT / SHIFT.norm(), "recentre": RECENTRE}
    row_map |= {"matrix": MATRIX, "diagonal": MATRIX.diagonal()}
    linear = name if name in ("diagonal", "matrix") else "scale"
    arguments = [row_map[key].double().clone() for key in (linear, "shift", "recentre")]
    rows = cancelling_rows(arguments[1])
    expected = align_rows(rows, *arguments, out_dtype=torch.float64)
    position = (linear, "shift", "recentre").index(name)
    arguments[position] = place[name].copy_(arguments[position])
    assert torch.equal(align_rows(rows, *arguments, out=out), expected)


def test_memory_is_compared_by_its_addresses():
    """Two storages over one numpy array share memory too."""
    array = random_rows(400, 4).numpy()
    out, shift = torch.from_numpy(array), torch.from_numpy(array[5])
    shift.copy_(SHIFT / SHIFT.norm())
    rows = cancelling_rows(shift)
    expected = align_rows(rows, 1.0, shift.clone(), out_dtype=torch.float64)
    assert torch.equal(align_rows(rows, 1.0, shift, out=out), expected)


@pytest.mark.parametrize("name", ("rows", "centre", "weights"))
def test_inputs_inside_of_the_sums_are_read_before_they_are_overwritten(name):
    rows, weights = random_rows(4, 4), torch.rand(4).double()
    rows[1] = 1e-160  # (a norm that is squared step by step)
    expected = {"rows": rows, "centre": SHIFT, "weights": weights}
    scatter, total = rows.clone(), SHIFT.clone()
    if name == "weights":
        total.copy_(weights)
    given = expected | {name: scatter if name == "rows" else total}
    before = scatter.clone(), total.clone()
    result = scattered(given["rows"], given["centre"], given["weights"], (scatter, total))
    assert torch.equal(result, scattered(*expected.values(), before))


def test_sums_that_share_memory_are_refused():
    scatter = torch.zeros(4, 4).double()
    with pytest.raises(ValueError, match="scatter and total share memory; give each its own"):
        add_scatter_(scatter, scatter[0], random_rows(5, 4), SHIFT)


def raw_arguments():
    sums = torch.zeros(4, 4).double(), torch.zeros(4).double()
    numbers = torch.tensor(SCALE, dtype=torch.float64), SHIFT, RECENTRE
    rows, out = random_rows(5, 4), torch.zeros(5, 4)
    return {
        OP.align_rows_: ("out rows scale shift recentre", [out, rows, *numbers]),
        OP.map_rows_: ("out rows matrix shift recentre", [out, rows, MATRIX, *numbers[1:]]),
        OP.add_scatter_: (
            "scatter total rows centre weights",
            [*sums, rows, SHIFT, torch.ones(5).double(), True, False],
        ),
        OP.sum_rows: ("rows scale shift recentre", [rows, *numbers, True]),
    }


CASES = [(op, names.split()) for op, (names, _) in raw_arguments().items()]
ELSEWHERE = [(op, name) for op, names in CASES for name in names if name != "rows"]
OVERLAPS = [
    (op, out, name)
    for op, names in CASES
    for out, name in itertools.product(names, names)
    if out in ("out", "scatter", "total") and name not in ("out", "scatter", out)
]


@pytest.mark.parametrize(("op", "name"), ELSEWHERE, ids=str)
def test_a_kernel_refuses_a_tensor_on_another_device_than_the_rows(op, name):
    """A meta tensor has a device and no memory; the kernel of the CPU is called in any case."""
    require_compiled()
    names, arguments = raw_arguments()[op]
    position = names.split().index(name)
    arguments[position] = arguments[position].to("meta")
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of the rows"):
        op.default.redispatch(cpu, *arguments)


@pytest.mark.parametrize(("op", "out", "name"), OVERLAPS, ids=str)
def test_a_kernel_refuses_to_write_over_what_it_reads(op, out, name):
    require_compiled()
    names, arguments = raw_arguments()[op]
    written, read = (names.split().index(argument) for argument in (out, name))
    shape, buffer = arguments[read].shape, torch.ones(40).double()
    arguments[written] = buffer[: arguments[written].numel()].view(arguments[written].shape)
    arguments[read] = buffer[: shape.numel() + 1][-shape.numel() :].view(shape)
    with pytest.raises(RuntimeError, match=r"overlaps .*; give .* memory of its own"):
        op(*arguments)


def negative(tensor):
    return torch._neg_view(-tensor)


def imaginary(tensor):
    """The imaginary part of a conjugate: columns lie apart and the negative bit is set."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


def zero(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


CALLS = {
    "rows": lambda x: [align_rows(x, SCALE, SHIFT), sum_rows(x).total, scattered(x, SHIFT)],
    "scale": lambda x: [align_rows(random_rows(6, 4), x[0, 0], SHIFT)],
    "diagonal": lambda x: [align_rows(random_rows(6, 4), x[0], SHIFT)],
    "matrix": lambda x: [align_rows(random_rows(6, 4), x[:4], SHIFT)],
    "shift": lambda x: [align_rows(random_rows(6, 4), MATRIX, x[0])],
    "recentre": lambda x: [sum_rows(random_rows(6, 4), SCALE, SHIFT, x[0]).total],
    "centre": lambda x: [scattered(random_rows(6, 4), x[0])],
    "weights": lambda x: [scattered(random_rows(6, 4), SHIFT, x[:, 0])],
}


@pytest.mark.parametrize("view", (negative, imaginary, expanded, zero), ids=lambda v: v.__name__)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_every_view_of_an_input_is_read_as_the_numbers_that_it_shows(view, name, dtype):
    numbers = view(random_rows(6, 4, dtype).abs())
    plain = torch.tensor(numbers.clone().tolist(), dtype=dtype)
    for result, expected in zip(CALLS[name](numbers), CALLS[name](plain), strict=True):
        assert torch.equal(result, expected)


def test_results_are_written_through_views_with_the_negative_bit():
    rows, buffer = random_rows(6, 4), torch.full((6, 4), 9.0)
    expected = align_rows(rows, SCALE, SHIFT, out_dtype=torch.float32)
    out = torch._neg_view(buffer)
    assert align_rows(rows, SCALE, SHIFT, out=out) is out
    assert torch.equal(buffer, -expected) and torch.equal(out.resolve_neg(), expected)
    sums = [negative(torch.ones(4, 4).double()), negative(torch.full((4,), 2.0).double())]
    plain = [torch.ones(4, 4).double(), torch.full((4,), 2.0).double()]
    for written in (sums, plain):
        add_scatter_(*written, rows, SHIFT)
    assert all(torch.equal(a.resolve_neg(), b) for a, b in zip(sums, plain, strict=True))
