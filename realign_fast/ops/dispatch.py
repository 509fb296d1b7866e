"""Schemas of the ops, and the choice of the kernel that answers each op on each device.

``reference.py`` implements every op on every device, and on tensors without memory for tracing. The
compiled library ``_C.abi3.so`` registers its kernels under the CPU key, and ``_C_cuda.abi3.so``
under the CUDA key, if torch has CUDA. PyTorch's dispatcher chooses by the device of the rows. On a
GPU it calls the chooser (``chooser.py``), which stands before the compiled kernels, those of Triton
(``triton_ops``) and the reference. :func:`backend_of` says which kernel runs and why.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._libraries import PACKAGE, build_info, why_not_loaded
from . import reference, triton_ops
from .chooser import VARIABLE, Chooser
from .chooser import Backend as Backend
from .memory import plain

OPS = (
    *("add_scatter_", "align_rows", "align_rows_", "align_rows_backward"),
    *("map_rows", "map_rows_", "sum_rows"),
)
# On a CPU the index of an instruction set is the op's argument `variant`.
INSTRUCTION_SETS = ("best", "baseline", "avx2", "avx512")
# The instruction set of ops whose bytes are stored and summed across machines. Registers of another
# width add in another order, and every x86 machine since AVX2 has the sums of AVX2. For rows in the
# cache AVX-512 is 3% slower to 17% faster (docs/performance.md); reading limits both.
_INSTRUCTION_SET_OF = {"sum_rows": "avx2"}
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_MAP = "Tensor linear, Tensor shift, Tensor? recentre"
_LENGTH = "float? length=1.0, int variant=0"
SCHEMAS = (
    # `variant` selects one of the device's kernels; 0 is the best. On a CPU it is the instruction
    # set, which tests and benchmarks choose. On CUDA it selects the operands of add_scatter_ and
    # map_rows: 1 is "fast". The reference and the Triton kernels ignore it.
    f"align_rows(Tensor rows, {_MAP}, ScalarType dtype, {_LENGTH}) -> Tensor",
    f"align_rows_(Tensor(a!) out, Tensor rows, {_MAP}, {_LENGTH}) -> ()",
    f"align_rows_backward(Tensor rows, Tensor grad, {_MAP}, float? length=1.0, "
    + "bool normalize=True, int variant=0) -> Tensor",
    f"map_rows(Tensor rows, {_MAP}, ScalarType dtype, {_LENGTH}) -> Tensor",
    f"map_rows_(Tensor(a!) out, Tensor rows, {_MAP}, {_LENGTH}) -> ()",
    "sum_rows(Tensor rows, Tensor? scale, Tensor? shift, Tensor? recentre, bool normalize, "
    + "int variant=0) -> (Tensor, Tensor, Tensor)",
    "add_scatter_(Tensor(a!) scatter, Tensor(b!) total, Tensor rows, Tensor centre, "
    + "Tensor? weights, bool normalize, bool accurate, int variant=0) -> Tensor",
    "cpu_isa() -> int",
)


_library = torch.library.Library("realign_fast", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
for _name in OPS:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _load_kernels(library: Path, key: str) -> str:
    """Load kernels of a dispatch key; return "", or the reason why they are not there."""

    def load(path: str) -> None:
        torch.ops.load_library(path)
        if not _has_kernel("realign_fast::sum_rows", key):
            raise OSError(f"it holds no {key} kernels of realign_fast")

    return why_not_loaded(library, load)


def _load_compiled() -> str:
    """Load the compiled CPU kernels; return "", or the reason if there are none."""
    binary = PACKAGE / "_C.abi3.so"
    if _asked == "reference":
        reason = f"{VARIABLE}=reference"
    elif binary.exists():
        reason = _load_kernels(binary, "CPU")
    else:
        reason = build_info().get("reason") or (
            f"{PACKAGE} holds no {binary.name}; run `pip install -e .` in the source tree, or "
            "start Python outside it to import the installed package"
        )
    if reason:
        warnings.warn(f"realign_fast runs on plain torch: {reason}", RuntimeWarning, stacklevel=2)
    return str(reason)


def _load_cuda() -> str:
    """Load the compiled CUDA kernels; return "", or the reason why they are not loaded."""
    binary, info = PACKAGE / "_C_cuda.abi3.so", build_info()
    if not torch.version.cuda:
        return "this torch has no CUDA"
    if not binary.exists():
        return str(info.get("why_no_cuda") or f"{PACKAGE} holds no {binary.name}")
    built_version = info.get("cuda", "")
    if built_version and built_version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"{binary.name} is built with CUDA {built_version}, torch with {torch.version.cuda}; "
            "install realign_fast again with an nvcc of that version"
        )
    if reason := _load_kernels(binary, "CUDA"):
        warnings.warn(f"realign_fast: {reason}", RuntimeWarning, stacklevel=2)
    return reason


_asked = os.environ.get(VARIABLE, "cpu")
if _asked not in ("cuda", "triton", "reference", "cpu"):
    raise ValueError(f"{VARIABLE}: expected cuda, triton, reference or cpu, got {_asked!r}")
_why_not_compiled = _load_compiled()
HAS_CPU_KERNELS = not _why_not_compiled
_why_not_cuda = _load_cuda()


def _choose_on_gpus() -> Chooser:
    """Let a chooser answer for rows on a GPU, in place of the kernels of the compiled library."""
    compiled, keys = SimpleNamespace(), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op in [] if _why_not_cuda else OPS:
        kernel = torch.library.get_kernel(f"realign_fast::{op}", "CUDA")
        setattr(compiled, op, partial(kernel.call_boxed, keys))
    backends = {"cuda": _why_not_cuda or compiled, "triton": triton_ops.why_not() or triton_ops}
    chooser = Chooser(backends | {"reference": reference})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of the kernels behind it
        for op in OPS:
            _library.impl(op, partial(chooser.call, op), "CUDA")
    if _asked in ("cuda", "triton") and not parent_process():
        warnings.warn(f"realign_fast: {VARIABLE}={_asked} chooses for GPUs", stacklevel=2)
    return chooser


CHOOSER = _choose_on_gpus()
_best_instruction_set = 0 if _why_not_compiled else int(torch.ops.realign_fast.cpu_isa())


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, linear, shift, recentre, _dtype, ctx.length, _variant = inputs
    ctx.save_for_backward(rows, linear, shift, recentre)


def _gradient_of_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # For a second derivative autograd has to differentiate what is done here.
    backward = reference.align_rows_backward if torch.is_grad_enabled() else rows_gradient
    rows, linear, shift, recentre = ctx.saved_tensors
    return backward(rows, grad, linear, shift, recentre, ctx.length), *[None] * 6


def rows_gradient(
    rows: Tensor,
    grad: Tensor,
    linear: Tensor,
    shift: Tensor,
    recentre: Tensor | None,
    length: float | None,
) -> Tensor:
    """Return ``reference.align_rows_backward`` by the kernels of the device.

    A number needs one pass over the rows. For a diagonal or a matrix A one kernel computes
    ``A u + b``, the backward kernel goes back to it, torch multiplies by A^T, and the backward
    kernel goes back through ``u``. The product is torch's, at the full speed of the device and in
    the precision that the user has set for products, because ``map_rows`` normalises its rows.
    """
    backward: Callable[..., Tensor] = torch.ops.realign_fast.align_rows_backward
    grad = plain(grad).contiguous()
    if linear.dim() == 0:
        return backward(rows, grad, linear, shift, recentre, length)
    dtype = torch.float64 if torch.float64 in (rows.dtype, grad.dtype) else torch.float32
    one, zeros = torch.ones_like(shift[0]), torch.zeros_like(shift)
    if length is not None or recentre is not None:
        shifted = torch.ops.realign_fast.map_rows(rows, linear, shift, None, dtype, None)
        grad = backward(shifted, grad, one, zeros, recentre, length, False)
    linear, grad = linear.to(dtype), grad.to(dtype)
    grad = grad * linear if linear.dim() == 1 else grad @ linear
    return backward(rows, grad, one, zeros, None, None)


for _name in ("align_rows", "map_rows"):
    torch.library.register_autograd(
        f"realign_fast::{_name}", _gradient_of_rows, setup_context=_save_inputs
    )


def backend_of(op: str, device: torch.device | str) -> Backend:
    """Return the kernel that answers ``op`` for rows on ``device``; nothing is run.

    Raises:
        ValueError: ``op`` is not one of :data:`OPS`.
        RuntimeError: no backend is left for a GPU.
    """
    if op not in OPS:
        raise ValueError(f"backend_of: there is no op {op!r}; the ops are {', '.join(OPS)}")
    device = torch.device(device)
    if device.type == "cuda":
        return CHOOSER.choose(op, device.index or 0, test=False)
    if device.type == "cpu" and HAS_CPU_KERNELS:
        reason = " for the same sums on every x86 CPU" if op in _INSTRUCTION_SET_OF else ""
        return Backend("cpu", f"compiled, {cpu_instruction_set(op)} in use{reason}")
    reason = f"no kernel is compiled for {device.type}"
    reason = _why_not_compiled if device.type == "cpu" else reason
    return Backend("reference", f"plain torch: {reason}")


def chosen_backends(device: torch.device | str) -> dict[str, str]:
    """Choose the backend of every op for a GPU now; {} for the CPU, or if no GPU is here to ask."""
    device = torch.device(device)
    if device.type != "cuda" or not (torch.cuda.is_available() or _asked in CHOOSER.backends):
        return {}
    return {op: CHOOSER.choose(op, device.index or 0).kernel for op in OPS}


def why_no_cuda() -> str:
    """Return why the compiled CUDA kernels are not loaded, or "" if they are."""
    return _why_not_cuda


def cpu_instruction_set(op: str = "") -> str:
    """Return the name of the best instruction set of this CPU that kernels are compiled for.

    With ``op`` it is the instruction set that this op runs on: an older one where its bytes must be
    those of other machines. It is "none" if no kernels are compiled.
    """
    if _why_not_compiled:
        return "none"
    newest = INSTRUCTION_SETS.index(_INSTRUCTION_SET_OF.get(op, INSTRUCTION_SETS[-1]))
    return INSTRUCTION_SETS[min(_best_instruction_set, newest)]


_sum_rows_set = cpu_instruction_set("sum_rows")
SUM_ROWS_VARIANT = INSTRUCTION_SETS.index(_sum_rows_set) if HAS_CPU_KERNELS else 0
