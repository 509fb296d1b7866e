"""Implementations of the ops under test, random inputs, and the promised accuracy."""

import os
import shutil
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from realign_fast import ops
from realign_fast.ops import (
    INSTRUCTION_SETS,
    backend_of,
    cpu_instruction_set,
    reference,
    triton_ops,
)
from realign_fast.ops.dispatch import CHOOSER
from support import ptx_machine

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "coco_clip_vitb32_500.npy"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = ("reference", "baseline", "avx2", "avx512", "cuda", "ptx")
if os.environ.get("TRITON_INTERPRET") or (torch.cuda.is_available() and find_spec("triton")):
    KERNELS += ("triton",)  # (without a GPU test_triton_kernels.py runs them in the interpreter)


def require_compiled():
    """Fail without the compiled CPU kernels, unless this machine has no compiler to build them."""
    backend = backend_of("align_rows", "cpu")
    if backend.kernel != "cpu":
        if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            pytest.fail(f"a C++ compiler is here, but no compiled kernel: {backend.why}")
        pytest.skip(f"no compiled kernel and no C++ compiler: {backend.why}")


class Kernel:
    """One implementation of the ops; ``align``, ``align_into`` and ``sum`` call it and no other."""

    def __init__(self, name):
        self.name = name
        on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if name == "ptx":
            self.options = {}
            self.functions = ptx_machine.load()
        elif name in INSTRUCTION_SETS:
            self.options = {"variant": INSTRUCTION_SETS.index(name)}
            self.functions = torch.ops.realign_fast
        else:
            self.options = {}
            cuda = CHOOSER.backends["cuda"]  # itself, whatever is chosen for the GPU
            self.functions = {"reference": reference, "triton": triton_ops, "cuda": cuda}[name]

    def align(self, rows, scale, shift, recentre=None, dtype=None, length=1.0, op="align_rows"):
        arguments = (*self._send(rows, scale, shift, recentre), dtype or rows.dtype, length)
        return getattr(self.functions, op)(*arguments, **self.options).cpu()

    def align_into(self, out, rows, scale, shift, recentre=None, length=1.0, op="align_rows_"):
        """``out`` may be a view of anything on the kernel's device."""
        arguments = (*self._send(rows, scale, shift, recentre), length)
        getattr(self.functions, op)(out, *arguments, **self.options)

    def sum(self, rows, scale=None, shift=None, recentre=None, normalize=True):
        arguments = self._send(rows, scale, shift, recentre)
        sums = self.functions.sum_rows(*arguments, normalize, **self.options)
        return ops.RowSums(*(tensor.cpu() for tensor in sums))

    def gradient(self, rows, grad, row_map, length=1.0, normalize=True):
        """``row_map`` is scale and shift, with or without recentre."""
        sent = self._send(rows, *row_map, *[None] * (3 - len(row_map)))
        arguments = (sent[0], grad.to(self.device), *sent[1:], length, normalize)
        return self.functions.align_rows_backward(*arguments, **self.options).cpu()

    map = partialmethod(align, op="map_rows")
    map_into = partialmethod(align_into, op="map_rows_")

    def add_scatter(self, scatter, total, rows, centre, weights, normalize, accurate):
        sums = [tensor.to(self.device) for tensor in (scatter, total)]
        inputs = [None if t is None else t.to(self.device) for t in (rows, centre, weights)]
        counts = self.functions.add_scatter_(*sums, *inputs, normalize, accurate, **self.options)
        scatter.copy_(sums[0])
        total.copy_(sums[1])
        return counts.cpu()

    def _send(self, rows, scale, shift, recentre):
        as_double = [
            None if value is None else torch.as_tensor(value, dtype=torch.float64).to(self.device)
            for value in (scale, shift, recentre)
        ]
        return (rows.to(self.device), *as_double)


def kernel_or_skip(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cuda" and ops.why_no_cuda():
        pytest.skip(f"no compiled CUDA kernels: {ops.why_no_cuda()}")
    if name in INSTRUCTION_SETS:
        require_compiled()
        if INSTRUCTION_SETS.index(name) > INSTRUCTION_SETS.index(cpu_instruction_set()):
            pytest.skip(f"this CPU has no {name}; its best is {cpu_instruction_set()}")
    if name == "ptx" and ptx_machine.why_not():
        pytest.skip(f"no machine for PTX: {ptx_machine.why_not()}")
    return Kernel(name)


def random_rows(count, columns, dtype=torch.float64, seed=0):
    """Gaussian rows around a common offset, so that means are not zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    return (rows + 0.3).to(dtype)


def random_map(columns, seed=1):
    """scale, shift [D], recentre [D] of the sizes a fit on real embeddings gives."""
    b, h = random_rows(2, columns, seed=seed)
    return 0.983, 0.8 * b / b.norm(), 0.05 * h / h.norm()


def exact(tensor):
    """The rows as longdouble: every digit, and more for what follows."""
    return tensor.double().numpy().astype(np.longdouble)


def ulps(a, b):
    """How many representable numbers of their 16-bit dtype lie between a and b, entry by entry."""

    def order(t):
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(a) - order(b)).abs()


def assert_accurate(result, truth):
    """The accuracy the project promises for ``align_rows``; ``truth`` is float64 or longdouble.

    16-bit: 1 ulp of the truth rounded once, for every entry, and 0 ulp for all but a few: a kernel
    that rounds up, or cuts off, is within 1 ulp too. float32: 1e-6 of the row's largest entry, a
    dozen roundings' worth. float64: 1e-14 of it, since coefficients come from dot products of up
    to 16384 terms.
    """
    assert result.shape == truth.shape
    if result.numel() == 0:
        return
    rounded = torch.from_numpy(np.asarray(truth, dtype=np.float64))
    if result.dtype in (torch.float16, torch.bfloat16):
        distance = ulps(result, rounded.to(result.dtype))
        far = int((distance > 1).sum())
        assert far == 0, f"{far} of {result.numel()} entries off by up to {int(distance.max())} ulp"
        near = int((distance == 1).sum())
        assert near <= 2 + result.numel() // 500, f"{near} of {result.numel()} entries off by 1 ulp"
        return
    assert_near(result, truth, {torch.float32: 1e-6, torch.float64: 1e-14}[result.dtype])


def assert_near(result, truth, share):
    """Check that no entry is off by more than this share of its row's largest entry."""
    peak = np.abs(truth).max(axis=-1, keepdims=True)
    error = (np.abs(exact(result) - truth) / np.where(peak > 0, peak, 1)).max(initial=0)
    assert error <= share, f"error {error:.1e} of the row's largest entry, allowed {share:.0e}"
