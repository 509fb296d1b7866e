"""The built-in demo corpus: its layout, its promises in the README, and that it leaks nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).parents[2] / "realign_fast" / "demo" / "data"
SIDES = [(DEMO, "text"), (DEMO, "img"), (DEMO / "heldout", "text"), (DEMO / "heldout", "img")]


def shard_paths(root: Path, side: str) -> list[Path]:
    paths = list((root / f"{side}_emb").glob(f"{side}_emb_*.npy"))
    return sorted(paths, key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def read_rows(root: Path, side: str) -> np.ndarray:
    """All rows of a side in shard order, [N, D] float32."""
    parts = [np.load(path, allow_pickle=False) for path in shard_paths(root, side)]
    return np.concatenate(parts).astype(np.float32)


def read_metadata(root: Path, side: str) -> list[dict]:
    """The metadata of a side: of each shard the file with the same number."""
    numbers = [path.stem.rsplit("_", 1)[1] for path in shard_paths(root, side)]
    paths = [root / "metadata" / f"metadata_{number}.jsonl" for number in numbers]
    return [json.loads(line) for p in paths for line in p.read_text("utf-8").splitlines()]


def recall(
    query: np.ndarray, answer: np.ndarray, k: int, ways: int = 300, draws: int = 20
) -> float:
    """Share of queries whose own answer is among the best `k` of `ways`; ties count against it."""
    rng, found = np.random.default_rng(1), []
    for _ in range(draws):
        rows = rng.choice(len(query), ways, replace=False)
        scores = query[rows] @ answer[rows].T
        found.append((scores >= np.diag(scores)[:, None]).sum(axis=1) <= k)
    return float(np.mean(found))


@pytest.mark.parametrize(("root", "side"), SIDES)
def test_shards_are_finite_unit_float16_rows(root, side):
    paths = shard_paths(root, side)
    assert len(paths) >= (2 if root == DEMO else 1)
    for path in paths:
        rows = np.load(path, allow_pickle=False)
        assert rows.dtype == np.dtype("<f2")
        assert rows.ndim == 2
        assert rows.shape[1] == 128
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, 1, atol=2e-3, err_msg=str(path))


@pytest.mark.parametrize(("root", "side"), SIDES)
def test_every_row_has_an_id_and_a_caption(root, side):
    for path in shard_paths(root, side):
        number = path.stem.rsplit("_", 1)[1]
        lines = (root / "metadata" / f"metadata_{number}.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == len(np.load(path))
    entries = read_metadata(root, side)
    assert all(set(entry) == {"id", "caption"} and entry["caption"].strip() for entry in entries)
    assert len({entry["id"] for entry in entries}) == len(entries)


def test_the_data_is_at_most_4_mb():
    sizes = [path.stat().st_size for path in DEMO.rglob("*") if path.suffix in (".npy", ".jsonl")]
    assert len(sizes) >= 10
    assert sum(sizes) <= 4_000_000


def test_texts_outnumber_images_and_are_mostly_unpaired():
    texts, images = read_metadata(DEMO, "text"), read_metadata(DEMO, "img")
    paired = {entry["id"] for entry in texts} & {entry["id"] for entry in images}
    assert len(texts) >= 1.5 * len(images)
    assert 0 < len(paired) < len(texts) / 2
    assert len(images) > 1000


def test_sides_that_are_no_pairs_share_no_shard_number():
    numbers = [
        {path.stem.rsplit("_", 1)[1] for path in shard_paths(DEMO, s)} for s in ("text", "img")
    ]
    assert not numbers[0] & numbers[1]


def test_heldout_sides_are_row_aligned():
    text, image = (read_metadata(DEMO / "heldout", side) for side in ("text", "img"))
    assert len(text) >= 300
    assert text == image
    texts, images = (read_rows(DEMO / "heldout", side) for side in ("text", "img"))
    assert len(texts) == len(images) == len(text)


@pytest.mark.parametrize("side", ["text", "img"])
def test_no_heldout_pair_is_in_the_fitting_corpora(side):
    fitted, held = read_metadata(DEMO, side), read_metadata(DEMO / "heldout", side)
    for key in ("id", "caption"):
        assert not {entry[key].lower() for entry in fitted} & {entry[key].lower() for entry in held}


def test_no_heldout_picture_is_in_the_fitting_images():
    """The same picture has the same row, so it would sit at cosine 1."""
    cosine = read_rows(DEMO / "heldout", "img") @ read_rows(DEMO, "img").T
    assert cosine.max() < 0.999


def test_heldout_pairs_are_found_among_300():
    text, image = (read_rows(DEMO / "heldout", side) for side in ("text", "img"))
    assert recall(text, image, k=10) >= 0.5
    assert recall(image, text, k=10) >= 0.45
    shuffled = np.roll(image, 1, axis=0)  # wrong partners: chance is 10/300
    assert recall(text, shuffled, k=10) < 0.1


def test_the_modality_gap_is_there():
    for root in (DEMO, DEMO / "heldout"):
        text, image = (read_rows(root, side).mean(axis=0) for side in ("text", "img"))
        assert 0.2 < np.linalg.norm(text - image) < 1.2
