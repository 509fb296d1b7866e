"""A shared space in front of a model: each side where it belongs, saved, kept, never twice."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from support.revision_parts import (
    CAPTIONS,
    IDS,
    QUIET,
    pretrain_command,
    tiny_llama,
    word_tokenizer,
    words,
    write_corpus,
    write_world,
)

from realign_fast import Corpus, ReAlign, SharedSpace
from realign_fast.cli.main import main
from realign_fast.revision.evaluation import evaluate
from realign_fast.revision.generation import caption_rows, open_model
from realign_fast.revision.model import IMAGE_TOKEN, Projector, ReVisionConfig, ReVisionModel
from realign_fast.revision.stages import TrainingConfig, finetune, pretrain
from realign_fast.revision.templates import Plain
from realign_fast.revision.training_data import Collator, prepare

FAST = {"bf16": False, "use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0}
pytestmark = pytest.mark.filterwarnings("ignore:SharedSpace. the scale of")  # 48 rows


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A `write_world` whose texts and images lie apart, and the file of their space."""
    root = write_world(tmp_path_factory.mktemp("apart"))
    shutil.rmtree(root / "corpus")
    random = np.random.default_rng(0)
    for modality, column in (("text", 14), ("image", 15)):
        rows = np.eye(16)[np.arange(len(IDS)) % 4] + random.normal(size=(48, 16)) * 0.05
        rows[:, column] += 3
        write_corpus(root / "corpus", IDS, rows=rows.astype(np.float32), modality=modality)
    sides = {side: Corpus(root / "corpus", side) for side in ("text", "image")}
    SharedSpace.fit(**sides, method="center").save(root / "space.safetensors")
    return root


def run_of(apart, out, steps=60, side="text", **options):
    trainer = FAST | {"max_steps": steps, "learning_rate": 0.01, "save_strategy": "no"}
    options = {"space": str(apart / "space.safetensors")} | options
    start = options.pop("start", apart / "llama")
    return TrainingConfig(
        str(apart / "list.jsonl"),
        options.pop("rows", Corpus(apart / "corpus", side)),
        str(out),
        str(start),
        visual_tokens=options.pop("visual_tokens", 2),
        batch=8,
        held_out=0,
        trainer=trainer | options.pop("trainer", {}),
        **options,
    )


@pytest.fixture(scope="module")
def model_of_texts(apart, tmp_path_factory):
    """A model that was trained on texts alone, and watched on images."""
    out = tmp_path_factory.mktemp("texts") / "model"
    images = Corpus(apart / "corpus", "image")
    test = {"test": str(apart / "list.jsonl"), "test_rows": images}
    config = run_of(apart, out, train=("projector", "language_model"), **test)
    return out, pretrain(dataclasses.replace(config, held_out=None))


def test_a_model_of_texts_captions_images_by_their_own_side(apart, model_of_texts, tmp_path):
    out, summary = model_of_texts
    images, texts = (Corpus(apart / "corpus", side) for side in ("image", "text"))
    model, template = open_model(out, device="cpu")
    expected = [CAPTIONS[number % 4] for number in range(8)]
    assert list(caption_rows(model, template, [images.take(range(8))])) == expected
    assert list(caption_rows(model, template, [texts.take(range(8))], side="text")) == expected
    data = prepare(apart / "list.jsonl", images, template, tmp_path)
    figures = evaluate(model, data, choices=4)
    assert figures["choice_by_gain"]["value"] == 1
    assert summary["held_out_losses"][-1] == pytest.approx(figures["loss"]["value"], rel=1e-3)
    data.side = "text"  # which would take images for texts: 3 of 16 columns are shifted
    assert evaluate(model, data, choices=0)["loss"]["value"] > figures["loss"]["value"] + 0.1


def test_each_side_goes_through_its_own_map_once(apart, model_of_texts):
    model, _ = open_model(model_of_texts[0], device="cpu")
    space, rows = SharedSpace.load(apart / "space.safetensors"), torch.randn(3, 16)
    plain = Projector(dataclasses.replace(model.revision_config, space=None))
    plain.load_state_dict(model.projector.state_dict())
    ids = torch.full((3, 2), IMAGE_TOKEN)
    assert torch.equal(model.splice(ids, rows), plain(space.image(rows)))
    assert torch.equal(model.splice(ids, text_rows=rows), plain(space.text(rows)))
    assert model.splice(torch.ones(1, 2, dtype=torch.int64)).shape == (1, 2, 64)  # no image


def test_the_second_stage_keeps_the_space_unnamed(apart, model_of_texts, tmp_path, capsys):
    out, summary = model_of_texts
    config = run_of(apart, tmp_path, 1, "image", start=out, space=None, template="plain")
    again = finetune(config)
    assert again["model"]["space"] == summary["model"]["space"] is not None
    assert (
        "rows go through the image side of the space SharedSpace(center" in capsys.readouterr().out
    )
    first, second = (folder / "space.safetensors" for folder in (out, tmp_path))
    assert first.read_bytes() == second.read_bytes() == (apart / "space.safetensors").read_bytes()


def test_a_space_is_neither_forgotten_nor_swapped(apart, model_of_texts, tmp_path):
    out, _ = model_of_texts
    other = SharedSpace.fit(text=torch.randn(99, 16), image=torch.randn(99, 16) + 1)
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "space.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks space.safetensors, which its rows go thro"):
        open_model(copy)
    other.save(copy / "space.safetensors")
    with pytest.raises(ValueError, match=r"Projector: expected the space blake2b=.*, got blake2b"):
        open_model(copy)
    with pytest.raises(
        ValueError, match=r"got space blake2b=.*, and the model was made with blake"
    ):
        finetune(run_of(apart, tmp_path / "x", 1, "image", start=out, space=other))
    plain = run_of(apart, tmp_path / "plain", 2, space=None, trainer={"save_strategy": "steps"})
    pretrain(dataclasses.replace(plain, trainer=plain.trainer | {"save_steps": 1}))
    with pytest.raises(ValueError, match=r"got space blake2b=.*, and the model was made with None"):
        finetune(run_of(apart, tmp_path / "x", 1, "image", start=tmp_path / "plain"))
    with pytest.raises(
        ValueError,
        match=r"checkpoint-2: was trained with the space None, and this model has blake",
    ):
        pretrain(run_of(apart, tmp_path / "plain", 3, resume=True))
    config = ReVisionConfig("x", 16, 64, space="blake2b=0")
    with pytest.raises(ValueError, match=r"Projector: expected the space blake2b=0, got None"):
        ReVisionModel(config, tiny_llama())
    rows = {side: torch.randn(99, 16) + shift for side, shift in (("text", 0), ("image", 1))}
    blocks = SharedSpace.fit(**rows, layout="blocks")
    with pytest.raises(ValueError, match="layout 'blocks' keeps texts and images apart"):
        pretrain(run_of(apart, tmp_path / "x", 1, space=blocks))
    aligner = ReAlign.fit(**dict(zip(("source", "target"), rows.values(), strict=True)))
    with pytest.raises(ValueError, match="aligner: got one beside a space"):
        pretrain(run_of(apart, tmp_path / "x", 1, aligner=aligner))
    assert not (tmp_path / "x" / "revision.json").exists()


def test_rows_that_went_through_a_space_are_refused_by_side(
    apart, model_of_texts, tmp_path, capsys
):
    sides = ["--text", apart / "corpus", "--image", apart / "corpus"]
    assert main(words("unify", *sides, "--out", tmp_path / "index", "--quiet")) == 0
    index, list_ = tmp_path / "index", ["--data", apart / "list.jsonl", "--ids", apart / "corpus"]
    out, space = model_of_texts[0], ["--space", apart / "space.safetensors"]
    for command, side in (
        (["caption", "--model", out, "--rows", index, "--row", 1], "image"),
        (["evaluate", "--model", out, "--rows", index, *list_], "image"),
        (["finetune", "--model", out, "--rows", index, *list_, "--out", tmp_path / "x"], "image"),
        (pretrain_command(apart, tmp_path / "x", "--rows", index, *list_[2:], *space), "text"),
    ):
        assert main(words(*command)) == 3
        assert f"these rows went through the {side} side of " in capsys.readouterr().err


def test_sides_of_a_space_need_not_be_pairs(model_of_texts, tmp_path, capsys):
    random = np.random.default_rng(0)
    for side, count in (("text", 90), ("image", 80)):
        np.save(tmp_path / f"{side}.npy", random.normal(size=(count, 16)).astype(np.float32))
    sides = ["--text", tmp_path / "text.npy", "--image", tmp_path / "image.npy"]
    assert main(words("unify", *sides, "--out", tmp_path / "SPACE", "--quiet")) == 0
    assert Corpus(tmp_path / "SPACE", "text").num_rows == 90
    rows = ["--rows", tmp_path / "SPACE", "--row", 1]
    assert main(words("caption", "--model", model_of_texts[0], *rows)) == 3
    assert "these rows went through the image side of " in capsys.readouterr().err


def test_commands_take_a_space(apart, tmp_path, capsys):
    space = ["--space", apart / "space.safetensors", "--set", "max_steps=2"]
    assert main(pretrain_command(apart, tmp_path / "one", *space)) == 0
    saved = json.loads((tmp_path / "one" / "revision.json").read_text())["space"]
    assert saved.startswith("blake2b=") and (tmp_path / "one" / "space.safetensors").is_file()
    where = ["--data", apart / "list.jsonl", "--rows", apart / "corpus", "--out", tmp_path / "two"]
    short = ["--batch-size", 8, "--held-out", 0, "--set", "max_steps=1"]
    assert main(words("finetune", "--model", tmp_path / "one", *where, *QUIET, *short)) == 0
    assert json.loads((tmp_path / "two" / "revision.json").read_text())["space"] == saved
    rows = ["--model", tmp_path / "two", "--rows", apart / "corpus"]
    capsys.readouterr()
    answers = []
    for more in ([], ["--modality", "text"]):
        assert main(words("chat", *rows, "--row", 1, "--ask", "what ?", *more)) == 0
        answers.append(capsys.readouterr().out)
    assert all(answers)
    test = ["--data", apart / "list.jsonl", "--choices", 0]
    losses = []
    for more in ([], ["--modality", "text"]):
        assert main(words("evaluate", *rows, *test, *more)) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"]["value"])
    assert losses[0] != losses[1]  # each of its own side


@pytest.mark.parametrize("kind", ["root", "files"])
def test_a_loop_of_ones_own_takes_the_side_that_the_corpus_was_opened_with(kind, apart, tmp_path):
    space = SharedSpace.load(apart / "space.safetensors")
    model = ReVisionModel.start(apart / "llama", 16, visual_tokens=2, space=space)
    template = Plain(word_tokenizer(), visual_tokens=2)
    for side in ("text", "image"):
        root = Corpus(apart / "corpus", side)
        rows = root if kind == "root" else Corpus([shard.path for shard in root.shards], side)
        options = {"ids": apart / "corpus"} if kind == "files" else {}
        samples = prepare(apart / "list.jsonl", rows, template, tmp_path / side, **options)
        batch = Collator(template.pad_id)([samples[number] for number in range(4)])
        assert [name for name in batch if name.endswith("rows")] == [f"{side}_rows"]
        own = model.projector(rows.take(range(4)).float(), side).reshape(4, 2, 64)
        visual = model.splice(
            **{name: batch[name] for name in batch if name not in ("attention_mask", "labels")}
        )[batch["input_ids"] == IMAGE_TOKEN]
        assert torch.equal(visual.reshape(4, 2, 64), own)
        options["side"] = "image"
        stated = prepare(apart / "list.jsonl", rows, template, tmp_path / side, **options)
        assert "image_rows" in stated[0]
