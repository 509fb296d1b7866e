"""The code of docs/training_codebases.md runs, with the real packages where they are installed."""

import re
from pathlib import Path

import pytest
import torch

from realign_fast import Corpus, SharedSpace
from realign_fast.cli.main import main

pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training_codebases.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """A function that runs the first block and one with a text; it returns their names."""
    monkeypatch.chdir(tmp_path)
    links = {"LANGUAGE_MODEL": "llama", "captions.jsonl": "list.jsonl", "aligned": "corpus"}
    links |= {"text": "corpus", "image": "corpus"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(world / target)
    texts = Corpus(world / "corpus", "text")
    images = texts.take(range(48)) + torch.eye(16)[15]
    SharedSpace.fit(text=texts, image=images, method="center").save(tmp_path / "SPACE")
    names: dict = {"__name__": "page"}

    def run_block(containing):
        for code in (BLOCKS[0], next(block for block in BLOCKS if containing in block)):
            names["before"] = [weight.clone() for weight in weights(names)]
            exec(compile(code, PAGE.name, "exec"), names)
        return names

    return run_block


def weights(names):
    return names["model"].projector.parameters() if "model" in names else []


def trained(names):
    pairs = zip(weights(names), names["before"], strict=True)
    return all(not torch.equal(after, before) for after, before in pairs)


@pytest.mark.parametrize(
    ("containing", "packages"),
    [
        ("import Trainer", ["accelerate"]),
        ("for batch in", []),
        ("pytorch_lightning", ["pytorch_lightning"]),
        ("SharedSpace", []),
    ],
)
def test_other_training_codes_train_the_projector(containing, packages, run, tmp_path, capsys):
    for package in packages:
        pytest.importorskip(package)
    names = run(containing)
    assert trained(names)
    saves = any("save_pretrained" in block for block in BLOCKS if containing in block)
    assert (tmp_path / "out" / "revision.json").is_file() == saves
    if saves:
        options = "--rows aligned --out two --held-out 0 --batch-size 8 --quiet --set max_steps=1"
        options = (options + " --set use_cpu=true --set bf16=false").split()
        command = ["finetune", "--model", "out", "--data", "captions.jsonl", *options]
        assert main(command) == 0
        for path in tmp_path.glob("out/*token*"):
            path.unlink()
        assert main([*command, "--out", "three"]) == 6
        assert "out: has no tokenizer; save that of the lang" in capsys.readouterr().err


def test_requests_of_vllm(run):
    names = run("prompt_embeds")
    model, rows = names["model"], names["samples"].rows.take([0]).float()
    images = names["of_llava"]["multi_modal_data"]["image"]
    assert images.shape == (1, 2, 64) and images.is_contiguous()
    assert torch.equal(images, model.projector(rows))
    bos = model.language_model.get_input_embeddings()(torch.tensor([1]))
    assert torch.equal(names["of_language_model"]["prompt_embeds"], torch.cat([bos, images[0]]))


def test_weights_of_llava_go_out_and_come_back(run):
    names = run("mm_projector")
    weights = torch.load("mm_projector.bin", weights_only=True)
    ours = dict(names["model"].projector.named_parameters())
    assert set(weights) == {
        f"model.mm_projector.{layer}" for layer in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert torch.equal(ours["layers.2.weight"], weights["model.mm_projector.2.weight"])
