"""Properties that only a GPU can show: streams, devices, graphs, hidden waits, sizes past 2^31.

(Numbers are tested in test_<op>.py, for the device as for every other kernel.)
"""

import pytest
import torch
from support.op_checks import random_map, random_rows

from realign_fast import add_scatter_, align_rows, backend_of, sum_rows
from realign_fast.ops import OPS, why_no_cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if why_no_cuda():
        pytest.skip(f"no compiled CUDA kernels: {why_no_cuda()}")


def sums(columns, device="cuda"):
    kind = {"dtype": torch.float64, "device": device}
    return torch.zeros(columns, columns, **kind), torch.zeros(columns, **kind)


def calls(rows):
    """Call every op once on rows and arguments that are on the device already."""
    columns = rows.shape[1]
    scale, shift, recentre = random_map(columns)
    scale = torch.tensor(scale, dtype=torch.float64, device=rows.device)
    shift, recentre = shift.to(rows.device), recentre.to(rows.device)
    matrix = torch.eye(columns, dtype=torch.float64, device=rows.device)
    out, mapped = torch.empty_like(rows), torch.empty_like(rows)
    scatter, total = sums(columns, rows.device)

    def run():
        align_rows(rows, scale, shift, recentre, out=out)
        align_rows(rows, matrix, shift, recentre, out=mapped)
        shifted = align_rows(rows, scale, shift, length=None)
        gradient = torch.ops.realign_fast.align_rows_backward(rows, rows, scale, shift, recentre)
        scatter.zero_(), total.zero_()
        counts = add_scatter_(scatter, total, rows, shift)
        sums_of_rows = sum_rows(rows, scale, shift)
        return [out, mapped, shifted, gradient, scatter, total, counts, *sums_of_rows]

    return run


def test_the_compiled_kernels_answer():
    assert {backend_of(op, "cuda").kernel for op in OPS} == {"cuda"}


def test_work_goes_to_the_current_stream():
    """Rows that a side stream fills late: a kernel on another stream would read them too early."""
    rows = torch.zeros(4096, 256, device="cuda", dtype=torch.float16)
    filled = random_rows(4096, 256, torch.float16).cuda()
    expected = [tensor.clone() for tensor in calls(filled)()]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        rows.copy_(filled)
        results = calls(rows)()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_nothing_waits_for_the_device():
    run = calls(random_rows(1000, 128, torch.float16).cuda())
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_every_op():
    rows = random_rows(3000, 200, torch.float16).cuda()
    run = calls(rows)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    rows.copy_(random_rows(3000, 200, torch.float16, seed=9))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.clone() for tensor in results]
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))


def test_a_graph_holds_weighted_sums():
    rows = random_rows(3000, 200, torch.float16).cuda()
    weights = torch.rand(3000, dtype=torch.float64, device="cuda")
    centre = torch.zeros(200, dtype=torch.float64, device="cuda")
    first, replayed = (centre.new_zeros(200, 200) for _ in range(2))
    total = torch.zeros_like(centre)
    add_scatter_(first, total.clone(), rows, centre, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_scatter_(replayed, total, rows, centre, weights)
    graph.replay()
    assert torch.equal(first, replayed)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    rows = random_rows(500, 96, torch.float16)
    expected = calls(rows.to("cuda:0"))()
    results = calls(rows.to("cuda:1"))()
    assert torch.cuda.current_device() == 0
    for a, b in zip(results, expected, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.cpu(), b.cpu())


def test_vectors_on_the_cpu_are_refused():
    rows = random_rows(5, 8, torch.float16).cuda()
    scale, shift, _ = random_map(8)
    scale = torch.tensor(scale, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match="shift must be on the device of the rows"):
        torch.ops.realign_fast.align_rows(rows, scale, shift, None, torch.float16)


def test_more_entries_than_2_to_the_31():
    """The last rows lie past 2^31 entries: a 32-bit index would miss them or wrap around."""
    columns, count = 1024, (1 << 21) + 777
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        pytest.skip("less than 14 GiB of GPU memory free")
    few = random_rows(1024, columns, torch.float16).cuda()
    rows = few.repeat(count // 1024 + 1, 1)[:count]
    scale, shift, recentre = random_map(columns)
    out = align_rows(rows, scale, shift.cuda(), recentre.cuda())
    expected = align_rows(rows[-1000:].clone(), scale, shift.cuda(), recentre.cuda())
    assert torch.equal(out[-1000:], expected)
    del out
    total = sum_rows(rows)
    assert total.counts.tolist() == [count, 0, 0]
    part = sum_rows(few).total * (count // 1024) + sum_rows(few[: count % 1024]).total
    torch.testing.assert_close(total.total, part, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("columns", (1, 7, 127, 769, 1025))
@pytest.mark.parametrize("offset", (0, 1, 8))
def test_rows_that_lie_anywhere_have_the_same_bytes(columns, offset):
    rows = random_rows(100, columns, torch.float16).cuda()
    buffer = rows.new_zeros(100, columns + 11)
    view = buffer[:, offset : offset + columns]
    view.copy_(rows)
    assert all(torch.equal(a, b) for a, b in zip(calls(view)(), calls(rows)(), strict=True))


def test_the_same_bytes_again():
    run = calls(random_rows(100_000, 300, torch.float16).cuda())
    first = [tensor.clone() for tensor in run()]
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_compile_and_gradient():
    scale, shift, recentre = random_map(64)
    shift, recentre = shift.cuda(), recentre.cuda()

    def loss(x):
        return (align_rows(x * 2, scale, shift, recentre, out_dtype=torch.float32) ** 3).sum()

    rows = random_rows(50, 64, torch.float32).cuda().requires_grad_()
    (expected,) = torch.autograd.grad(loss(rows), rows)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(rows), rows)
    torch.testing.assert_close(compiled, expected)


def test_fast_is_less_accurate_and_that_is_all():
    rows, shift = random_rows(20_000, 256, torch.float16).cuda(), random_map(256)[1].cuda()
    exact, split, fast = (sums(256) for _ in range(3))
    add_scatter_(*exact, rows, shift, accurate=True)
    add_scatter_(*split, rows, shift)
    add_scatter_(*fast, rows, shift, fast=True)
    size = exact[0].norm()
    # Tensor cores cut sums off where they should round. On the machine for PTX, which does that in
    # every step of 16 rows, these very rows are off by 2.2e-7. 5e-7 is what a device would give
    # that cuts off one bit more, and far below the 2e-5 of one term.
    assert float((split[0] - exact[0]).norm() / size) < 5e-7
    assert float((fast[0] - exact[0]).norm() / size) < 5e-5


def test_eigh_on_the_device_is_finite_with_repeated_and_zero_eigenvalues():
    from realign_fast.whiten import inverse_root

    matrix = torch.zeros(300, 300, dtype=torch.float64, device="cuda")
    matrix.diagonal()[:100] = 2
    matrix.diagonal()[100:150] = 1e-3
    with pytest.warns(UserWarning):
        root = inverse_root(matrix)
    assert bool(root.isfinite().all())
