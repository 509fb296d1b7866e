"""What ReAlign refuses to be fitted on or called with, and what it takes all the same."""

import copy

import numpy as np
import pytest
import torch

from realign_fast import Moments, ReAlign, SharedSpace, align_rows, metrics, sum_rows, whiten
from realign_fast.frame import FixedFrame

TEXT = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) + 1
META = TEXT.to("meta")
IMAGE = torch.randn(80, 8, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [TEXT[:1], TEXT[:1].expand(50, 8)], ids=["one row", "one way"])
def test_rows_without_spread_have_no_scale(rows, dtype):
    with pytest.raises(ValueError, match="source rows all point one way"):
        ReAlign.fit(rows.to(dtype), IMAGE)
    with pytest.raises(ValueError, match="target rows all point one way"):
        ReAlign.fit(IMAGE, rows.to(dtype))


def test_what_holds_no_rows_is_named():
    with pytest.raises(TypeError, match=r"source: expected rows as a tensor .* got list"):
        ReAlign.fit([[1.0, 2.0]], IMAGE)
    with pytest.raises(
        ValueError, match=r"source: expected batches of rows \[n, D\], .*; stack single"
    ):
        ReAlign.fit(list(TEXT), IMAGE)
    with pytest.raises(TypeError, match=r"target: expected rows .* got NoneType"):
        ReAlign.fit(TEXT, None)
    with pytest.raises(ValueError, match="the source side has no rows"):
        ReAlign.fit(torch.ones(0, 4), torch.eye(4))
    with pytest.raises(ValueError, match="the target side has no rows"):
        ReAlign.fit(TEXT, IMAGE[:0])
    with pytest.raises(TypeError, match="expected Moments to merge, got NoneType"):
        Moments().merge(None)
    with pytest.raises(ValueError, match=r"got shape \[\]"):
        Moments().update(torch.tensor(1.0))


def test_a_loader_of_a_tensor_dataset_yields_lists_of_one():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TEXT), batch_size=32)
    assert torch.equal(
        ReAlign.fit(loader, IMAGE).source_mean, ReAlign.fit(TEXT.split(32), IMAGE).source_mean
    )


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
        aligned = expected(same)
        assert isinstance(aligned, np.ndarray) and np.array_equal(
            aligned, expected(torch.tensor(same.astype("f4"))).numpy()
        )
        assert Moments().update(same).mean.equal(Moments().update(TEXT).mean)


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
def test_a_table_of_numbers_is_refused_and_its_conversion_is_named(table):
    moments = Moments().update(IMAGE)
    for use in (
        lambda rows: ReAlign.fit(rows, IMAGE),
        lambda rows: SharedSpace.fit(text=rows, image=IMAGE),
        ALIGNER,
        SPACE.text,
        Moments().update,
        lambda rows: metrics.knn_mixing(rows, IMAGE),
        lambda rows: metrics.mean_cosine(rows, TEXT),
        lambda rows: metrics.gap_report(IMAGE, rows),
    ):
        advice = r"expected rows as a tensor of .* got \w+; .*\(\)\) of its embedding columns"
        with pytest.raises(TypeError, match=advice):
            use(table(TEXT.numpy()))
    for use in (metrics.spectrum_of, lambda rows: metrics.centroid_gap(rows, moments)):
        with pytest.raises(TypeError, match=r"expected Moments, got .* measure rows with"):
            use(table(TEXT.numpy()))
    assert moments.count == 80


@pytest.mark.parametrize(
    "rows",
    [None, 3, "text", b"text", {"text": TEXT}, [[1.0, 2.0]], {1.0}, [{"a": TEXT}]],
    ids=lambda rows: type(rows).__name__,
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
        with pytest.raises(TypeError, match=rf"expected \w+ as a tensor of .* got {kind}; "):
            use(rows)


COUNTS = (10 * TEXT).round()
SPACE = SharedSpace.fit(text=TEXT, image=IMAGE)
ALIGNER = ReAlign.fit(TEXT, IMAGE)
FRAME = FixedFrame.fit(*(Moments(covariance=True).update(rows) for rows in (TEXT, IMAGE)))


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (COUNTS.long(), "torch.int64; convert with rows"),
        (TEXT > 0, "torch.bool"),
        (TEXT.to(torch.complex64), "torch.complex64; convert with torch.view_as_real"),
        (TEXT.to(torch.complex64).numpy(), "ndarray of complex64; use torch.view_as_real"),
        (torch.nested.nested_tensor([TEXT]), "nested; convert with torch.cat"),
        (TEXT.to_sparse(), "torch.sparse_coo"),
        (TEXT.to_sparse_csr(), "torch.sparse_csr"),
        (COUNTS.long().numpy(), "ndarray of int64; use"),
        (TEXT.numpy().astype(object), "ndarray of object"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_of_other_numbers_are_refused_everywhere(rows, kind):
    """The side, the kind that was found and what to do are said, and nothing is fitted on it."""
    uses = {
        "space": (SPACE.text, SPACE.query, lambda rows: SPACE.score(TEXT, rows, "image")),
        "aligner": (ALIGNER, Moments().update),
        "ops": (lambda rows: align_rows(rows, 1.0, torch.zeros(8)), sum_rows),
        "metrics": (
            lambda rows: metrics.nearest_rows(rows, IMAGE, 3),
            lambda rows: metrics.mean_cosine(TEXT, rows),
            lambda rows: metrics.mixed_gallery(rows, {"a": TEXT}, {"a": torch.arange(100)}),
        ),
        "whiten": (whiten.default_floor, whiten.symmetric_root),
    }
    if rows is not None:
        uses["fit"] = (lambda rows: SharedSpace.fit(text=TEXT, image=rows),)
        with pytest.raises(TypeError, match=f"target: expected rows as a tensor .*got {kind}"):
            ReAlign.fit(TEXT, rows)
    for use in (use for group in uses.values() for use in group):
        with pytest.raises(TypeError, match=rf"expected .*(as a tensor|rows of).* got {kind[:9]}"):
            use(rows)


def test_rows_of_a_model_in_training_are_measured():
    rows = TEXT.clone().requires_grad_()
    found = metrics.nearest_rows(rows, rows, 3, own=0)
    assert torch.equal(found.indices, metrics.nearest_rows(TEXT, TEXT, 3, own=0).indices)
    assert SPACE.text(rows).requires_grad and not found.cosines.requires_grad


def test_arrays_of_any_strides_enter_a_space_and_masks_are_not_dropped():
    array = TEXT.numpy()
    for same in (array.astype(">f4"), array[::-1].copy()[::-1], np.ma.masked_array(array)):
        assert np.array_equal(SPACE.text(same), SPACE.text(array))
    masked = np.ma.masked_array(array, np.arange(800).reshape(100, 8) == 333)
    for use in (SPACE.text, lambda rows: ReAlign.fit(IMAGE, [array, rows])):
        with pytest.raises(ValueError, match="masked array has masked entries, expected none"):
            use(masked)
    for rows in (array[::-1], array.astype(">f4")):  # the advice of the error works
        assert torch.from_numpy(rows.astype("float32")).shape == (100, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReAlign.from_moments(None, None), "expected Moments, got NoneType"),
        (lambda: ALIGNER.record_drift(TEXT), "expected Moments, got Tensor"),
        (lambda: ALIGNER.record_drift(Moments().update(TEXT[:, :1])), "has 1 columns, the map 8"),
        (lambda: metrics.centroid_gap(Moments(), Moments()), "the source has no rows"),
        (lambda: Moments(covariance="no"), "options as True or False, got 'no'"),
        (lambda: Moments().update(TEXT, through=0), "expected through as .* got int"),
        (lambda: Moments().update(META), "rows is on the device meta"),
        (lambda: whiten.symmetric_root(META[:8]), "the covariance is on the device meta"),
        (lambda: whiten.bures_distance(*[np.eye(3)] * 2), r"ndarray of float64.*astype\('float64'"),
        (lambda: metrics.nearest_rows(META, IMAGE, 3), "rows is on the device meta"),
        (lambda: FRAME.decompose((META, TEXT)), "rows is on the device meta"),
        (lambda: copy.deepcopy(ALIGNER).to("meta")(TEXT), "its buffers are on the device meta"),
        (lambda: copy.deepcopy(ALIGNER).to("meta").record, "its buffers are on the device meta"),
        (
            lambda: ReAlign.fit(pytest.importorskip("pyarrow").array([[1.0, 2.0]]), TEXT),
            "got ListArray; use torch.tensor",
        ),
        (lambda: metrics.nearest_rows(TEXT, IMAGE, 3, block=0), "block is 0, expected a whole"),
        (lambda: metrics.nearest_rows(TEXT, IMAGE, 2.5), "k is 2.5, expected a whole"),
        (lambda: metrics.pairwise_cosines(TEXT[:, :0]), r"rows \[N, D\], got shape \[100, 0\]"),
        (lambda: metrics.mean_cosine(TEXT, TEXT, block=0), "block is 0"),
        (lambda: metrics.pairwise_cosines(TEXT, pairs=0), "pairs is 0"),
        (lambda: metrics.sampling_gap(0.5, 3, 0), "count 2 is 0, expected a whole number from 1"),
        (lambda: metrics.sampling_gap(-0.5, 3), "the trace is -0.5, expected 0 or more"),
        (lambda: metrics.effective_rank(torch.tensor([-1.0, 2])), "eigenvalues .* from 0"),
        (lambda: metrics.effective_rank(TEXT), r"eigenvalues \[D\] .* got shape"),
        (lambda: ReAlign.fit(TEXT, IMAGE, batch_rows=0), "source: batch_rows is 0"),
        (lambda: ReAlign(0), "dimension is 0, expected a whole number from 1"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
