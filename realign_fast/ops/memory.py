"""The memory of tensors: which of them share it, and what may be written while others are read."""

from __future__ import annotations

from collections.abc import Sequence

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


def apart(read: Sequence[Tensor | None], *written: Tensor) -> list[Tensor | None]:
    """Return the tensors, copied if they share memory with one that is written meanwhile."""
    if torch.compiler.is_compiling():
        return list(read)
    spans = [_span(tensor) for tensor in written]
    return [x.clone() if x is not None and _overlaps(_span(x), spans) else x for x in read]


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether the spans of two tensors in memory overlap."""
    return not torch.compiler.is_compiling() and _overlaps(_span(a), [_span(b)])


def check_no_overlap(op: str, out: Tensor, rows: Tensor) -> None:
    """Raise if ``out`` overlaps itself, or overlaps the rows without being exactly the rows."""
    if len(out) > 1 and out.stride(0) < out.shape[1]:
        raise RuntimeError(f"{op}: the rows of out overlap one another; give out memory of its own")
    same_layout = out.stride(0) == rows.stride(0) and out.dtype == rows.dtype
    in_place = out.data_ptr() == rows.data_ptr() and same_layout
    if not in_place and share_memory(out, rows):
        raise RuntimeError(
            f"{op}: out overlaps the rows; give out memory of its own, or the rows themselves"
        )


def _overlaps(span: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    return any(span[0] < end and first < span[1] for first, end in spans)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and after the last one; (0, 0) without memory."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or not tensor.numel():
        return 0, 0
    start = tensor.data_ptr()
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    return start, start + (last + 1) * tensor.element_size()
