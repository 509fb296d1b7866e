"""No op copies between the CPU and the GPU, or waits for it, but where the documentation says so.

The public functions are traced on fake CUDA tensors, which have a device and hold no numbers. The
Triton kernels behind them are traced in test_triton_compile.py. The host code of csrc/cuda calls no
function of the CUDA runtime that copies or waits: it is linked with a runtime that has none
(support/ptx_machine/host_runtime.cpp).
"""

from itertools import product

import pytest
import torch
from support import ptx_machine
from support.op_checks import DTYPES, random_map, random_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realign_fast import add_scatter_, align_rows, sum_rows
from realign_fast.ops.dispatch import rows_gradient

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "equal.default")


class Refuse(TorchDispatchMode):
    """Fails where a tensor on the CPU takes part, and where the result's value is needed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in WAITS), f"{function} waits for the GPU"
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, torch.Tensor) or value.is_cuda, f"{function} on the CPU"
        return result


def fake(*shape, dtype=torch.float64):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def tracing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(), Refuse():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_map_and_no_sum_waits(tracing, dtype):
    rows, out, vectors = fake(200, 100, dtype=dtype), fake(200, 100, dtype=dtype), fake(2, 100)
    for scale in (0.9, fake(), fake(100), fake(100, 100)):
        for shift, recentre in (vectors, vectors.float(), (vectors[0], None)):
            for length in (1.0, None, 2.0):
                align_rows(rows, scale, shift, recentre, length=length)
                align_rows(rows, scale, shift, recentre, length=length, out=out)
            sum_rows(rows, scale, shift, recentre)
            linear = scale if isinstance(scale, torch.Tensor) else fake()
            last = None if recentre is None else recentre.double()
            rows_gradient(rows, out, linear, shift.double(), last, 1.0)
    align_rows(rows.T.contiguous().T, 0.9, vectors[0], out=rows)
    sum_rows(rows)
    sum_rows(rows, normalize=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_waits_only_to_check_weights(tracing, dtype, monkeypatch):
    sums, rows, centre = (fake(100, 100), fake(100)), fake(200, 100, dtype=dtype), fake(100)
    for accurate, fast, normalize in product((False, True), repeat=3):
        options = {"accurate": accurate, "fast": fast, "normalize": normalize}
        add_scatter_(*sums, rows, centre, **options)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            add_scatter_(*sums, rows, centre, fake(200), **options)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            add_scatter_(*sums, rows, centre, fake(200), **options)


def test_the_trace_sees_a_copy_and_a_wait(tracing):
    with pytest.raises(AssertionError, match="on the CPU"):
        fake(2, 5)[[0, 0, 1]]
    with pytest.raises(AssertionError, match="waits for the GPU"):
        bool(fake(2).sum() > 0)


@pytest.mark.skipif(bool(ptx_machine.why_not()), reason=ptx_machine.why_not())
@pytest.mark.parametrize("columns", (20, 600))
def test_calls_on_a_few_hundred_rows_load_every_kernel(columns):
    """So they warm up for a graph of calls on more rows: its capture loads no module."""
    machine, (_, *vectors) = ptx_machine.load(), random_map(columns)
    used = []
    for count in (200, 3000 if columns < 100 else 700):
        rows = random_rows(count, columns, torch.float32)
        before = machine.usage()
        scale = torch.ones((), dtype=torch.float64)
        machine.align_rows(rows, scale, *vectors, torch.float32, 1.0, 0)
        machine.align_rows_backward(rows, rows, scale, *vectors, 1.0, True, 0)
        machine.sum_rows(rows, scale, *vectors, True, 0)
        sums = torch.zeros(columns, columns).double(), torch.zeros(columns).double()
        weights = torch.ones(count, dtype=torch.float64)
        machine.add_scatter_(*sums, rows, vectors[0], weights, False, False, 0)
        matrix = torch.eye(columns, dtype=torch.float64)
        machine.map_rows(rows, matrix, *vectors, torch.float32, 1.0, 0)
        after = machine.usage()
        used.append({name for name in after if after[name].launches > before[name].launches})
    assert used[0] == used[1]
