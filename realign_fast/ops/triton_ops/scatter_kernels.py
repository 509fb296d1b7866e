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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_kernels import (
    TRITON_DTYPE,
    aligned,
    image_block,
    kind_of_rows,
    launch,
    lengths_of_rows,
    on_device_of,
    tile,
)

_PROMOTE_ROWS = 1024  # summed on tensor cores before the sum is added to a rounded one
_PACK_ROWS = 32  # that a program packs
_DEPTH = 64  # the number of packed rows is a multiple of it
_CHUNK_ENTRIES = 1 << 24  # of a packed term: 32 MiB in float16
_PROGRAMS = 512  # enough to keep a GPU busy


@triton.jit(do_not_specialize=["row_count", "row_stride", "packed_rows"])
def pack_rows_kernel(
    rows,  # [N, D]
    row_count,
    row_stride,
    packed,  # [TERMS, packed_rows, WIDTH] float16 or float64
    sums,  # [3, programs, WIDTH] float64: of sqrt(w) packed, of low^2; largest |sqrt(w) (u - c)|
    counts,  # [programs, 3] int64: rows, zero, non-finite rows
    centre,  # c [WIDTH] float64
    weights,  # [N] float64
    scale,  # [WIDTH] float64, powers of two
    packed_rows,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # D rounded up to full tiles of the product
    PROGRAM_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MEASURE: tl.constexpr,  # only find the largest entries, from which the scale is chosen
    TERMS: tl.constexpr,
    M: tl.constexpr,
):
    """Pack one block of columns of PROGRAM_ROWS rows, and sum and count them."""
    own = tl.program_id(1) * BLOCK
    there = own + tl.arange(0, BLOCK)
    one = tl.full([ROWS], 1, tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    counted = tl.zeros([ROWS], tl.int64)
    zeros = tl.zeros([ROWS], tl.int64)
    outside = tl.zeros([ROWS], tl.int64)
    c = tl.load(centre + there, there < WIDTH, other=0)[None, :]
    factor = tl.load(scale + there, there < WIDTH, other=1)[None, :]
    no_map = centre, centre, centre
    for offset in range(0, PROGRAM_ROWS, ROWS):
        number = tl.program_id(0).to(tl.int64) * PROGRAM_ROWS + offset + tl.arange(0, ROWS)
        alive = number < row_count
        row = rows + tl.multiple_of(number * row_stride, ROW_STEP)
        root = alive.to(tl.float64)
        if WEIGHTED:
            root = tl.sqrt(tl.load(weights + number, alive, other=0))
        lengths, usual, _ = lengths_of_rows(
            row, row, alive, one, no_map, COLUMNS, BLOCK, 0, 1, False, M
        )
        if not NORMALIZE:
            lengths = one, one, one, one
        x = image_block(row, own, alive, no_map, lengths, COLUMNS, BLOCK, 0, 0, False, M)
        value = tl.where(usual[:, None], (x - c.to(M)) * root.to(M)[:, None], 0)
        largest = tl.maximum(largest, tl.max(tl.abs(value), axis=0).to(tl.float64))
        value = value * factor.to(M)
        counted += usual.to(tl.int64)

        unusual = alive & (usual == 0)
        if tl.max(unusual.to(tl.int32), axis=0) > 0:
            peak, zero, finite = kind_of_rows(row, unusual, COLUMNS, BLOCK)
            some = unusual & finite
            lengths, _, _ = lengths_of_rows(
                row, row, some, peak, no_map, COLUMNS, BLOCK, 0, 1, True, tl.float64
            )
            if not NORMALIZE:
                lengths = one, one, one, one
            exact = image_block(
                row, own, some, no_map, lengths, COLUMNS, BLOCK, 0, 0, True, tl.float64
            )
            exact = tl.where(some[:, None], (exact - c) * root[:, None], 0)
            largest = tl.maximum(largest, tl.max(tl.abs(exact), axis=0))
            value = tl.where(unusual[:, None], (exact * factor).to(M), value)
            counted += some.to(tl.int64)
            zeros += (some & zero).to(tl.int64)
            outside += (unusual & (finite == 0)).to(tl.int64)

        if MEASURE == 0:
            target = packed + number[:, None] * WIDTH + there[None, :]
            mask = (number < packed_rows)[:, None] & (there < WIDTH)[None, :]
            high = value.to(packed.dtype.element_ty)
            tl.store(target, high, mask)
            if TERMS == 2:
                low = (value - high.to(M)).to(packed.dtype.element_ty)
                tl.store(target + packed_rows.to(tl.int64) * WIDTH, low, mask)
                value = high.to(M) + low.to(M)
                squares += tl.sum(low.to(M) * low.to(M), axis=0).to(tl.float64)
            total += tl.sum(value * root.to(M)[:, None], axis=0).to(tl.float64)

    program = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * WIDTH
    sums += program * WIDTH + there
    tl.store(sums, total, there < WIDTH)
    tl.store(sums + size, squares, there < WIDTH)
    tl.store(sums + 2 * size, largest, there < WIDTH)
    if own == 0:
        tl.store(counts + program * 3, tl.sum(counted, axis=0))
        tl.store(counts + program * 3 + 1, tl.sum(zeros, axis=0))
        tl.store(counts + program * 3 + 2, tl.sum(outside, axis=0))


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
    m = torch.float64 if wide else torch.float32
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
        options = _PackOptions(normalize, m)
        if not wide and not normalize:
            sums, _, _ = _pack(chunk, c, scale, w, options._replace(measure=True))
            scale = _column_scale(sums[2].amax(dim=0))
        sums, part_counts, packed = _pack(chunk, c, scale, w, options)
        added = sums[:2].sum(dim=1) / torch.stack([scale, scale * scale])
        total += added[0, :columns]
        counts += part_counts
        with on_device_of(rows):
            _multiply(scatter, packed, pairs, 1 / scale, side)
        scatter.diagonal().add_(added[1, :columns])
    return counts


class _PackOptions(NamedTuple):
    """The settings that all chunks of one call of add_scatter_ share."""

    normalize: bool
    m: torch.dtype  # dtype of the computation
    measure: bool = False  # only find the largest entries; nothing is packed


def _pack(
    rows: Tensor, centre: Tensor, scale: Tensor, weights: Tensor | None, options: _PackOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums [3, programs, WIDTH], counts [3] and the packed chunk [TERMS, rows, WIDTH]."""
    terms, packed_dtype = (1, torch.float64) if options.m == torch.float64 else (2, torch.float16)
    packed_rows = triton.cdiv(len(rows), _DEPTH) * _DEPTH
    programs, width = packed_rows // _PACK_ROWS, len(centre)
    sums = centre.new_empty(3, programs, width)
    counts = torch.empty(programs, 3, dtype=torch.int64, device=rows.device)
    packed_shape = (0 if options.measure else terms, packed_rows, width)
    packed = torch.empty(packed_shape, dtype=packed_dtype, device=rows.device)
    shape = tile(rows.shape[1])
    launch(
        pack_rows_kernel,
        (programs, triton.cdiv(width, shape["BLOCK"])),
        rows,
        options.m,
        *(packed, sums, counts, centre, centre if weights is None else weights, scale),
        packed_rows,
        WIDTH=width,
        PROGRAM_ROWS=_PACK_ROWS,
        WEIGHTED=weights is not None,
        NORMALIZE=options.normalize,
        MEASURE=options.measure,
        TERMS=terms,
        **shape,
    )
    return sums, counts.sum(dim=0), packed


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
