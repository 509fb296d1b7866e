"""SharedSpace: one index for several modalities, and what its formulas promise."""

import base64
import functools
import json
import runpy
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import realign_fast
from realign_fast import Moments, ReAlign, SharedSpace, metrics
from realign_fast.frame import FixedFrame
from realign_fast.shared_space import SPACE_METHODS

PAGE = Path(__file__).parents[2] / "docs" / "shared_space.md"
HUB_FILES = {"README.md", "config.json", "model.safetensors"}
DEMO = Path(realign_fast.__file__).parent / "demo" / "data" / "heldout"


def unit(rows):
    return torch.nn.functional.normalize(rows.double(), dim=1)


@pytest.fixture(scope="module")
def demo():
    """(text, image) rows of the 400 held-out pairs of the demo corpus, float64 [400, 128] each."""
    paths = (DEMO / f"{side}_emb" / f"{side}_emb_0.npy" for side in ("text", "img"))
    return [unit(torch.from_numpy(np.load(path))) for path in paths]


@pytest.fixture(scope="module")
def coco(golden):
    """(text, image) rows of 500 COCO pairs, float64 [500, 512] each."""
    return [unit(torch.from_numpy(rows)) for rows in golden]


def mean_figures(text, image, role, **options):
    """Mixed R@1 and R@10, R@10 among the other modality alone, and its figure for raw rows.

    Averages over ten splits: fitted on one half, searched on the other.
    """
    other = "image" if role == "text" else "text"
    figures = []
    for seed in range(10):
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
        fitted, searched = order[: len(text) // 2], order[len(text) // 2 :]
        space = SharedSpace.fit(text=text[fitted], image=image[fitted], **options)
        raw = {"text": text[searched], "image": image[searched]}
        stored = {name: space.documents(name, rows) for name, rows in raw.items()}
        number = torch.arange(len(searched))
        given = dict(relevant={other: number}, own={role: number})
        found = metrics.mixed_gallery(space.query(raw[role], role), stored, **given)
        pure = metrics.mixed_gallery(raw[role], {other: raw[other]}, {other: number}).recall[10]
        figures.append([found.recall[1], found.recall[10], found.pure_recall[10], pure])
    return np.mean(figures, axis=0)


@pytest.mark.parametrize("layout", ["single", "blocks"])
@pytest.mark.parametrize("role", ["text", "image"])
def test_a_mixed_gallery_of_coco_is_searched_as_well_as_a_pure_one(coco, role, layout):
    options = dict(layout=layout) | ({} if layout == "blocks" else dict(query_role=role))
    first, tenth, pure, raw = mean_figures(*coco, role, **options)
    assert first >= 0.48 and tenth >= 0.85
    assert abs(pure - raw) <= 0.01


@pytest.mark.parametrize(("role", "least"), [("text", 0.46), ("image", 0.43)])
def test_a_mixed_gallery_of_the_demo_corpus(demo, role, least):
    _, tenth, pure, raw = mean_figures(*demo, role, query_role=role)
    assert tenth >= least and abs(pure - raw) <= 0.01


def test_an_index_is_of_one_role(coco):
    """The scale that serves text queries does not serve image queries, so they are refused."""
    text, image = coco
    space = SharedSpace.fit(text=text, image=image)
    with pytest.raises(ValueError, match="scaled for queries of 'text', got 'image'; fit with"):
        space.query(image, role="image")
    assert SharedSpace.fit(text=text, image=image, layout="blocks").query(image, "image").shape == (
        len(image),
        2 * image.shape[1],
    )


def test_scores_have_mean_zero_and_the_variance_of_the_formula(demo):
    """E_q Var_d(q.d) is 1 in both modalities, and no score is shifted between them."""
    text, image = demo
    space = SharedSpace.fit(text=text, image=image, method="calibrate")
    queries = space.query(text)
    for stored in (space.text(text), space.image(image)):
        scores = queries @ stored.T
        assert scores.mean(dim=1).abs().max() < 1e-9
        assert scores.var(dim=1, correction=0).mean() == pytest.approx(1, abs=1e-9)
    order = (text @ image.T).argsort(dim=1)
    assert torch.equal((queries @ space.image(image).T).argsort(dim=1), order)


@pytest.mark.parametrize("method", SPACE_METHODS)
def test_documents_and_queries_are_those_of_the_formulas(demo, method):
    text, image = demo
    space = SharedSpace.fit(text=text, image=image, queries=text[:100], method=method)
    centred = image - image.mean(0)
    queries = text[:100]
    if method != "calibrate":
        centred, queries = unit(centred), unit(queries - queries.mean(0))
    covariance = torch.cov(centred.T, correction=0)
    deviation = ((queries @ covariance) * queries).sum(1).mean().sqrt()
    scale = 1 if method == "center" else deviation
    torch.testing.assert_close(space.image(image), centred / scale, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(space.query(text[:100]), queries, rtol=1e-9, atol=1e-11)
    exact = (queries @ (centred - centred.mean(0)).T) / (
        ((queries @ covariance) * queries).sum(1).sqrt()[:, None]
    )
    torch.testing.assert_close(space.score(text[:100], image, "image"), exact, rtol=1e-8, atol=1e-8)


def test_queries_with_a_strong_mean_are_centred(coco):
    """Images spread along the mean of the texts: every text query prefers the same of them."""
    text, image = coco
    noise = torch.randn(len(image), 1, generator=torch.Generator().manual_seed(5))
    spread = unit(image + 0.1 * noise * unit(text.mean(0, keepdim=True)))
    assert SharedSpace.fit(text=text, image=image).method == "calibrate"
    space = SharedSpace.fit(text=text, image=spread)
    assert space.method == "center-calibrate"
    assert mean_figures(text, spread, "text")[1] > 0.8
    assert mean_figures(text, spread, "text", method="calibrate")[1] < 0.5


def test_the_error_of_a_scale_is_that_of_repeated_draws():
    generator = torch.Generator().manual_seed(1)
    offsets = dict(text=torch.tensor([1.0] + [0.0] * 7), image=torch.tensor([0.0, 1.0] + [0.0] * 6))

    def draw():
        return {
            name: offset + 0.3 * torch.randn(60, 8, generator=generator)
            for name, offset in offsets.items()
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spaces = [
            SharedSpace.fit(**draw(), queries=draw()["text"], method="calibrate")
            for _ in range(300)
        ]
    scales = torch.tensor([space.scale("image") for space in spaces])
    errors = [space.record["modalities"]["image"]["scale_error"]["text"] for space in spaces]
    assert np.mean(errors) == pytest.approx(float(scales.std() / scales.mean()), rel=0.2)
    few = {name: rows[:5] for name, rows in draw().items()}
    with pytest.warns(UserWarning, match="has a standard error of .*%, from 5 documents") as told:
        SharedSpace.fit(**few)
    assert len(told) == 2


@pytest.mark.parametrize("layout", ["single", "blocks"])
@pytest.mark.parametrize("method", SPACE_METHODS)
def test_the_maps_of_a_space_write_into_rows_and_feed_moments(demo, method, layout):
    text, image = (rows.float() for rows in demo)
    space = SharedSpace.fit(text=text, image=image, method=method, layout=layout)
    for role_map, expected in (
        (space.document_map("image").to("cpu"), space.image(image)),
        (space.query_map("text"), space.query(image, "text")),
    ):
        out = torch.full((len(image), space.columns + 1), torch.nan)
        role_map(image, out=out[:, :-1])
        assert torch.equal(out[:, :-1], expected) and bool(out[:, -1].isnan().all())
        moments = Moments().update(image, through=role_map.row_map)
        block = expected[:, min(role_map.scales) :][:, : role_map.dimension].double()
        torch.testing.assert_close(moments.mean, block.mean(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [1e-3, 1e-7, 1e-8])
def test_the_scale_of_a_narrow_side_is_right_or_refused(coco, spread):
    """Its rows may be so close that a float16 row of another side divided by it has no number."""
    text, image = coco
    noise = torch.randn(400, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    narrow = unit(text[:1] + spread * noise)
    if spread == 1e-8:
        with pytest.raises(ValueError, match=r"SharedSpace, text: .* got 400 without spread"):
            SharedSpace.fit(text=narrow, image=image, method="calibrate")
        return
    space = SharedSpace.fit(text=narrow, image=image, method="calibrate", layout="blocks")
    expected = (image @ (narrow - narrow.mean(0)).T).square().mean().sqrt()
    figures = space.record["modalities"]["text"]
    assert figures["scale"]["image"] == pytest.approx(float(expected), rel=1e-6)
    assert 0 <= figures["scale_error"]["text"] < 1
    if spread == 1e-7:
        space = SharedSpace.fit(text=narrow, image=image, query_role="image", method="calibrate")
        with pytest.raises(ValueError, match=r"500 of 500 rows pass 65504, .* torch.float16 holds"):
            space.text(image.half())
        assert space.text(image.float()).isfinite().all()


def test_a_scale_of_zero_is_refused():
    flat = torch.eye(4)[:2].repeat(3, 1)  # spread in two columns that no query has
    queries = torch.eye(4)[2:].repeat(3, 1)
    with pytest.warns(UserWarning, match="standard error of nan"):
        space = SharedSpace.fit(text=flat, image=flat[1:], queries=queries, method="calibrate")
    with pytest.raises(ValueError, match=r"standard deviation 0\.0, so no scale exists"):
        space.image(flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_arrays_are_kept(demo, dtype):
    text, image = (rows.to(dtype) for rows in demo)
    space = SharedSpace.fit(text=text, image=image)
    stored = space.image(image)
    assert stored.dtype == dtype
    exact = space.image(image.double())
    share = {torch.float32: 4e-7, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps / 2)
    longest = exact.abs().amax(dim=1, keepdim=True)
    assert bool(((stored.double() - exact).abs() <= 1.02 * share * longest).all())
    if dtype != torch.bfloat16:
        array = space.image(image.numpy())
        assert isinstance(array, np.ndarray) and np.array_equal(array, stored.numpy())
        given = dict(relevant={"image": torch.arange(400)})
        expected = metrics.mixed_gallery(stored, {"image": stored}, **given)
        assert str(metrics.mixed_gallery(array, {"image": array}, **given)) == str(expected)
        read_only = image.numpy().copy()
        read_only.flags.writeable = False
        torch.set_warn_always(True)  # else torch warns once in a process, maybe in another test
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="The given NumPy array is not writable")
                assert np.array_equal(space.image(read_only), array)
        finally:
            torch.set_warn_always(False)
    assert space.image(image[:0]).shape == (0, 128)
    assert space.image(torch.full((1, 128), torch.nan, dtype=dtype)).isnan().all()


def test_three_modalities_from_moments_and_back_from_a_file(demo, tmp_path):
    text, image = demo
    audio = unit(text.roll(3, dims=1) + 0.3)
    sides = {"text": text, "image": image, "audio": audio}
    moments = {name: Moments(True, accurate=True).update(rows) for name, rows in sides.items()}
    space = SharedSpace.fit(**moments, layout="blocks")
    space.save(tmp_path / "space.safetensors")
    space.save_pretrained(tmp_path / "hub")
    assert 'SharedSpace.from_pretrained("owner' in (tmp_path / "hub" / "README.md").read_text()
    assert json.loads((tmp_path / "hub" / "config.json").read_bytes())["columns"] == 3 * 128
    for folder in (tmp_path, tmp_path / "hub"):
        assert SharedSpace.from_pretrained(folder).record == space.record
        assert SharedSpace.load(folder).record == space.record
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: holds none of model\.safetensors"):
        SharedSpace.load(tmp_path / "empty")
    back = SharedSpace.load(tmp_path / "space.safetensors")
    assert back.record == space.record and back.columns == 3 * 128
    for name, rows in sides.items():
        assert torch.equal(back.documents(name, rows), space.documents(name, rows))
        assert torch.equal(back.query(rows, name), space.query(rows, name))
    rows_too = SharedSpace.fit(**sides, layout="blocks")
    torch.testing.assert_close(rows_too.image(image), space.image(image))


class Hub(BaseHTTPRequestHandler):
    """The answers of the Hugging Face hub to an upload, and the files of the commit."""

    files: ClassVar[dict] = {}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {
            "url": "https://huggingface.co/me/map",
            "commitUrl": "https://huggingface.co/me/map/commit/1",
        }
        answer |= {"commitOid": "1", "name": "me/map"}
        if "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": name, **modes} for name in names]}
        elif "commit" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        """Print nothing."""


def test_fitted_maps_go_to_the_hub(demo, tmp_path, monkeypatch):
    """By the hub's own library, to a server that takes the commit."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        for fitted in (
            SharedSpace.fit(text=demo[0], image=demo[1]),
            ReAlign.fit(demo[0], demo[1]),
        ):
            Hub.files.clear()
            address = fitted.push_to_hub("me/map", endpoint=endpoint, token="hf_x", private=True)
            fitted.save_pretrained(tmp_path)
            expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            assert Hub.files == expected and set(expected) == HUB_FILES
            assert address == "https://huggingface.co/me/map/commit/1"
        server.shutdown()


def test_the_page_applies_fitted_files_without_torch(demo, tmp_path):
    text, image = demo
    for name, rows in (("text", text), ("image", image)):
        np.save(tmp_path / f"{name}.npy", rows.float())
    space = SharedSpace.fit(text=text, image=image)
    space.save(tmp_path / "space.safetensors")
    snippet = PAGE.read_text().split("## Without this package")[1].split("```")[1]
    end = "\nimport sys; assert 'torch' not in sys.modules"
    end += "\nnp.savez('out.npz', aligned=aligned, documents=documents, queries=queries)"
    for method in ("realign", "coral"):
        aligner = ReAlign.fit(text, image, method=method)
        aligner.save(tmp_path / "aligner.safetensors")
        code = snippet.removeprefix("python") + end
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
        found = np.load(tmp_path / "out.npz")
        exact = {"documents": space.image(image), "queries": space.query(text)}
        for name, rows in (exact | {"aligned": aligner(text)}).items():
            np.testing.assert_allclose(found[name], rows, rtol=0, atol=1e-6)


def test_a_space_is_fitted_from_merged_statistics(demo):
    """The function of the page, for a method that centres."""
    parts_of = {"text": demo[0].split(150), "image": demo[1].split(300)}
    names = dict(vars(realign_fast.shared_space), functools=functools, parts_of=parts_of)
    exec(PAGE.read_text().split("## Fitting from")[1].split("```python")[1].split("```")[0], names)
    whole = SharedSpace.fit(text=demo[0], image=demo[1], method="center-calibrate")
    merged, expected = names["space"].image(demo[1]), whole.image(demo[1])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("content", [b"", b"rows", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_space_is_named(tmp_path, content):
    path = tmp_path / "space.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"space\.safetensors: expected a space written by"):
        SharedSpace.load(path)


@pytest.mark.parametrize("kind", [SharedSpace, ReAlign, FixedFrame, Moments])
def test_a_changed_byte_of_a_header_is_one_error_that_names_the_file(tmp_path, kind):
    rows = torch.eye(4, 6).repeat(100, 1)
    text, image = (Moments(True).update(side) for side in (rows, rows.flip(1) + 1))
    fitted = text
    if kind is SharedSpace:
        fitted = SharedSpace.fit(text=text, image=image)
    elif kind is not Moments:
        fitted = (ReAlign.from_moments if kind is ReAlign else kind.fit)(text, image)
    path = tmp_path / "fitted.safetensors"
    fitted.save(path)
    content = path.read_bytes()
    refused = 0
    for place in range(8, 8 + int.from_bytes(content[:8], "little"), 11):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            kind.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: expected ") and type(error) is ValueError
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t["text.covariance"].fill_(torch.nan), "numbers that changed since it was"),
        (lambda t, m: t.update({"text.mean": t["text.mean"][:5].clone()}), "numbers that changed"),
        (lambda t, m: m.update(version=9), "version 9 of another release"),
        (lambda t, m: m.update(digesu=m.pop("digest")), "no 'digest' in it"),
        (lambda t, m: m.update(digest=None), "numbers that changed since it was written"),
        (lambda t, m: t["image.centre"][3].add_(1e-9), "numbers that changed since it was written"),
    ],
)
def test_a_damaged_space_is_named(demo, tmp_path, change, message):
    path, space = tmp_path / "space.safetensors", SharedSpace.fit(text=demo[0], image=demo[1])
    space.save(path)
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["shared_space"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, stored)
    save_file(tensors, path, {"shared_space": json.dumps(stored)})
    with pytest.raises(ValueError, match=r"space\.safetensors: expected a space .*" + message):
        SharedSpace.load(path)


ROWS = torch.eye(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(text=ROWS), "expected documents of two modalities or more, got"),
        (dict(text=ROWS, image=torch.eye(5)), "image has 5 columns, text 4"),
        (dict(text=ROWS, image=ROWS, query_role="audio"), "query_role='audio' is none of text"),
        (dict(text=ROWS, image=ROWS, method="zscore"), "method='zscore' is none of auto"),
        (dict(text=ROWS, image=ROWS, layout="wide"), "layout='wide' is none of single, blocks"),
        (dict(text=ROWS, image=ROWS[:0]), "the image side has no rows"),
        (dict(text=Moments(True), image=ROWS), "SharedSpace: the text side has no rows"),
        (dict(text=ROWS, image=ROWS[:1]), "image: rows expected to differ .*, got 1 without"),
        (dict(text=ROWS, image=ROWS[:1].repeat(9, 1)), "image: rows expected to differ"),
        (
            dict(text=ROWS[:1].double() + 1e-17 * torch.arange(9.0)[:, None] * ROWS[1], image=ROWS),
            "text: rows expected to differ by more than rounding, got 9 without spread",
        ),
        (dict(text=ROWS, image=ROWS, queries={"audio": ROWS}), "queries='audio' is none of text"),
        (dict(text=Moments().update(ROWS), image=ROWS), "expected covariance=True"),
        (
            dict(text=Moments(True).update(ROWS), image=ROWS, method="center"),
            "reads the rows of text a second time, and moments hold none",
        ),
        (dict(text=ROWS, image=torch.zeros(3, 4)), "row 0"),
        (dict(text=ROWS, audio=ROWS + 1, image=ROWS.numpy()), "4 text rows are the image rows"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SharedSpace.fit(**options)


def test_rows_of_another_shape_or_modality_are_refused(demo):
    space = SharedSpace.fit(text=demo[0], image=demo[1])
    with pytest.raises(ValueError, match=r"expected rows \[N, 128\]"):
        space.text(torch.ones(3, 64))
    with pytest.raises(ValueError, match=r"'audio' is none of its modalities \['text', 'image'\]"):
        space.documents("audio", demo[0])
    with pytest.raises(ValueError, match="'audio' is none of its modalities"):
        space.scale("audio")


def test_the_example_prints_its_table(monkeypatch, capsys, tmp_path):
    path = Path(__file__).parents[2] / "examples" / "mixed_search.py"
    plot = tmp_path / "mixed.png"
    monkeypatch.setattr("sys.argv", [str(path), "--splits", "2", "--plot", str(plot)])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and plot.stat().st_size > 0
    tenth = {line.split(" | ")[0]: float(line.split(" | ")[2].split()[0]) for line in lines[2:10]}
    assert tenth["| calibrated"] > 0.4 > 0.25 > tenth["| as the encoder gives them"]
    balance = np.array([[float(cell) for cell in line.split("|")[1:-1]] for line in lines[12:]])
    caption, image, share = np.diff(balance[:, 1:], axis=0).T
    assert (caption >= 0).all() and (image < 0).all() and (share < 0).all()


@pytest.mark.parametrize("layout", ["single", "blocks"])
@pytest.mark.parametrize("method", SPACE_METHODS)
def test_maps_of_refitted_spaces_compile_to_one_graph(method, layout):
    """Dynamo makes a float that changes between two maps symbolic; so is the scale of a refit."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(8)
    rows = torch.randn(200, 6, generator=generator)
    for shift in (0.2, 0.4, 0.6):
        space = SharedSpace.fit(
            text=rows + shift, image=rows[:150] - 0.3, method=method, layout=layout
        )
        maps = ((space.document_map("image"), space.image), (space.query_map(), space.query))
        for row_map, eager in maps:
            compiled = torch.compile(row_map, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(rows), eager(rows))
