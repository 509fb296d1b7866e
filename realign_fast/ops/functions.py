"""Public functions of the ops: they check shapes, dtypes and devices and then call the op.

The schemas and the choice of the kernel are in ``dispatch.py``; ``reference.py`` states what every
op computes in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._argument_checks import expect_tensor
from . import reference
from .dispatch import HAS_CPU_KERNELS, SUM_ROWS_VARIANT
from .memory import apart, plain, share_memory

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OPS = torch.ops.realign_fast
_MAP_OPS: tuple[Callable[..., Tensor], ...] = (_OPS.align_rows.default, _OPS.map_rows.default)
_WRITING_OPS: tuple[Callable[..., None], ...] = _OPS.align_rows_.default, _OPS.map_rows_.default
_BLOCK_ROWS = 1 << 13  # rows that sum_mapped_rows maps at a time


def align_rows(
    rows: Tensor,
    scale: Tensor | float,
    shift: Tensor,
    recentre: Tensor | None = None,
    *,
    length: float | None = 1.0,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Map rows to ``c unit(unit(s u + b) + h)`` with ``u = x / |x|``; each row is read once.

    This is ReAlign's row map (arXiv 2602.07026, section 4), differentiable in ``rows``. With A in
    place of s the product is computed in float32, unless the rows or the result are float64.

    Args:
        rows: [N, D] of :data:`DTYPES`; rows may be strided, strided columns are copied first.
        scale: s, a number or a 0-d tensor; or A, [D, D], or its diagonal, [D].
        shift: b, [D].
        recentre: h, [D]; ``None`` stops after ``unit(s u + b)``. Tensors of the map that are on
            another device than the rows are copied to it in every call.
        length: c, the length of the result's rows, finite; ``None`` leaves the last normalisation
            out, so that the result is ``s u + b``, or ``unit(s u + b) + h`` with ``recentre``.
        out_dtype: dtype of the result; by default that of ``out``, or of the rows.
        out: [N, D] tensor to write into, on the device of the rows.

    Returns:
        [N, D] rows of length c. A zero row has ``u = 0``; a row with a NaN or an infinity becomes
            NaN.

    Raises:
        ValueError: a shape does not fit, ``out`` is on another device than the rows, or ``length``
            is not finite.
        TypeError: a dtype is not floating point, or ``out_dtype`` contradicts ``out``.
        RuntimeError: ``out=`` with rows that need a gradient, or a map that needs one.

    Inside the transforms of ``torch.func``, and of rows with a forward-mode tangent, plain torch in
    float64 answers (``ops/reference.py``) in place of the kernel.
    """
    if _may_call_kernel(rows, scale, shift, recentre, length, out, out_dtype):
        if not isinstance(scale, Tensor):
            scale = torch.tensor(scale, dtype=torch.float64, device="cpu")
        try:
            if out is not None:
                _WRITING_OPS[scale.dim() > 0](out, rows, scale, shift, recentre, length)
                return out
            with torch._C._AutoDispatchBelowAutograd():
                kernel = _MAP_OPS[scale.dim() > 0]
                return kernel(rows, scale, shift, recentre, out_dtype or rows.dtype, length)
        except RuntimeError:  # the kernel refused an argument, which is converted or named below
            pass
    rows = _checked_rows("align_rows", rows)
    if _needs_gradient(scale, shift, recentre):
        raise RuntimeError(
            "align_rows: scale, shift and recentre are constants and get no gradient; detach them"
        )
    row_map = _map_arguments("align_rows", rows, scale, shift, recentre)
    if length is not None and not -math.inf < length < math.inf:  # (dynamo traces no isfinite)
        raise ValueError(f"align_rows: expected a finite length or None, got {length}")
    if out is not None:
        _check_out(rows, out, out_dtype)
        own = out.resolve_neg()
        _WRITING_OPS[row_map[0].dim() > 0](own, rows, *apart(row_map, own), length)
        return out if own is out else out.copy_(own)
    _check_dtype("align_rows", "out_dtype", out_dtype or rows.dtype)
    # ONNX knows plain operators only. A registered decomposition would make Inductor fail where the
    # variable CI is set.
    is_plain = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    is_plain = is_plain or is_transformed(rows)
    kernel = reference.map_rows if is_plain else _MAP_OPS[row_map[0].dim() > 0]
    return kernel(rows, *row_map, out_dtype or rows.dtype, length)


def _may_call_kernel(
    rows: Tensor,
    scale: Tensor | float,
    shift: Tensor,
    recentre: Tensor | None,
    length: float | None,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
) -> bool:
    """Return whether the compiled CPU kernel checks enough; our checks cost as much as 100 rows."""
    return (
        HAS_CPU_KERNELS
        and not torch.compiler.is_compiling()
        and type(rows) is type(shift) is Tensor
        and type(scale) in (Tensor, float)
        and rows.is_cpu
        and shift.dtype == torch.float64
        and (length is None or math.isfinite(length))
        and (out is None or (type(out) is Tensor and out_dtype is None and not out.is_neg()))
        and not _needs_gradient(rows, out, scale, shift, recentre)
        and not is_transformed(rows)
    )


def _needs_gradient(*values: Tensor | float | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    for value in values:  # (in two thirds of the time of `any`: one row takes 10 us in all)
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def is_transformed(rows: Tensor) -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation wraps the rows."""
    has_tangent = (
        forward_ad._current_level >= 0 and forward_ad.unpack_dual(rows).tangent is not None
    )
    return has_tangent or torch._C._are_functorch_transforms_active()


def _check_out(rows: Tensor, out: Tensor, out_dtype: torch.dtype | None) -> None:
    if out.shape != rows.shape:
        raise ValueError(
            f"align_rows: out has shape {list(out.shape)}, the rows {list(rows.shape)}; "
            "give out the shape of the rows"
        )
    _check_devices("align_rows", rows, out=out)
    _check_dtype("align_rows", "out", out.dtype)
    if len(out) and out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(
            f"align_rows: the columns of out lie {out.stride(1)} apart, expected 1; give a "
            "contiguous out"
        )
    if out_dtype not in (None, out.dtype):
        raise TypeError(
            f"align_rows: out is {out.dtype} but out_dtype says {out_dtype}; omit out_dtype"
        )
    if _needs_gradient(rows, out) or is_transformed(rows):
        raise RuntimeError("align_rows: out= keeps no gradient; drop out= or use torch.no_grad()")


class RowSums(NamedTuple):
    """Result of :func:`sum_rows`, on the device of the rows."""

    total: Tensor  # [D] float64, sum of the rows
    energy: Tensor  # [] float64, sum of their squared norms
    counts: Tensor  # [3] int64: rows (zero rows among them), zero rows, non-finite rows


def sum_rows(
    rows: Tensor,
    scale: Tensor | float | None = None,
    shift: Tensor | None = None,
    recentre: Tensor | None = None,
    *,
    normalize: bool = True,
) -> RowSums:
    """Return sum, energy and counts of unit rows in one read, accumulated in float64.

    Rows of 16 and 32 bits are added up in float32 in blocks of 64: the mean has a relative error of
    about 1e-8, and up to 1e-6 where the rows of a block are equal.

    With ``scale`` and ``shift`` the unit rows are first mapped to ``unit(s u + b)`` (the drift
    pass of ReAlign, arXiv 2602.07026, section 4), with ``recentre`` by the whole map. The sums have
    no gradient.

    Args:
        rows: [N, D], as in :func:`align_rows`.
        scale, shift, recentre: the map, as in :func:`align_rows`; none of them by default.
        normalize: ``False`` sums the rows as they are; no map can be given then.

    Returns:
        :class:`RowSums`. A zero row counts as a row and adds nothing (with a map: the image of
        ``u = 0``); a row with a NaN or an infinity is counted separately and left out.
        The compiled kernel returns the same bytes for any number of threads.

    Raises:
        ValueError: a shape does not fit, or the map is incomplete.
        TypeError: a dtype is not floating point.
    """
    rows = _checked_rows("sum_rows", rows)
    if (scale is None) != (shift is None) or (recentre is not None and shift is None):
        raise ValueError("sum_rows: a map needs scale and shift together; give both or neither")
    if scale is not None and shift is not None:
        if not normalize:
            raise ValueError("sum_rows: the map works on unit rows; leave normalize=True with it")
        scale, shift, recentre = row_map = _map_arguments("sum_rows", rows, scale, shift, recentre)
        if scale.dim():
            dtype = working_dtype(rows)
            return sum_mapped_rows(
                rows.detach(), lambda block: align_rows(block, *row_map, out_dtype=dtype)
            )
    variant = SUM_ROWS_VARIANT if rows.is_cpu else 0
    return RowSums(*_OPS.sum_rows(rows.detach(), scale, shift, recentre, normalize, variant))


def sum_mapped_rows(rows: Tensor, mapping: Callable[[Tensor], Tensor]) -> RowSums:
    """Return :func:`sum_rows` of ``mapping(rows)``, computed block by block.

    The counts are those of the rows before the mapping. The mapping must keep non-finite rows
    non-finite, as :func:`align_rows` does.
    """
    parts = []
    for block in rows.split(_BLOCK_ROWS) if len(rows) else [rows]:
        total, energy, counts = sum_rows(mapping(block), normalize=False)
        counts[1] = (block == 0).all(dim=1).sum()  # (the image of a zero row is not zero)
        parts.append(RowSums(total, energy, counts))
    return RowSums(*(torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)))


def working_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype of intermediate results: float64 for float64 rows, otherwise float32."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def add_scatter_(
    scatter: Tensor,
    total: Tensor,
    rows: Tensor,
    centre: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: bool = True,
    accurate: bool = False,
    fast: bool = False,
) -> Tensor:
    """Add ``sum w (u - c)(u - c)^T`` and ``sum w (u - c)`` of rows, ``u = x / |x|``, in one read.

    A covariance is accumulated from these sums. With ``c`` near the mean the products do not
    cancel, so float32 products under float64 sums are enough: the relative error is about 1e-8
    (2e-7 as simulated on CUDA, whose tensor cores truncate sums), and up to 6e-6 where hundreds of
    rows are equal and far from ``c``. The sums have no gradient.

    Args:
        scatter: [D, D] float64, contiguous, on the device of the rows, as total and weights are.
            Only its upper triangle is read and written.
        total: [D] float64, contiguous.
        rows: [N, D], as in :func:`align_rows`.
        centre: c, [D]. Use a vector that float32 represents exactly (``.float()``); otherwise the
            rounding error of c is added to every row.
        weights: w, [N], finite and not negative; 1 by default. The values are not checked while a
            CUDA graph is captured, because a capture must not wait for the device.
        normalize: ``False`` takes the rows as they are.
        accurate: multiply in float64, as is always done for float64 rows: the error is 1e-15
            instead of 1e-8, at half the speed or less.
        fast: on CUDA, multiply one float16 term of each entry instead of two: a third of the
            products, with a relative error of about 1e-5. The option has no effect on other
            devices and on float64 rows.

    Returns:
        The counts of :class:`RowSums`; non-finite rows are left out. The compiled kernel returns
        the same bytes for any number of threads.

    Raises:
        ValueError: a shape or a device does not fit, or a weight is negative or not finite.
        TypeError: a dtype is not floating point, or a sum is not float64.
    """
    rows = _checked_rows("add_scatter_", rows)
    columns = [rows.shape[1]]
    sums_and_shapes = (("scatter", scatter, columns * 2), ("total", total, columns))
    for name, tensor, expected in (*sums_and_shapes, ("centre", centre, columns)):
        if list(tensor.shape) != expected:
            raise ValueError(
                f"add_scatter_: rows have {rows.shape[1]} columns, {name} has shape "
                f"{list(tensor.shape)}, expected {expected}"
            )
    for name, tensor, _ in sums_and_shapes:
        if tensor.dtype != torch.float64 or not tensor.is_contiguous():
            raise TypeError(f"add_scatter_: expected contiguous float64 {name}, got {tensor.dtype}")
    if share_memory(scatter, total):
        raise ValueError("add_scatter_: scatter and total share memory; give each its own")
    _check_devices("add_scatter_", rows, scatter=scatter, total=total, weights=weights)
    if weights is not None:
        weights = _double_beside(rows, weights)
        if weights.shape != rows.shape[:1]:
            shape = list(weights.shape)
            raise ValueError(f"add_scatter_: {len(rows)} rows, but weights of shape {shape}")
        captured = weights.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured and not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("add_scatter_: a weight is negative or not finite; expected w >= 0")
    sums = [tensor.resolve_neg() for tensor in (scatter, total)]
    inputs = apart((rows.detach(), _double_beside(rows, centre), weights), *sums)
    variant = int(fast and rows.is_cuda)
    counts: Tensor = _OPS.add_scatter_(*sums, *inputs, normalize, accurate, variant)
    for tensor, result in zip((scatter, total), sums, strict=True):
        if result is not tensor:
            tensor.copy_(result)
    return counts


def _checked_rows(op: str, rows: Tensor) -> Tensor:
    """Return the rows with contiguous columns; raise if they are not a [N, D] tensor of floats."""
    expect_tensor(op, rows, floating=False)
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"{op}: expected rows [N, D] with D >= 1, got shape {list(rows.shape)}")
    _check_dtype(op, "rows", rows.dtype)
    rows = plain(rows)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        expected = ", ".join(str(known) for known in DTYPES)
        raise TypeError(f"{op}: expected {name} of {expected}, got {dtype}; convert first")


def _check_devices(op: str, rows: Tensor, **tensors: Tensor | None) -> None:
    """Raise if a tensor is on another device than the rows, whose kernel would misread it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != rows.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, the rows are on {rows.device}; "
                "move one of them to the device of the other"
            )


def _map_arguments(
    op: str, rows: Tensor, scale: Tensor | float, shift: Tensor, recentre: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return scale, shift and recentre as contiguous float64 tensors on the device of the rows."""
    expect_tensor(op, shift, "shift", floating=False)
    for name, vector in (("shift", shift), ("recentre", recentre)):
        if vector is not None and vector.shape != rows.shape[1:]:
            raise ValueError(
                f"{op}: rows have {rows.shape[1]} columns, {name} has shape {list(vector.shape)}; "
                "align the output of the encoder that the map was fitted on"
            )
    if isinstance(scale, int | float):
        # torch.full fills the tensor on its device; a copy to a GPU would wait for the GPU.
        scale = torch.full((), scale, dtype=torch.float64, device=rows.device)
    scale = torch.as_tensor(scale, dtype=torch.float64, device=rows.device)
    if list(scale.shape) not in ([], [rows.shape[1]], [rows.shape[1]] * 2):
        raise ValueError(
            f"{op}: rows have {rows.shape[1]} columns, scale has shape {list(scale.shape)}; "
            "expected a number, a diagonal [D] or a matrix [D, D]"
        )
    scale, shift = _double_beside(rows, scale), _double_beside(rows, shift)
    return scale, shift, None if recentre is None else _double_beside(rows, recentre)


def _double_beside(rows: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous float64 on the device of the rows, without its gradient."""
    if not torch.compiler.is_compiling() and rows.requires_grad and tensor.is_inference():
        tensor = tensor.clone()  # autograd saves no tensor of inference mode
    return plain(tensor.detach()).to(rows.device, torch.float64).contiguous()
