"""csrc/cuda run on the CPU thread by thread; results must not depend on the order of threads.

The kernels' numbers are tested in test_<op>.py under the name "emulated cuda". Here: the same bytes
for any order of threads and any number of multiprocessors, the accuracy of each kind of operand,
and that the emulation sees the mistakes it is there to see.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from support.cuda_emulation import emulated
from support.op_checks import kernel_or_skip, random_map, random_rows

from realign_fast.ops import reference


@pytest.fixture
def kernel():
    yield kernel_or_skip("emulated cuda")
    emulated.configure()


def results(kernel, rows, columns, with_scatter=True):
    row_map = random_map(columns)
    weights = torch.linspace(0.1, 2, len(rows), dtype=torch.float64)
    matrix = torch.eye(columns).double() + 0.01 * random_rows(columns, columns, seed=3)
    found = [kernel.align(rows, *row_map, length=length) for length in (1.0, None)]
    found += kernel.sum(rows, *row_map)
    found += [kernel.sum(rows, normalize=False).total]
    if columns < 100:  # (the product is the same for any width, and slow to emulate)
        found += [kernel.map(rows, matrix, *row_map[1:])]
    for accurate in (False, True) if with_scatter else ():
        scatter = torch.zeros(columns, columns, dtype=torch.float64)
        total = torch.zeros(columns, dtype=torch.float64)
        kernel.add_scatter(scatter, total, rows, row_map[1], weights, True, accurate)
        found += [scatter, total]
    return found


@pytest.mark.parametrize(
    ("columns", "with_scatter"),
    [
        pytest.param(70, True, id="a warp a row"),
        pytest.param(1100, False, id="a block a row"),
        pytest.param(1100, True, id="a block a row, with the scatter", marks=pytest.mark.slow),
    ],
)
def test_same_bytes_for_any_order_of_threads_and_size_of_device(kernel, columns, with_scatter):
    """A barrier too few, or a partition that asks the device for its size, would change them."""
    rows = random_rows(300 if columns < 100 else 70, columns, torch.float16)
    rows[[3, 17]] = 0
    rows[5, 2] = torch.nan
    expected = results(kernel, rows, columns, with_scatter)
    for order, multiprocessors in (("backward", 1), ("shuffled", 7)):
        emulated.configure(order, multiprocessors)
        others = results(kernel, rows, columns, with_scatter)
        for a, b in zip(expected, others, strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def test_more_slices_and_chunks_than_one(kernel):
    """2500 rows are three slices of a product, and a part of one."""
    rows, centre = random_rows(2500, 20, torch.float32), random_map(20)[1].float().double()
    for variant, share in ((0, 4e-7), (1, 2e-4)):
        scatter, total = torch.zeros(20, 20).double(), torch.zeros(20).double()
        expected = [scatter.clone(), total.clone()]
        options = (rows, centre, None, True, False)
        counts = kernel.functions.add_scatter_(scatter, total, *options, variant)
        assert torch.equal(counts, reference.add_scatter_(*expected, *options))
        error = float((scatter - expected[0]).norm() / expected[0].norm())
        assert error < share, f"variant {variant}: {error:.1e}"


def test_the_low_terms_squares_come_back_to_the_diagonal(kernel):
    """The trace of two float16 terms would otherwise always be low by about 2^-24 of itself.

    The emulated sums are cut off, a bias too; so rows whose products need no rounding are used:
    each has one entry, one bit high and one bit in the low term.
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


MISTAKES = """
#include "cuda_emulation.h"
__global__ void reverse(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(emulation::machine.shared.data());
  const int t = threadIdx.x;
  shared[t] = t;
  if (barrier) __syncthreads();
  out[t] = shared[63 - t];
}
__global__ void half_a_barrier() { if (threadIdx.x < 32) __syncthreads(); }
__global__ void two_barriers() {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
}
__global__ void float_atomics_and_odd_loads(double* out) {
  __ldcs(reinterpret_cast<uint4*>(reinterpret_cast<char*>(out) + 8));
}
extern "C" __attribute__((visibility("default"))) const char* run(int which, int order, int* out) {
  static std::string words;
  words.clear();
  emulation::order = static_cast<emulation::Order>(order);
  alignas(16) static double line[4];
  try {
    emulation::run_grid(1, 64, 256, [=] {
      if (which < 2) reverse(out, which);
      if (which == 2) half_a_barrier();
      if (which == 3) two_barriers();
      if (which == 4) float_atomics_and_odd_loads(line);
    });
  } catch (const std::exception& error) { words = error.what(); }
  return words.c_str();
}
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    kernel_or_skip("emulated cuda")
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "mistakes.cpp").write_text(MISTAKES)
    include = Path(emulated.__file__).parent
    command = ["c++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{include}", "mistakes.cpp"]
    subprocess.run([*command, "-o", "mistakes.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "mistakes.so"))
    library.run.restype = ctypes.c_char_p

    def run(which, order=0):
        out = (ctypes.c_int * 64)()
        return library.run(which, order, out).decode(), list(out)

    return run


def test_a_missing_barrier_shows_in_the_result(mistakes):
    right = list(reversed(range(64)))
    assert all(mistakes(1, order) == ("", right) for order in range(3))
    assert all(mistakes(0, order)[1] != right for order in range(2))


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (2, "threads wait for others that have ended"),
        (3, "threads meet at different lines"),
        (4, "a load that is not aligned"),
    ],
)
def test_what_would_hang_or_fail_on_a_gpu_is_an_error(mistakes, which, words):
    assert words in mistakes(which)[0]
