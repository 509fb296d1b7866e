"""What ReAlign refuses to be fitted on or called with, and what it takes all the same."""

import numpy as np
import pytest
import torch

from realign_fast import Moments, ReAlign, metrics

TEXT = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) + 1
IMAGE = torch.randn(80, 8, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [TEXT[:1], TEXT[:1].expand(50, 8)], ids=["one row", "one way"])
def test_rows_without_spread_have_no_scale(rows, dtype):
    with pytest.raises(ValueError, match="source rows all point one way"):
        ReAlign.fit(rows.to(dtype), IMAGE)
    with pytest.raises(ValueError, match="target rows all point one way"):
        ReAlign.fit(IMAGE, rows.to(dtype))


def test_what_holds_no_rows_is_named():
    with pytest.raises(TypeError, match=r"source: expected batches of rows .* got list"):
        ReAlign.fit([[1.0, 2.0]], IMAGE)
    with pytest.raises(TypeError, match="expected rows as a tensor, got ndarray"):
        ReAlign.fit(TEXT, IMAGE)(TEXT.numpy())
    with pytest.raises(TypeError, match=r"target: expected rows .* got NoneType"):
        ReAlign.fit(TEXT, None)
    with pytest.raises(ValueError, match="the target has no rows"):
        ReAlign.fit(TEXT, IMAGE[:0])
    with pytest.raises(TypeError, match="expected Moments to merge, got NoneType"):
        Moments().merge(None)
    with pytest.raises(ValueError, match="got a single number"):
        Moments().update(torch.tensor(1.0))


def test_a_loader_of_a_tensor_dataset_yields_lists_of_one():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TEXT), batch_size=32)
    assert torch.equal(
        ReAlign.fit(loader, IMAGE).source_mean, ReAlign.fit(TEXT.split(32), IMAGE).source_mean
    )


def test_forward_mode_is_refused_and_not_answered_with_zeros():
    aligner = ReAlign.fit(TEXT, IMAGE)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(aligner, (TEXT,), (torch.ones_like(TEXT),))


def test_all_reduce_without_a_process_group_says_so():
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        Moments().update(TEXT).all_reduce()


def test_arrays_of_any_byte_order_and_strides():
    expected = ReAlign.fit(TEXT, IMAGE)
    array = TEXT.numpy()
    for same in (array.astype(">f4"), array[::-1].copy()[::-1], np.asfortranarray(array)):
        fitted = ReAlign.fit(same, IMAGE)
        assert torch.equal(fitted.shift, expected.shift)
        assert torch.equal(fitted.recentre, expected.recentre)


class Table:
    """What a table of pandas or polars offers; they are not needed for the tests."""

    def __init__(self, values):
        self.to_numpy = lambda: values


def tables():
    yield lambda values: Table(np.asarray(values))
    for package in ("pandas", "polars"):
        try:
            yield __import__(package).DataFrame
        except ImportError:
            continue


@pytest.mark.parametrize("table", list(tables()))
def test_a_table_stands_for_its_numbers(table):
    expected = ReAlign.fit(TEXT, IMAGE)
    fitted = ReAlign.fit(table(TEXT.numpy()), IMAGE)
    assert torch.equal(fitted.shift, expected.shift)
    counts = (10 * TEXT).round().numpy().astype(np.int32)
    assert ReAlign.fit(table(counts), IMAGE).dimension == 8
    with pytest.raises(TypeError, match=r"source: expected a table of numbers, got columns of "):
        ReAlign.fit(table(np.array([["a", "b"]] * 3)), IMAGE)
    moments = Moments().update(IMAGE)
    for use in (
        moments.update,
        expected,
        metrics.principal_axes,
        lambda rows: metrics.knn_mixing(rows, IMAGE),
        lambda rows: metrics.mean_cosine(rows, TEXT),
        lambda rows: metrics.matched_cosine(rows, TEXT),
        lambda rows: metrics.gap_report(IMAGE, rows),
    ):
        advice = r"expected rows as a tensor, got \w+; use torch.tensor\(rows.to_numpy\(\)\)"
        with pytest.raises(TypeError, match=advice):
            use(table(TEXT.numpy()))
    for use in (metrics.spectrum_of, lambda rows: metrics.centroid_gap(rows, moments)):
        with pytest.raises(TypeError, match=r"expected Moments, got .* measure rows with"):
            use(table(TEXT.numpy()))
    assert moments.count == 80


@pytest.mark.parametrize(
    "rows", [None, 3, "text", b"text", {"text": TEXT}, [[1.0, 2.0]], {1.0}, [{"a": TEXT}]], ids=str
)
def test_what_is_no_rows_is_one_clear_error(rows):
    kind = type(rows).__name__
    with pytest.raises((TypeError, OSError), match=r"expected .* got |text: No such file"):
        ReAlign.fit(rows, IMAGE)
    for use in (
        Moments().update,
        lambda rows: metrics.mean_cosine(IMAGE, rows),
        lambda rows: metrics.knn_mixing(IMAGE, rows),
        metrics.effective_rank,
    ):
        with pytest.raises(TypeError, match=rf"expected \w+ as a tensor, got {kind}; "):
            use(rows)
