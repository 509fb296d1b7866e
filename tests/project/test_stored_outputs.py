"""Outputs of version 0.1.0 (tests/data/v0.1.0) are resumed without a read, and load as they did."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kill_and_resume import tree

from realign_fast import Moments, ReAlign, backend_of
from realign_fast.cli import main
from realign_fast.pipeline import checkpoints, passes
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify

STORED = Path(__file__).parents[1] / "data" / "v0.1.0"
ROOT = "/tmp/realign_fast-0.1.0"  # the directory in which they were written
IDENTITY = ("path", "rows", "dimension", "dtype", "size", "mtime_ns")


def key_of_version_0_1_0(facts, identity):
    """The key of a checkpoint, by the formula of version 0.1.0, which is frozen."""
    text = json.dumps([facts, identity], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def place_output(name, folder):
    """Copy the output ``name`` and its sources to ``folder``, as if they had been written there.

    Paths, modification times and keys become those that version 0.1.0 would have written, for the
    kernel of this machine.
    """
    for directory in ("text", "image", name):
        shutil.copytree(STORED / directory, folder / directory)
    out = folder / name
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["code"] = f"realign_fast 0.1.0, sum_rows on {backend_of('sum_rows', 'cpu').kernel}"
    for record in manifest["passes"].values():
        stored_facts = record["facts"].copy()
        record["facts"]["code"] = manifest["code"]
        for entry in record["shards"]:
            stored_key = key_of_version_0_1_0(stored_facts, {k: entry[k] for k in IDENTITY})
            entry["path"] = os.path.realpath(entry["path"].replace(ROOT, str(folder)))
            os.utime(entry["path"], ns=(entry["mtime_ns"], entry["mtime_ns"]))
            key = key_of_version_0_1_0(record["facts"], {k: entry[k] for k in IDENTITY})
            stats = out / entry["stats"]
            if record["facts"]["pass"] == "apply":
                path = stats.with_suffix(".json")
                finished = json.loads(path.read_text())
                assert finished["key"] == stored_key
                _, modified = finished["written"]
                os.utime(out / entry["name"], ns=(modified, modified))
                path.write_text(json.dumps(finished | {"key": key}))
            else:
                assert stats.name == f"{Path(entry['path']).name}.{stored_key}.safetensors"
                entry["stats"] = entry["stats"].replace(stored_key, key)
                stats.rename(out / entry["stats"])
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return out


def rest(out):
    """Every byte of an output but those of its aligner, which is written anew with a digest."""
    found = tree(out)
    numbers = ReAlign.load(out / "aligner.safetensors").state_dict()
    del found["aligner.safetensors"]
    return found | {name: tensor.numpy().tobytes() for name, tensor in numbers.items()}


def test_an_aligned_output_is_resumed_without_a_read(tmp_path, reads):
    out = place_output("out", tmp_path)
    before = rest(out)
    report = align(tmp_path / "text", tmp_path / "image", out, Settings(progress=False))
    assert reads == [] and rest(out) == before
    stored = json.loads((STORED / "out" / "report.json").read_text())
    assert report["fitted"] == stored["fitted"] and report["result"] == stored["result"]
    assert [done["finished_before"] for done in report["passes"]] == [30, 31, 30, 30]


def test_an_aligned_output_is_verified(tmp_path):
    checked, faults = verify(place_output("out", tmp_path))
    assert faults == [] and checked == {"shards": 3, "rows": 30, "statistics": 11}


def test_a_fit_with_covariances_is_resumed_without_a_read(tmp_path, reads):
    """On another type of processor LAPACK's map has other last bits: its two passes run again."""
    out = place_output("fit", tmp_path)
    before = rest(out)
    sides = ["--text", str(tmp_path / "text"), "--image", str(tmp_path / "image")]
    command = ["fit", *sides, "--out", str(out), "--method", "coral", "--quiet"]
    assert main.main(command) == 0
    if reads:
        assert reads == [f"text/emb_{index}.npy" for index in (0, 1, 2)] * 2
        reads.clear()
        before = rest(out)
        assert main.main(command) == 0
    assert reads == [] and rest(out) == before


@pytest.mark.parametrize("ingredient", ["time", "path", "bad_rows", "batch_bytes"])
def test_rows_are_read_again_where_an_ingredient_of_the_keys_differs(tmp_path, reads, ingredient):
    out, text, options = place_output("out", tmp_path), tmp_path / "text", {}
    if ingredient == "time":
        modified = (text / "emb_0.npy").stat().st_mtime_ns + 1
        os.utime(text / "emb_0.npy", ns=(modified, modified))
    elif ingredient == "path":
        text = text.rename(tmp_path / "moved")
    else:
        options[ingredient] = {"bad_rows": "skip", "batch_bytes": 1 << 20}[ingredient]
    align(text, tmp_path / "image", out, Settings(progress=False, **options))
    assert f"{text.name}/emb_0.npy" in reads


def test_an_output_of_another_arithmetic_is_refused_in_words(tmp_path, reads, monkeypatch, capsys):
    out = place_output("out", tmp_path)
    before = tree(out)
    monkeypatch.setattr(passes, "code_version", lambda device: "realign_fast 9.9.9, sum_rows")
    command = ["align", "--text", str(tmp_path / "text"), "--image", str(tmp_path / "image")]
    assert main.main([*command, "--out", str(out)]) == 2
    assert "made by realign_fast 0.1.0, whose sums differ" in capsys.readouterr().err
    assert reads == [] and tree(out) == before


def test_results_have_every_byte_of_the_arithmetic_version(tmp_path):
    """A result that changes needs a higher ``ARITHMETIC_VERSION``, and new stored results."""
    assert checkpoints.ARITHMETIC_VERSION == "0.1.0"
    align(STORED / "text", STORED / "image", tmp_path / "out", Settings(progress=False))
    for name in ("emb_0.npy", "emb_1.npy", "emb_2.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (STORED / "out" / name).read_bytes()
    stored = json.loads((STORED / "out" / "report.json").read_text())
    fitted = json.loads((tmp_path / "out" / "__realign__/report.json").read_text())["fitted"]
    gap = stored["fitted"]["centroid_gap"]
    assert fitted["centroid_gap"] == pytest.approx(gap, rel=1e-14)  # any instruction set


def test_moments_and_aligner_give_the_results_they_gave():
    results = np.load(STORED / "results.npz")
    moments = Moments.load(STORED / "moments.safetensors")
    assert moments.count == 30
    np.testing.assert_allclose(moments.mean, results["mean"], rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, results["covariance"], rtol=1e-12, atol=1e-16)
    aligner = ReAlign.from_pretrained(STORED / "aligner")
    aligned = aligner(torch.from_numpy(results["rows"]))
    np.testing.assert_allclose(aligned, results["aligned"], atol=1e-12)
    assert aligner.method == "coral" and int(aligner.source_count) == 30


@pytest.fixture
def training(tmp_path):
    """A directory with the language model, the data, the model and the stopped training."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    for name in ("llama", "corpus", "training", "model"):
        shutil.copytree(STORED / name, tmp_path / name)
    shutil.copy(STORED / "list.json", tmp_path)
    for path in tmp_path.rglob("revision.json"):
        path.write_text(path.read_text().replace(ROOT, str(tmp_path)))
    return tmp_path


@torch.no_grad()
def test_a_revision_model_gives_the_answers_it_gave(training):
    from realign_fast.revision.model import ReVisionModel

    stored = {name: torch.from_numpy(a) for name, a in np.load(STORED / "revision.npz").items()}
    model = ReVisionModel.from_pretrained(training / "model")
    inputs = {name: stored[name] for name in ("input_ids", "image_rows")}
    torch.testing.assert_close(model(**inputs).logits[:, -1], stored["logits"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), stored["answers"])


def test_a_training_is_resumed_from_its_checkpoint(training, monkeypatch):
    """Two of four steps are left, which take their samples in another order than 0.1.0 did.

    AdamW moves a weight by at most about its rate, here .015 and .005, in a step.
    """
    from safetensors.torch import load_file

    from realign_fast.revision.model import ReVisionModel

    splice, steps = ReVisionModel.splice, []

    def counted(self, *arguments):
        steps.append(self.training)
        return splice(self, *arguments)

    monkeypatch.setattr(ReVisionModel, "splice", counted)
    out = training / "training"
    command = ["pretrain", "--language-model", str(training / "llama"), "--resume"]
    command += ["--data", str(training / "list.json"), "--rows", str(training / "corpus")]
    command += ["--out", str(out), "--batch-size", "4", "--micro-batch", "4"]
    command += ["--visual-tokens", "2", "--held-out", "0"]
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02}
    settings |= {"bf16": "false", "use_cpu": "true", "dataloader_num_workers": 0}
    for name, value in (settings | {"disable_tqdm": "true"}).items():
        command += ["--set", f"{name}={value}"]
    assert main.main(command) == 0
    assert steps == [True, True]
    states = [json.loads((f / "trainer_state.json").read_text()) for f in (out, training / "model")]
    losses, expected = ([log.get("loss") for log in state["log_history"]] for state in states)
    assert losses[:2] == expected[:2] and losses[2:4] == pytest.approx(expected[2:4], rel=1e-2)
    weights = load_file(out / "projector.safetensors")
    expected = load_file(training / "model" / "projector.safetensors")
    torch.testing.assert_close(weights, expected, rtol=0, atol=0.04)
