"""The register of ops: every schema, the kernels that answer it, and which one does and why.

``reference.py`` answers every op everywhere; the compiled library ``_C.abi3.so``, where it was
built, registers its kernels under the CPU key and takes over there, ``_C_cuda.abi3.so`` under the
CUDA key, where torch has CUDA and the library has code for the GPUs (docs/kernels.md); on a GPU
without it the Triton kernels do (``triton_ops``). The dispatcher chooses by the device of the
rows: nothing is swapped at run time, and :func:`backend_of` tells which kernel runs and why.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import reference, triton_ops
from .capability import visible_capabilities, why_unfit

OPS = ("add_scatter_", "align_rows", "align_rows_", "map_rows", "map_rows_", "sum_rows")
ISA_NAMES = ("best", "baseline", "avx2", "avx512")  # index = the ops' `isa` argument
# An instruction set that was measured ahead of a newer one: sum_rows, 2026-11-24, two threads of a
# Zen 4, D = 768-1280: on 16-bit rows AVX2 is 2-6% ahead of AVX-512 in three runs and level in two.
_FASTEST_ISA = {"sum_rows": "avx2"}
_PACKAGE = Path(__file__).resolve().parent.parent
_MAP = "Tensor scale, Tensor shift, Tensor? recentre"
_MATRIX = _MAP.replace("scale", "matrix")
SCHEMAS = (
    # `isa` chooses among a device's kernels, 0 is its best. On a CPU: the instruction set, for
    # tests and benchmarks. On CUDA: the operands of add_scatter_ and map_rows (1 is "fast").
    f"align_rows(Tensor rows, {_MAP}, ScalarType dtype, int isa=0) -> Tensor",
    f"align_rows_(Tensor(a!) out, Tensor rows, {_MAP}, int isa=0) -> ()",
    f"map_rows(Tensor rows, {_MATRIX}, ScalarType dtype, int isa=0) -> Tensor",
    f"map_rows_(Tensor(a!) out, Tensor rows, {_MATRIX}, int isa=0) -> ()",
    f"sum_rows(Tensor rows, {_MAP.replace('Tensor ', 'Tensor? ')}, bool normalize, int isa=0)"
    + " -> (Tensor, Tensor, Tensor)",
    "add_scatter_(Tensor(a!) scatter, Tensor(b!) total, Tensor rows, Tensor centre, "
    + "Tensor? weights, bool normalize, bool accurate, int isa=0) -> Tensor",
    "cpu_isa() -> int",
)


def _define_ops() -> torch.library.Library:
    library = torch.library.Library("realign_fast", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    for name in OPS:
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    return library


def _load_compiled() -> str:
    """Load the compiled kernels and return "" or, where there are none, the reason."""
    binary = _PACKAGE / "_C.abi3.so"
    if binary.exists():
        torch.ops.load_library(str(binary))
        return ""
    build_info = _PACKAGE / "_build_info.json"
    reason = json.loads(build_info.read_text())["reason"] if build_info.exists() else ""
    reason = reason or (
        f"{_PACKAGE} holds no {binary.name}; run `pip install -e .` in the source tree, or start "
        "Python outside it to import the installed package"
    )
    warnings.warn(f"realign_fast runs on plain torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _load_cuda() -> str:
    """Load the CUDA kernels where torch has CUDA and return "" or, if not, the reason."""
    binary, build_info = _PACKAGE / "_C_cuda.abi3.so", _PACKAGE / "_build_info.json"
    if not torch.version.cuda:
        return "this torch has no CUDA"
    info = json.loads(build_info.read_text()) if build_info.exists() else {}
    if not binary.exists():
        return info.get("why_no_cuda") or f"{_PACKAGE} holds no {binary.name}"
    built = info.get("cuda", "")
    if built and built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{binary.name} is built with CUDA {built}, torch with {torch.version.cuda}; "
            "install realign_fast again with an nvcc of that version"
        )
    if unfit := why_unfit(info.get("cuda_archs", "").split(), visible_capabilities()):
        reason = f"{binary.name} is not used: {unfit}"
        warnings.warn(f"realign_fast: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    try:
        torch.ops.load_library(str(binary))
    except OSError as error:
        return f"{binary.name} does not load: {error}"
    return ""


_library = _define_ops()
_why_not_compiled = _load_compiled()
_why_not_cuda = _load_cuda()
_triton_ops, _why_not_triton = triton_ops.register(_library)
_cpu_isa = 0 if _why_not_compiled else int(torch.ops.realign_fast.cpu_isa())


@torch.library.register_fake("realign_fast::align_rows")
@torch.library.register_fake("realign_fast::map_rows")
def _(rows, linear, shift, recentre, dtype, isa=0):
    return torch.empty(rows.shape, dtype=dtype, device=rows.device)


@torch.library.register_fake("realign_fast::align_rows_")
@torch.library.register_fake("realign_fast::map_rows_")
def _(out, rows, linear, shift, recentre, isa=0):
    return None


@torch.library.register_fake("realign_fast::sum_rows")
def _(rows, scale, shift, recentre, normalize, isa=0):
    total = rows.new_empty(rows.shape[-1], dtype=torch.float64)
    return total, total.new_empty(()), rows.new_empty(3, dtype=torch.int64)


@torch.library.register_fake("realign_fast::add_scatter_")
def _(scatter, total, rows, centre, weights, normalize, accurate, isa=0):
    return rows.new_empty(3, dtype=torch.int64)


def _keep_inputs(ctx, inputs, output):
    rows, linear, shift, recentre, _dtype, _isa = inputs
    ctx.save_for_backward(rows, linear, shift, recentre)


def _align_rows_gradient(ctx, grad):
    return reference.align_rows_backward(grad, *ctx.saved_tensors), None, None, None, None, None


for _name in ("align_rows", "map_rows"):
    torch.library.register_autograd(
        f"realign_fast::{_name}", _align_rows_gradient, setup_context=_keep_inputs
    )


class Backend(NamedTuple):
    """Which kernel answers an op, and why."""

    kernel: str  # "cpu" (csrc/cpu), "cuda" (csrc/cuda), "triton" or "reference" (reference.py)
    why: str


def backend_of(op: str, device: torch.device | str) -> Backend:
    """The kernel that answers ``op`` for rows on ``device``; the dispatcher itself is asked."""
    if op not in OPS:
        raise ValueError(f"backend_of: no op {op!r}; the ops are {', '.join(OPS)}")
    device = torch.device(device)
    if device.type == "cuda" and op in _triton_ops:
        return Backend("triton", f"Triton: {_why_not_cuda or 'no compiled library for this GPU'}")
    compiled = device.type in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"realign_fast::{op}", device.type.upper()
    )
    if compiled:
        isa = f", {cpu_isa(op)} in use" if device.type == "cpu" else ""
        return Backend(device.type, f"compiled{isa}")
    if device.type == "cpu":
        return Backend("reference", f"plain torch: {_why_not_compiled}")
    also = f": {_why_not_cuda}, and {_why_not_triton}" if device.type == "cuda" else ""
    return Backend("reference", f"plain torch: no kernel is compiled for {device.type}{also}")


def why_no_cuda() -> str:
    """Why the compiled CUDA kernels are not loaded, or ""."""
    return _why_not_cuda


def cpu_isa(op: str = "") -> str:
    """The best instruction set of this CPU that kernels are compiled for; "none" without any.

    With ``op`` the one that this op runs on, which may be an older one that was measured faster.
    """
    if _why_not_compiled:
        return "none"
    return ISA_NAMES[min(_cpu_isa, ISA_NAMES.index(_FASTEST_ISA.get(op, ISA_NAMES[-1])))]


def isa_of(op: str) -> int:
    """The ``isa`` argument that this op runs with on this CPU."""
    return 0 if _why_not_compiled else ISA_NAMES.index(cpu_isa(op))
