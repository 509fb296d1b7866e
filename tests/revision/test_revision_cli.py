"""The commands from a list and rows to captions, answers and figures; two processes for real."""

import io
import json
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file
from support.processes import run_apart
from support.revision_parts import CAPTIONS, QUIET, pretrain_command, words

from realign_fast import Corpus
from realign_fast.cli.main import main


def test_training_leaves_a_summary(trained):
    summary = json.loads((trained / "training.json").read_text())
    assert (summary["stage"], summary["steps"]) == ("finetune", 40)
    assert summary["data"]["used"] == 48


def test_pretrain_watches_a_list_of_its_own(world, tmp_path):
    """Its rows lie in a column, and the rows that train do not."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = Corpus(world / "corpus", "image")
    table = {"id": list(images.ids()), "vector": list(images[:].numpy())}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    lines = (world / "list.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:5]))
    more = ["--test", tmp_path / "test.jsonl", "--test-rows", tmp_path / "rows.parquet"]
    more += ["--column", "vector", "--set", "max_steps=2", "--set", "eval_steps=1"]
    assert main(pretrain_command(world, tmp_path / "out", *more)) == 0
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["data"]["used"] == 48 and len(summary["held_out_losses"]) == 2


def test_captions_of_all_rows_and_of_some(trained, world, tmp_path, capsys):
    base = ["caption", "--model", trained, "--rows", world / "corpus", "--ask", "what is this ?"]
    assert main(words(*base)) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [one["row"] for one in lines] == list(range(48))
    right = [one["caption"] == CAPTIONS[one["row"] % 4] for one in lines]
    assert sum(right) == 48
    assert "no --row, --id or --image, so all 48 rows" in printed.err
    assert main(words(*base, "--id", "x6", "--id", "x1")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["row"], one["caption"]) for one in lines] == [("x6", CAPTIONS[2]),
                                                               ("x1", CAPTIONS[1])]  # fmt: skip


class Colours:
    """An encoder for the seam: a picture's row is that of the caption its colour stands for."""

    def __init__(self, name):
        self.colours = {"plain": [(255, 0, 0), (0, 0, 255), (0, 255, 0), (9, 9, 9)]}[name]

    def embed_images(self, images):
        kinds = [self.colours.index(image.getpixel((0, 0))) for image in images]
        return np.eye(16, dtype=np.float32)[kinds] + 0.05


def test_captions_of_pictures_through_an_encoder(trained, tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    paths = []
    for name, colour in (("green", (0, 255, 0)), ("red", (255, 0, 0))):
        paths.append(tmp_path / f"{name}.png")
        image.new("RGB", (4, 4), colour).save(paths[-1])
    monkeypatch.setattr("realign_fast.embed.load_encoder", lambda name, _: Colours(name))
    base = ["caption", "--model", trained, "--ask", "what is this ?"]
    base += [word for path in paths for word in ("--image", path)]
    assert main(words(*base, "--encoder", "plain")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["caption"] for one in lines] == [CAPTIONS[2], CAPTIONS[0]]
    assert [one["row"] for one in lines] == words(*paths)
    assert main(words(*base)) == 2
    assert "--image needs --encoder" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert main(words(*base, "--image", tmp_path / "text.png", "--encoder", "plain")) == 3
    assert "text.png: cannot be read as a picture" in capsys.readouterr().err
    assert main(words(*base, "--encoder", "plain", "--row", "3")) == 2
    assert "--image: not allowed with --row" in capsys.readouterr().err


def test_a_chat_about_a_row(trained, world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this ?\nand this ?\n\n"))
    assert main(words("chat", "--model", trained, "--rows", world / "corpus", "--row", 3)) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers[0] == CAPTIONS[3] and len(answers) == 2
    monkeypatch.setattr(sys, "stdin", None)
    assert main(words("chat", "--model", trained, "--rows", world / "corpus", "--row", 3)) == 2
    assert "nothing to read questions from" in capsys.readouterr().err


def test_rows_of_another_encoder_are_refused(trained, world, tmp_path, capsys):
    for name in ("ours", "theirs"):
        shutil.copytree(world / "corpus", tmp_path / name)
        record = {"model": f"models/{name}", "made": {"model": {"weights": name}}}
        (tmp_path / name / "embed.json").write_text(json.dumps(record))
    short = ["--set", "max_steps=1", "--held-out", 0]
    where = ["--data", world / "list.jsonl", "--rows", tmp_path / "ours", "--out", tmp_path / "one"]
    assert main(words("finetune", "--model", trained, *where, *QUIET, *short)) == 0
    assert json.loads((tmp_path / "one" / "revision.json").read_text())["encoder"] == "ours ours"
    capsys.readouterr()
    other = ["--model", tmp_path / "one", "--rows", tmp_path / "theirs"]
    data = ["--data", world / "list.jsonl"]
    for command in (
        ["caption", *other, "--row", 1],
        ["chat", *other, "--row", 1, "--ask", "what ?"],
        ["evaluate", *other, *data],
        ["finetune", *other, *data, "--out", tmp_path / "two", *QUIET],
    ):
        assert main(words(*command)) == 3
        assert "theirs theirs, those of" in capsys.readouterr().err
    assert main(words("caption", *other[:3], world / "corpus", "--row", 1)) == 0  # unknown: passes


def test_evaluation_prints_figures_with_intervals(trained, world, tmp_path, capsys):
    where = ["--data", world / "list.jsonl", "--rows", world / "corpus"]
    where += ["--losses", tmp_path / "losses.jsonl"]
    assert main(words("evaluate", "--model", trained, *where, "--limit", 16)) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").open()]
    assert len(losses) == 16 and max(losses) < 1
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 16
    assert found["choice"]["value"] == 1
    assert found["loss"]["low"] <= found["loss"]["value"] <= found["loss"]["high"] < 1
    assert found["gain"]["low"] > 0
    assert main(words("evaluate", "--model", "nowhere", *where, "--data", "no.json")) == 6
    assert "no.json: no such file" in capsys.readouterr().err


def test_stopping_says_where_training_goes_on(world, tmp_path, capsys, monkeypatch):
    from realign_fast.revision.trainer import ReVisionTrainer

    step = ReVisionTrainer.training_step

    def stopped(self, *arguments, **options):
        if self.state.global_step == self.stops_at:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(ReVisionTrainer, "training_step", stopped)
    for stops_at, said in ((0, "no checkpoint yet"), (3, "--resume goes on from")):
        monkeypatch.setattr(ReVisionTrainer, "stops_at", stops_at, raising=False)
        more = ["--set", "save_steps=2", "--held-out", "0"]
        assert main(pretrain_command(world, tmp_path / str(stops_at), *more)) == 130
        assert said in capsys.readouterr().err


def test_aligned_texts_in_place_of_images_are_a_warning(trained, world, tmp_path, capsys):
    corpus, aligned = world / "corpus", tmp_path / "aligned"
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(size=(48, 16)))
    sides = ["--text", corpus, "--image", tmp_path / "image.npy"]
    assert main(words("align", *sides, "--out", aligned, "--quiet")) == 0
    capsys.readouterr()
    base = ["--model", trained, "--row", 0, "--max-new-tokens", 1]
    for rows, more, is_told in (
        (aligned / "text_emb", [], True),
        (aligned, ["--modality", "text"], False),
        (corpus, [], False),
    ):
        assert main(words("caption", *base, "--rows", rows, *more)) == 0
        warned = "expected rows of images as the encoder gave them" in capsys.readouterr().err
        assert warned is is_told
    twice = ["--rows", aligned, "--ids", corpus, "--aligner", aligned]
    assert main(pretrain_command(world, tmp_path / "twice", *twice)) == 3
    assert "give the rows of the encoder, which the aligner maps" in capsys.readouterr().err


def test_public_names_are_functions_however_often_they_are_asked_for():
    import realign_fast.revision as revision

    for _ in range(2):
        assert callable(revision.evaluate) and callable(revision.prepare)
    assert set(revision.__all__) <= set(dir(revision))


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--row", "99"], 3, "got row 99, expected -48..47"),
        (["--id", "nobody"], 3, "no row has the id 'nobody'"),
        ([], 2, "which row? give --row N or --id ID"),
    ],
)
def test_mistakes_of_chat(more, status, said, trained, world, capsys):
    base = ["chat", "--model", trained, "--rows", world / "corpus", "--ask", "what ?"]
    assert main(words(*base, *more)) == status
    assert said in capsys.readouterr().err


NO_MODEL = ["--language-model", "nowhere/at/all"]  # which is looked for after local files


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--set", "learning_rat=1"], 3, "nearest: learning_rate"),
        (["--set", "report_to=tensorboard"], 9, "report_to: tensorboard is not installed; inst"),
        (["--rows", "nowhere"], 6, "nowhere"),
        ([*NO_MODEL, "--data", "nowhere.json"], 6, "nowhere.json: no such file; expected a list"),
        ([*NO_MODEL, "--ids", "nowhere"], 3, "has no metadata/"),
        (["--test", "alone.jsonl"], 3, "test, test_rows: got one of them"),
        (NO_MODEL, 6, "nowhere/at/all: cannot be loaded as a language model"),
        (NO_MODEL, 6, "without network, the directory of a copy"),
        (["--chat-template", "nowhere.jinja"], 6, "nowhere.jinja"),
        (["--max-length", "4"], 3, "48 of 48 samples cannot be used"),
        (["--max-length", "2"], 3, "takes, with the visual tokens of an image (--visual-tokens)"),
        (["--language-model", "/nowhere"], 6, "/nowhere: no such directory"),
    ],
)
def test_mistakes_of_pretrain(more, status, said, world, tmp_path, capsys):
    assert main(pretrain_command(world, tmp_path / "out", *more)) == status
    assert said in capsys.readouterr().err


def test_a_model_of_captions_does_not_chat(world, trained, capsys):
    base = ["chat", "--model", trained.parent / "one", "--rows", world / "corpus", "--row", "1"]
    assert main(words(*base)) == 3
    assert "was last trained on captions" in capsys.readouterr().err


def test_two_processes_train_as_one(world, tmp_path):
    """Really two, over gloo: the same projector as one process with the same global batch."""
    more = ["--set", "max_steps=3", "--held-out", "0", "--micro-batch", "2"]
    assert main(pretrain_command(world, tmp_path / "one", *more)) == 0
    command = pretrain_command(world, tmp_path / "two", *more)
    run_apart(main, tmp_path / "log", command, processes=2)
    history = json.loads((tmp_path / "two" / "trainer_state.json").read_text())
    assert history["global_step"] == 3
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
    one, two = (load_file(tmp_path / name / "projector.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert np.allclose(value, two[name], atol=2e-6), name


def test_without_transformers_the_extra_is_named(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(pretrain_command(world, tmp_path / "out")) == 9
    assert "pip install 'realign_fast[train]'" in capsys.readouterr().err
