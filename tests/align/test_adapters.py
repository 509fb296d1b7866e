"""SharedSpace where people keep rows: faiss, sentence-transformers, stores, and the page's code."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_models

import realign_fast
from realign_fast import ReAlign, SharedSpace
from realign_fast.shared_space import LAYOUTS, SPACE_METHODS

ROOT = Path(__file__).parents[2]
DATA = Path(realign_fast.__file__).parent / "demo" / "data" / "heldout"
SHARDS = [DATA / f"{side}_emb" / f"{side}_emb_0.npy" for side in ("text", "img")]
PAGE = (ROOT / "docs" / "shared_space.md").read_text()


def page_code(word):
    """The block of docs/shared_space.md, "Where people keep rows", that imports a package."""
    section = PAGE.split("## Where people keep rows\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    block = [block for block in blocks if re.search(rf"^(import|from) {word}", block, re.M)][-1]
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", SPACE_METHODS)
def test_faiss_holds_and_searches_the_rows_of_the_space(rows, method, layout, tmp_path):
    faiss = pytest.importorskip("faiss")
    sides = {"text": rows["text_rows"], "image": rows["image_rows"]}
    space = SharedSpace.fit(**sides, method=method, layout=layout)
    index = faiss.IndexIDMap(faiss.IndexFlatIP(space.columns))
    for number, (name, documents) in enumerate(sides.items()):
        view = space.to_faiss(index, modality=name)
        view.add_with_ids(documents, 1000 * number + np.arange(len(documents)))
    placed = np.concatenate([space.documents(name, side) for name, side in sides.items()])
    close(faiss.downcast_index(index.index).reconstruct_n(0, index.ntotal), placed)
    for role in space.sides if layout == "blocks" else ("text",):
        faiss.write_index(space.to_faiss(index, role=role), str(tmp_path / "index"))
        searcher = faiss.read_index(str(tmp_path / "index"))
        assert searcher.ntotal == len(placed)
        scores, ids = searcher.search(sides[role][:50], 10)
        expected = space.query(sides[role][:50], role) @ placed.T
        close(scores, -np.sort(-expected)[:, :10])
        close(np.take_along_axis(expected, ids % 1000 + 400 * (ids // 1000), axis=1), scores)


def test_faiss_trains_an_index_before_the_views_and_skips_zero_rows(rows):
    faiss = pytest.importorskip("faiss")
    text, image = rows["text_rows"], rows["image_rows"]
    space = SharedSpace.fit(text=text, image=image)
    index = faiss.index_factory(space.columns, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(np.concatenate([space.text(text), space.image(image)]))
    index.make_direct_map()
    space.to_faiss(index, modality="image").add(np.concatenate([image[:9], 0 * image[:1]]))
    close(index.reconstruct_n(0, 9), space.image(image[:9]))
    close(index.reconstruct(9), space.image(0 * image[:1])[0])


def test_one_graph_of_both_blocks_misses_what_two_graphs_find(rows, monkeypatch):
    """What docs/shared_space.md says of HNSW, on the rows of this file."""
    pytest.importorskip("faiss")
    monkeypatch.syspath_prepend(str(ROOT))
    measure = pytest.importorskip("benchmarks.runs.hnsw_search").measure
    sides = {side: torch.from_numpy(rows[f"{side}_rows"]) for side in ("text", "image")}
    for way, shares in measure(sides, sides).items():
        is_whole = "single" in way or "each modality" in way
        assert shares[-1] > 0.98 if is_whole else shares[0] < 0.9, (way, shares)


def test_faiss_refuses_other_indexes_modalities_and_roles(rows):
    faiss = pytest.importorskip("faiss")
    space = SharedSpace.fit(text=rows["text_rows"], image=rows["image_rows"])
    for index in (faiss.IndexFlatL2(128), faiss.IndexFlatIP(64)):
        with pytest.raises(ValueError, match="expected an index of METRIC_INNER_PRODUCT and 128"):
            space.to_faiss(index)
    for options, words in (
        (dict(modality="audio"), "none of its modalities"),
        (dict(role="image"), "scaled for queries of 'text', got 'image'"),
    ):
        with pytest.raises(ValueError, match=words):
            space.to_faiss(faiss.IndexFlatIP(128), **options)


def test_the_page_runs_with_faiss(names):
    faiss = pytest.importorskip("faiss")
    exec(page_code("faiss"), names)
    code = "import faiss, numpy, sys; index = faiss.read_index('mixed.faiss'); "
    code += "numpy.save('ids', index.search(numpy.load('rows.npy'), 10)[1]); "
    code += "assert 'realign_fast' not in sys.modules"
    np.save("rows.npy", names["query_rows"])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert np.array_equal(np.load("ids.npy"), names["ids"])
    space, queries, image = names["space"], names["query_rows"], names["image_rows"]
    scores = unit(queries) @ unit(image).T
    scores -= (unit(queries) @ space.sides["image"].centre.numpy())[:, None]
    scores /= space.scale("image")
    close(scores, space.query(queries) @ space.image(image).T)  # the page's merge of raw scores
    assert ((names["ids"] >= 400).mean() > 0.2) and faiss.read_index("mixed.faiss").ntotal == 800


@pytest.mark.filterwarnings("ignore:SharedSpace. the scale of")
def test_the_page_runs_with_sentence_transformers(names, tmp_path):
    """A small CLIP, whose texts and pictures the real library tells apart."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    clip = SentenceTransformer(str(small_models.write_hugging_face(tmp_path / "clip", "clip")))
    words = small_models.WORDS
    names |= {
        "model": clip,
        "captions": [f"{first} {second}" for first in words for second in words[:3]],
        "pictures": [small_models.picture(number) for number in range(20)],
        "searches": words[:4],
    }
    exec(page_code("sentence_transformers"), names)
    space, shared, again = names["space"], names["shared"], names["again"]
    raw = {kind: clip.encode(names[kind]) for kind in ("captions", "pictures", "searches")}
    placed = np.concatenate([space.text(raw["captions"]), space.image(raw["pictures"])])
    close(names["rows"], placed)
    close(names["similarities"].numpy(), space.query(raw["searches"]) @ placed.T)
    assert shared.get_embedding_dimension() == space.columns == 24
    assert again.similarity_fn_name == "dot"
    assert np.array_equal(again.encode(names["pictures"]), shared.encode(names["pictures"]))
    with pytest.raises(ValueError, match="scaled for queries of 'text', got 'image'"):
        shared.encode_query(names["pictures"])
    module = shared[-1]
    embedding = {"sentence_embedding": clip.encode(["a"], convert_to_tensor=True).clone()}
    with pytest.raises(ValueError, match="does not tell the modality"):
        module(embedding | {"pixel_values": None})
    blocks = SharedSpace.fit(text=raw["captions"], image=raw["pictures"], layout="blocks")
    with pytest.warns(UserWarning, match="similarity_fn_name='cosine'; pass 'dot'"):
        wide = SentenceTransformer(modules=[*clip, type(module)(blocks)])
    close(wide.encode_query(names["pictures"]), blocks.query(raw["pictures"], "image"))
    trained = torch.tensor(raw["captions"], requires_grad=True)
    placed = wide[-1]({"sentence_embedding": trained})["sentence_embedding"]
    close(placed.detach().numpy(), blocks.text(raw["captions"]))
    placed[:, 3].sum().backward()
    assert trained.grad.abs().min() > 0


def test_the_page_runs_with_scikit_learn(names):
    pytest.importorskip("sklearn")
    exec(page_code("realign_fast.integrations.sklearn"), names)
    sides = dict(text=names["text_rows"], image=names["image_rows"], queries=names["query_rows"])
    space = SharedSpace.fit(**sides, method="calibrate")
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
def test_the_example_of_a_store_finds_more_images(store, capsys):
    pytest.importorskip(store, reason=f"{store} is not installed (extra `test` has it)")
    runpy.run_path(str(ROOT / "examples" / f"{store.removesuffix('_client')}_search.py"))
    found = {
        words: int(count)
        for words, count in re.findall(r"^(.*): (\d+)$", *capsys.readouterr()[:1], re.M)
    }
    assert found["in a shared space"] > 2 * found["as the encoder gives them"] > 0
