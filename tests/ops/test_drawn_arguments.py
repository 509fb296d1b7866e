"""Every public op on drawn arguments against the reference in float64.

Hypothesis draws dtypes, shapes, layouts in memory, special rows, the form of the map and threads.
`HYPOTHESIS_EXAMPLES=20000 pytest tests/ops/test_drawn_arguments.py` is the long form.
"""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.op_checks import DTYPES, random_map, random_rows

from realign_fast import add_scatter_, align_rows, sum_rows
from realign_fast.ops import reference

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "150"))
drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 150,
    suppress_health_check=list(HealthCheck),
)
# Of the largest entry: half an ulp of what is stored, and the roundings before it.
NEAR = {torch.float16: 5.5e-4, torch.bfloat16: 4.1e-3, torch.float32: 2e-6, torch.float64: 1e-12}
SUMS_NEAR = {torch.float64: 1e-12}  # 2e-6 for the others


def special(row, kind):
    """Change a row [D] in place."""
    limits = torch.finfo(row.dtype)
    values = {
        "zero": 0.0,
        "negative zero": -0.0,
        "huge": limits.max / 4,
        "tiny": limits.tiny,
        "subnormal": limits.smallest_normal / 4,
    }
    if kind in values:
        row[:] = values[kind] * torch.where(torch.arange(len(row)) % 2 == 0, 1, -1)
    else:
        row[len(row) // 2] = float(kind)


@st.composite
def rows_in_memory(draw):
    """Rows [N, D] whose numbers lie in memory in some way."""
    count, columns = draw(st.integers(0, 40)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    rows = random_rows(count, columns, dtype, seed=draw(st.integers(0, 9)))
    kinds = st.sampled_from(
        ("zero", "negative zero", "huge", "tiny", "subnormal", "nan", "inf", "-inf")
    )
    for place, kind in draw(st.dictionaries(st.integers(0, 39), kinds, max_size=4)).items():
        if place < count:
            special(rows[place], kind)
    layout = draw(st.sampled_from(("plain", "padded", "spread", "transposed", "equal", "negated")))
    if layout == "padded":
        buffer = rows.new_full((count, columns + 3), torch.nan)
        buffer[:, 1 : 1 + columns] = rows
        return buffer[:, 1 : 1 + columns]
    if layout == "spread":
        buffer = rows.new_full((2 * count, 2 * columns), torch.nan)
        buffer[::2, ::2] = rows
        return buffer[::2, ::2]
    if layout == "transposed":
        return rows.t().contiguous().t()
    if layout == "equal" and count:
        return rows[:1].expand(count, columns)
    if layout == "negated":
        return torch._neg_view(-rows)  # whose numbers are not those that lie in memory
    return rows


@st.composite
def maps(draw, columns):
    """A number, a diagonal or a matrix, the shift, and maybe the last step."""
    scale, shift, recentre = random_map(columns, seed=draw(st.integers(1, 5)))
    form = draw(st.sampled_from(("number", "diagonal", "matrix")))
    if form == "diagonal":
        scale = scale + 0.1 * random_rows(1, columns, seed=7)[0]
    if form == "matrix":
        noise = random_rows(columns, columns, seed=8) / columns
        scale = scale * torch.eye(columns, dtype=torch.float64) + 0.1 * noise
    return scale, shift, draw(st.sampled_from((recentre, None)))


def assert_near(result, expected, share):
    """Check the NaN, and that no entry is off by more than this share of its row's largest one."""
    assert torch.equal(result.isnan(), expected.isnan())
    result, expected = result.double().nan_to_num(0), expected.nan_to_num(0)
    peak = expected.abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)
    error = ((result - expected).abs() / peak).max().item() if result.numel() else 0
    assert error <= share, f"error {error:.1e} of the largest entry, allowed {share:.1e}"


def with_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def same_bytes(first, second):
    flat = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in (first, second))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


@drawn
@given(st.data(), rows_in_memory(), st.sampled_from(DTYPES), st.sampled_from((1.0, None, -2.5)))
def test_align_rows(data, rows, out_dtype, length):
    scale, shift, recentre = data.draw(maps(rows.shape[1]))
    linear = torch.as_tensor(scale, dtype=torch.float64)
    arguments = {"length": length, "out_dtype": out_dtype}
    result = align_rows(rows, scale, shift, recentre, **arguments)
    expected = reference.map_rows(rows, linear, shift, recentre, torch.float64, length)
    # A matrix is multiplied in float32 unless rows or result are float64, and entries of a row
    # may cancel in what the last normalisation divides by.
    half = reference.map_rows(rows, linear, shift, None, torch.float64, None).norm(dim=-1)
    cancelling = 0 if not len(rows) else float((1 / half.nan_to_num(1).clamp(max=1)).max())
    share = NEAR[out_dtype] + 2e-6 * cancelling * (torch.float64 not in (rows.dtype, out_dtype))
    assert_near(result, expected, share)
    again = with_threads(3, lambda: align_rows(rows, scale, shift, recentre, **arguments))
    assert same_bytes(result, again)
    if rows.is_contiguous() and rows.dtype == out_dtype:
        own = rows.clone()
        assert align_rows(own, scale, shift, recentre, length=length, out=own) is own
        assert same_bytes(own, result), "written over the rows that are read"


@drawn
@given(rows_in_memory(), st.booleans(), st.booleans())
def test_sum_rows(rows, mapped, normalize):
    row_map = random_map(rows.shape[1]) if mapped and normalize else (None, None, None)
    if not normalize:
        rows = torch.where(rows.abs() > 1e3, 1, rows)  # the sums of huge rows overflow in float32
    found = sum_rows(rows, *row_map, normalize=normalize)
    scale = None if row_map[0] is None else torch.tensor(row_map[0], dtype=torch.float64)
    total, energy, counts = reference.sum_rows(rows, scale, *row_map[1:], normalize)
    assert found.counts.tolist() == counts.tolist()
    size = max(1.0, float(reference._finite_rows(rows)[0].abs().sum(dim=0).max()))
    share = SUMS_NEAR.get(rows.dtype, 2e-6)
    assert float((found.total - total).abs().max()) <= share * max(size, len(rows))
    assert float((found.energy - energy).abs()) <= share * max(float(energy), 1e-30)
    again = with_threads(3, lambda: sum_rows(rows, *row_map, normalize=normalize))
    assert all(same_bytes(*pair) for pair in zip(found, again, strict=True))


@drawn
@given(rows_in_memory(), st.booleans(), st.booleans(), st.booleans())
def test_add_scatter(rows, weighted, normalize, accurate):
    columns = rows.shape[1]
    if not normalize:
        rows = torch.where(rows.abs() > 1e3, 1, rows)
    centre = random_map(columns)[1].float().double()
    weights = random_rows(len(rows), 1, seed=3)[:, 0].abs() if weighted else None

    def sums():
        scatter = torch.full((columns, columns), 0.5, dtype=torch.float64)
        total = torch.full((columns,), 0.25, dtype=torch.float64)
        options = {"normalize": normalize, "accurate": accurate}
        counts = add_scatter_(scatter, total, rows, centre, weights, **options)
        return scatter, total, counts

    scatter, total, counts = sums()
    expected = torch.full((columns, columns), 0.5, dtype=torch.float64)
    expected_total = torch.full((columns,), 0.25, dtype=torch.float64)
    expected_counts = reference.add_scatter_(
        expected, expected_total, rows, centre, weights, normalize, accurate
    )
    assert counts.tolist() == expected_counts.tolist()
    exact = accurate or rows.dtype == torch.float64
    share, size = 1e-12 if exact else 2e-5, float(expected.diagonal().sum())
    assert float((scatter - expected).triu().abs().max()) <= share * size
    assert bool((scatter.tril(-1) == torch.full_like(scatter, 0.5).tril(-1)).all())
    assert float((total - expected_total).abs().max()) <= share * (len(rows) + size)
    assert all(same_bytes(*pair) for pair in zip(sums(), with_threads(3, sums), strict=True))
