"""The memory of tensors: which of them share it, and what may be written while others are read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor with its numbers in memory, which a kernel reads as they lie there.

    Views with the negative or the conjugate bit and torch's zero tensors hold other numbers.
    """
    if torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def apart(tensor: Tensor, *written: Tensor) -> Tensor:
    """Return the tensor, copied if it shares memory with a tensor that is written meanwhile."""
    shared = not torch.compiler.is_compiling() and any(_share(tensor, out) for out in written)
    return tensor.clone() if shared else tensor


def check_no_overlap(op: str, out: Tensor, rows: Tensor) -> None:
    """Raise if ``out`` overlaps itself, or overlaps the rows without being exactly the rows."""
    if len(out) > 1 and out.stride(0) < out.shape[1]:
        raise RuntimeError(f"{op}: the rows of out overlap one another; give out memory of its own")
    same_layout = out.stride(0) == rows.stride(0) and out.dtype == rows.dtype
    in_place = out.data_ptr() == rows.data_ptr() and same_layout
    if not in_place and _share(out, rows):
        raise RuntimeError(
            f"{op}: out overlaps the rows; give out memory of its own, or the rows themselves"
        )


def _share(a: Tensor, b: Tensor) -> bool:
    """Return whether the spans of two tensors in memory overlap."""
    first, second = _span(a), _span(b)
    return first.start < second.stop and second.start < first.stop


def _span(tensor: Tensor) -> range:
    """Return the addresses from the first to the last byte; none for a tensor without memory."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or not tensor.numel():
        return range(0)
    start = tensor.data_ptr()
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    return range(start, start + (last + 1) * tensor.element_size())
