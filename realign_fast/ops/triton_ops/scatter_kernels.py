"""Triton kernels of ``add_scatter_``: a symmetric product on tensor cores.

The rows are processed in chunks. One kernel packs a chunk: ``sqrt(w) (u - c)``, scaled by a power
of two for each column, is split into two float16 numbers ``high + low``. A second kernel multiplies
tiles of the upper triangle, split over the rows as well, ``high high + high low + low high``, and
starts a new sum every 1024 rows, because tensor cores truncate instead of rounding. A third adds
the splits to the result in float64, in their order. The omitted ``low low`` matters on the diagonal
alone, where it does not average out, and is added there. For float64 rows and ``accurate=True``
everything is float64, and nothing is split.

No launch waits for the GPU, and the launches depend on shapes and dtypes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_kernels import TRITON_DTYPE, aligned, launch_sums, on_device_of

_PROMOTE_ROWS = 1024  # summed on tensor cores before the sum is added to a rounded one
_PACK_ROWS = 32  # that a program packs
_DEPTH = 64  # the number of packed rows is a multiple of it
_CHUNK_ENTRIES = 1 << 24  # of a packed term: 32 MiB in float16
_PROGRAMS = 512  # enough to keep a GPU busy


@triton.jit(do_not_specialize=["packed_rows", "split_rows"])
def multiply_packed_kernel(
    parts,  # [splits, tiles, TILE, TILE] SUM: product of a split of the rows
    packed,  # [TERMS, packed_rows, WIDTH]
    pairs,  # [2, tiles] int64: the two tiles of columns that are multiplied
    packed_rows,  # a multiple of DEPTH
    split_rows,  # a multiple of PROMOTE
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PROMOTE: tl.constexpr,
    TERMS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Multiply two tiles of columns over one split of the rows."""
    tiles = tl.num_programs(0)
    row_columns = tl.load(pairs + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    columns = tl.load(pairs + tiles + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    row_columns, columns = tl.multiple_of(row_columns, TILE), tl.multiple_of(columns, TILE)
    low = packed_rows.to(tl.int64) * WIDTH
    first = tl.program_id(1) * split_rows
    end = tl.minimum(first + split_rows, packed_rows)
    total = tl.zeros([TILE, TILE], SUM)
    for group in range(first, end, PROMOTE):
        part = tl.zeros([TILE, TILE], SUM)
        for row in range(group, tl.minimum(group + PROMOTE, end), DEPTH):
            deep = (row + tl.arange(0, DEPTH)).to(tl.int64) * WIDTH
            a_entry = packed + deep[None, :] + row_columns[:, None]
            b_entry = packed + deep[:, None] + columns[None, :]
            a, b = tl.load(a_entry), tl.load(b_entry)
            part = tl.dot(a, b, part, input_precision="ieee")
            if TERMS == 2:
                part = tl.dot(a, tl.load(b_entry + low), part)
                part = tl.dot(tl.load(a_entry + low), b, part)
        total += part
    entry = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    slot = tl.program_id(1).to(tl.int64) * tiles + tl.program_id(0)
    tl.store(parts + slot * (TILE * TILE) + entry, total)


@triton.jit(do_not_specialize=["splits"])
def add_parts_kernel(
    scatter,  # [D, D] float64; only its upper triangle is read and written
    parts,  # [splits, tiles, TILE, TILE]
    pairs,  # [2, tiles] int64
    unscale,  # [WIDTH] float64
    splits,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the splits of ROWS rows of a tile to the result, in order."""
    tiles = tl.num_programs(0)
    line = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    entry = line[:, None] * TILE + tl.arange(0, TILE)[None, :]
    sums = tl.zeros([ROWS, TILE], tl.float64)
    for split in range(0, splits):
        slot = (split * tiles).to(tl.int64) + tl.program_id(0)
        sums += tl.load(parts + slot * (TILE * TILE) + entry).to(tl.float64)
    row = tl.load(pairs + tl.program_id(0)) * TILE + line
    column = tl.load(pairs + tiles + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    sums = sums * tl.load(unscale + row)[:, None] * tl.load(unscale + column)[None, :]
    mask = (row[:, None] <= column[None, :]) & (column < COLUMNS)[None, :]
    target = scatter + row[:, None] * COLUMNS + column[None, :]
    tl.store(target, tl.load(target, mask, other=0) + sums, mask)


def _power_above(values: Tensor) -> Tensor:
    """Return the powers of two above the values, float64; 1 where a value is 0."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent)


def _column_scale(largest: Tensor) -> Tensor:
    """Return the powers of two that scale columns to the upper end of float16, [WIDTH] float64."""
    return 2.0**15 / _power_above(largest)


def add_scatter_(
    scatter: Tensor,  # [D, D] float64; only its upper triangle is read and written
    total: Tensor,  # [D] float64
    rows: Tensor,  # [N, D]
    centre: Tensor,  # [D] float64
    weights: Tensor | None,  # [N] float64
    normalize: bool,
    accurate: bool,
    variant: int = 0,
) -> Tensor:
    """Compute ``reference.add_scatter_`` in one read of the rows (two with ``normalize=False``)."""
    count, columns = rows.shape
    wide = accurate or rows.dtype == torch.float64
    side = 64 if wide or columns <= 64 else 128
    width = triton.cdiv(columns, side) * side
    m, dtype = (torch.float64,) * 2 if wide else (torch.float32, torch.float16)
    c = torch.zeros(width, dtype=torch.float64, device=rows.device)
    c[:columns] = centre
    counts = torch.zeros(3, dtype=torch.int64, device=rows.device)
    scale = torch.ones_like(c)
    if not wide and normalize and count:
        largest = 1 + c.abs()
        scale = _column_scale(largest if weights is None else largest * weights.amax().sqrt())
    pairs = torch.triu_indices(width // side, width // side, device=rows.device)
    chunk_rows = max(_CHUNK_ENTRIES // width // _PROMOTE_ROWS, 1) * _PROMOTE_ROWS
    source = aligned(rows)
    for first in range(0, count, chunk_rows):
        chunk = source[first : first + chunk_rows]
        w = None if weights is None else weights[first : first + chunk_rows]
        if not wide and not normalize:
            differences = torch.where(chunk.isfinite().all(1, True), chunk.double() - centre, 0)
            if w is not None:
                differences *= w.sqrt()[:, None]
            scale[:columns] = _column_scale(differences.abs().amax(dim=0))
        packed_rows = triton.cdiv(len(chunk), _DEPTH) * _DEPTH
        packed = torch.empty(1 if wide else 2, packed_rows, width, dtype=dtype, device=rows.device)
        vectors = None, None, None, c, w, scale
        sums, numbers = launch_sums(chunk, m, _PACK_ROWS, vectors, packed, normalize=normalize)
        added = sums / torch.stack([scale, scale * scale])
        total += added[0, :columns]
        counts += numbers[1:].long()
        with on_device_of(rows):
            _multiply(scatter, packed, pairs, 1 / scale, side)
        scatter.diagonal().add_(added[1, :columns])
    return counts


def _multiply(scatter: Tensor, packed: Tensor, pairs: Tensor, unscale: Tensor, side: int) -> None:
    """Add the unscaled product ``packed^T packed`` to the upper triangle of ``scatter``."""
    terms, packed_rows, width = packed.shape
    tiles = pairs.shape[1]
    groups = triton.cdiv(packed_rows, _PROMOTE_ROWS)
    splits = triton.cdiv(groups, triton.cdiv(groups, triton.cdiv(_PROGRAMS, tiles)))
    split_rows = triton.cdiv(groups, splits) * _PROMOTE_ROWS
    sum_dtype = torch.float32 if terms == 2 else torch.float64
    parts = torch.empty(splits, tiles, side, side, dtype=sum_dtype, device=packed.device)
    multiply_packed_kernel[(tiles, splits)](
        parts,
        packed,
        pairs,
        packed_rows,
        split_rows,
        WIDTH=width,
        PROMOTE=_PROMOTE_ROWS,
        TERMS=terms,
        SUM=TRITON_DTYPE[sum_dtype],
        **product_tile(side, terms),
    )
    rows = 16
    add_parts_kernel[(tiles, side // rows)](
        scatter, parts, pairs, unscale, splits, COLUMNS=len(scatter), TILE=side, ROWS=rows
    )


def product_tile(side: int, terms: int) -> dict[str, int]:
    """Return TILE, DEPTH, warps and stages; operands of 3 stages fit 99 KiB of shared memory."""
    return {
        "TILE": side,
        "DEPTH": 32 if side == 128 else 16 if terms == 1 else 64,
        "num_warps": 8 if side == 128 else 4,
        "num_stages": 3,
    }
