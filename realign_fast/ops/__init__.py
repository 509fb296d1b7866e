"""Ops on rows: public functions, and which kernel answers each of them on which device."""

from .dispatch import ISA_NAMES, OPS, Backend, backend_of, cpu_isa, isa_of, why_no_cuda
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
    "ISA_NAMES",
    "OPS",
    "Backend",
    "RowSums",
    "add_scatter_",
    "align_rows",
    "backend_of",
    "cpu_isa",
    "isa_of",
    "sum_mapped_rows",
    "sum_rows",
    "why_no_cuda",
    "working_dtype",
]
