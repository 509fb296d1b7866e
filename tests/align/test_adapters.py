"""SharedSpace where people keep rows: faiss, scikit-learn, stores, and the page's code."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import realign_fast
from realign_fast import ReAlign, SharedSpace

ROOT = Path(__file__).parents[2]
DATA = Path(realign_fast.__file__).parent / "demo" / "data" / "heldout"
SHARDS = [DATA / f"{side}_emb" / f"{side}_emb_0.npy" for side in ("text", "img")]
PAGE = (ROOT / "docs" / "shared_space.md").read_text()
METHOD_PAGE = (ROOT / "docs" / "shared_space_method.md").read_text()


def page_code(word):
    """The block of docs/shared_space.md, "Where people keep rows", that imports a package."""
    section = PAGE.split("## Where people keep rows\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    block = [block for block in blocks if re.search(rf"^(import|from) {word}", block, re.M)][-1]
    return compile(block, "docs/shared_space.md", "exec")


def code_of(text, page=PAGE):
    """The block of docs/shared_space.md, or of another page, that contains a text."""
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if text in block)
    return compile(block, "docs/shared_space.md", "exec")


@pytest.fixture(scope="module")
def rows():
    """Rows of the demo corpus, float32 [400, 128] each, and queries [50, 128] among the texts."""
    text, image = (np.load(file) for file in SHARDS)
    sides = {"text_rows": text.astype(np.float32), "image_rows": image.astype(np.float32)}
    return sides | {"query_rows": sides["text_rows"][:50]}


@pytest.fixture
def names(rows, tmp_path, monkeypatch):
    """The names that the page's code starts from, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    space = SharedSpace.fit(text=rows["text_rows"], image=rows["image_rows"], method="calibrate")
    return rows | {"space": space, "np": np, "SharedSpace": SharedSpace}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def close(found, expected, error=2e-6):
    """Equal up to a share of the largest expected value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=error * np.abs(expected).max())


def test_one_graph_of_both_blocks_misses_what_two_graphs_find(rows, monkeypatch):
    """What docs/shared_space.md says of HNSW, on the rows of this file."""
    pytest.importorskip("faiss")
    monkeypatch.syspath_prepend(str(ROOT))
    measure = pytest.importorskip("benchmarks.runs.hnsw_search").measure
    sides = {side: torch.from_numpy(rows[f"{side}_rows"]) for side in ("text", "image")}
    for way, shares in measure(sides, sides).items():
        is_whole = "single" in way or "each modality" in way
        assert shares[-1] > 0.98 if is_whole else shares[0] < 0.9, (way, shares)


def test_the_page_merges_two_searches_of_qdrant(names, capsys):
    """Both merged lists are that of an exact search among all documents of a space."""
    pytest.importorskip("qdrant_client")
    exec(code_of("def search("), names)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 5 and indented(printed) in PAGE, printed
    sides = {"text": names["text_rows"], "image": names["image_rows"]}
    names["calibrating"] = SharedSpace.fit(**sides, method="calibrate")
    client, models = names["client"], names["models"]
    client.create_collection(
        "items", vectors_config=models.VectorParams(size=128, distance=models.Distance.COSINE)
    )
    payload = [{"modality": name} for name in sides for _ in sides[name]]
    client.upload_collection("items", np.concatenate([*sides.values()]), payload, range(800))
    exec(code_of("def search_encoder_index"), names)
    for role in sides:
        space = SharedSpace.fit(**sides, method="calibrate", query_role=role)
        documents = np.concatenate([space.documents(name, side) for name, side in sides.items()])
        for row in sides[role][:5]:
            scores = (space.query(row[None]) @ documents.T)[0]
            best = np.argsort(-scores)[:10]
            merged, first = names["search"](row, role), {"text": 0, "image": 400}
            assert [first[name] + number for _, name, number in merged] == best.tolist()
            close(np.array([score for score, *_ in merged]), scores[best], 1e-5)
            merged = names["search_encoder_index"](row, role)
            assert [number for *_, number in merged] == best.tolist()
            close(np.array([score for score, *_ in merged]), scores[best], 1e-4)


def test_the_share_of_images_shows_a_wrong_distance(names, capsys):
    """The page's check, of hits that Qdrant returned: a cosine loses the scale of the images."""
    pytest.importorskip("qdrant_client")
    from qdrant_client import QdrantClient, models

    space, sides = names["space"], [names["text_rows"], names["image_rows"]]
    mapped = np.concatenate([space.text(sides[0]), space.image(sides[1])])
    payload = [{"modality": name} for name in ("text", "image") for _ in sides[0]]
    names["client"] = client = QdrantClient(":memory:")
    stores = ("old", "COSINE", np.concatenate(sides)), ("new", "DOT", mapped)
    for name, distance, rows in (*stores, ("wrong", "COSINE", mapped)):
        vectors = models.VectorParams(size=128, distance=models.Distance[distance])
        client.create_collection(name, vectors_config=vectors)
        client.upload_collection(name, rows, payload, range(800))
    exec(code_of("def image_share"), names)
    before, after = map(float, capsys.readouterr().out.split())
    assert before < 0.1 and after > 0.3
    assert names["image_share"]("wrong", space.query(names["query_rows"])) < after / 2


def test_the_page_fuses_scores_as_qdrant_does(names):
    """The order of equal scores may differ, so the cosines of the fused hits are compared."""
    pytest.importorskip("qdrant_client")
    from qdrant_client import QdrantClient, models

    exec(code_of("def fused", METHOD_PAGE), names)
    client, sides = QdrantClient(":memory:"), [names["text_rows"], names["image_rows"]]
    vectors = models.VectorParams(size=128, distance=models.Distance.COSINE)
    client.create_collection("old", vectors_config=vectors)
    payload = [{"modality": name} for name in ("text", "image") for _ in sides[0]]
    client.upload_collection("old", np.concatenate(sides), payload, range(800))
    fusion = models.FusionQuery(fusion=models.Fusion.DBSF)
    for row in names["query_rows"][:10]:
        searches, cosines = [], unit(np.concatenate(sides)) @ unit(row[None])[0]
        for name in ("text", "image"):
            match = models.FieldCondition(key="modality", match=models.MatchValue(value=name))
            search = {"query": row.tolist(), "filter": models.Filter(must=[match]), "limit": 10}
            searches.append(models.Prefetch(**search))
        expected = client.query_points("old", prefetch=searches, query=fusion, limit=10).points
        found = [
            [(cosines[number], number) for number in first + np.argsort(-part)[:10]]
            for first, part in ((0, cosines[:400]), (400, cosines[400:]))
        ]
        fused = [number for _, number in names["fused"](found)]
        close(cosines[fused], cosines[[point.id for point in expected]], 1e-5)


def test_the_page_adds_an_offset_to_one_index(names):
    exec(code_of("def widen"), names)
    scores = names["searches"] @ names["with_offset"].T
    assert names["with_offset"].shape == (800, 136)
    space, queries = names["space"], names["space"].query(names["query_rows"])
    close(scores[:, :400], queries @ space.text(names["text_rows"]).T)
    close(scores[:, 400:], queries @ space.image(names["image_rows"]).T - 0.25)


def indented(text):
    return "".join(f"    {line}\n" for line in text.splitlines())


def test_the_page_runs_with_faiss(names):
    faiss = pytest.importorskip("faiss")
    exec(page_code("faiss"), names)
    space, queries, image = names["space"], names["query_rows"], names["image_rows"]
    scores = unit(queries) @ unit(image).T
    scores -= (unit(queries) @ space.sides["image"].centre.numpy())[:, None]
    scores /= space.scale("image")
    close(scores, space.query(queries) @ space.image(image).T)  # the page's merge of raw scores
    assert ((names["ids"] >= 400).mean() > 0.2) and faiss.read_index("mixed.faiss").ntotal == 800


def test_the_page_runs_with_scikit_learn(names):
    pytest.importorskip("sklearn")
    exec(page_code("sklearn"), names)
    sides = dict(text=names["text_rows"], image=names["image_rows"], queries=names["query_rows"])
    space = SharedSpace.fit(**sides)
    placed = np.concatenate([space.text(sides["text"]), space.image(sides["image"])])
    close(names["hits"], space.query(sides["queries"]) @ placed.T)


def test_transformers_and_accelerate_load_an_aligner_inside_of_a_model(tmp_path):
    """They compare shapes with an empty model and put tensors into it, in no call of ours."""
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.aligner, self.head = ReAlign(8, config.method), torch.nn.Linear(8, 3)
            self.post_init()

        def forward(self, rows):
            return self.head(self.aligner(rows).to(self.head.weight.dtype))

    text, image = (torch.from_numpy(np.load(file)).float()[:, :8] for file in SHARDS)
    for method in ("coral", "noise"):
        config, folder = transformers.PretrainedConfig(method=method), tmp_path / method
        model = Model(config)
        model.aligner = ReAlign.fit(text, image, method=method, residual=False)
        model.save_pretrained(folder)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = Model.from_pretrained(folder, config=config, dtype=dtype)
            assert loaded.head.weight.dtype == dtype
            assert torch.equal(loaded.aligner(text), model.aligner(text))
            assert {b.dtype for b in loaded.aligner.buffers()} == {torch.float64, torch.int64}
        for device in ("cpu", "disk"):
            with accelerate.init_empty_weights(include_buffers=device == "cpu"):
                empty = Model(config)
            places = {"aligner": device, "head": "cpu"}
            options = {"offload_folder": folder / "off", "offload_buffers": True}
            placed = accelerate.load_checkpoint_and_dispatch(
                empty, str(folder / "model.safetensors"), device_map=places, **options
            )
            assert torch.equal(placed(text), model(text)), device


@pytest.mark.parametrize("store", ["lancedb", "qdrant_client"])
def test_the_example_of_a_store_finds_more_images(store, capfd):
    pytest.importorskip(store, reason=f"{store} is not installed (extra `test` has it)")
    runpy.run_path(str(ROOT / "examples" / f"{store.removesuffix('_client')}_search.py"))
    printed = capfd.readouterr()
    counts = re.findall(r"^(.*): (\d+)$", printed.out, re.MULTILINE)
    found = {words: int(count) for words, count in counts}
    assert "incompatible with index metric" not in printed.err  # LanceDB would read all rows
    assert found["in a shared space"] > 2 * found["as the encoder gives them"] > 0
