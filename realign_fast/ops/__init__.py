"""Ops on rows of embeddings: the public functions, and the kernel that answers each of them."""

from .dispatch import (
    INSTRUCTION_SETS,
    OPS,
    Backend,
    backend_of,
    cpu_instruction_set,
    why_no_cuda,
)
from .functions import (
    DTYPES,
    RowSums,
    add_scatter_,
    align_rows,
    sum_mapped_rows,
    sum_rows,
    working_dtype,
)

__all__ = [
    "DTYPES",
    "INSTRUCTION_SETS",
    "OPS",
    "Backend",
    "RowSums",
    "add_scatter_",
    "align_rows",
    "backend_of",
    "cpu_instruction_set",
    "sum_mapped_rows",
    "sum_rows",
    "why_no_cuda",
    "working_dtype",
]
