"""Runs of `embed`: the position of rows, the same bytes for any number of workers, resuming."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as parquet
from hostile.kills import embedded_files
from PIL import Image
from support import programs
from support.small_models import picture, require, write_open_clip, write_pictures

from realign_fast import Corpus, ReAlign, SharedSpace
from realign_fast.cli import main
from realign_fast.embed import EmbedSettings, embed, embed_run, load_encoder, open_source
from realign_fast.embed.sources import read_image
from realign_fast.pipeline import align
from realign_fast.storage.lock import locked


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    require("open_clip")
    return write_open_clip(tmp_path_factory.mktemp("models") / "open_clip")


@pytest.fixture(scope="module")
def encoder(model):
    return load_encoder(*model, device="cpu")


@pytest.fixture
def pictures(tmp_path):
    """30 pictures with captions, of which 3, 10 and 11 cannot be embedded."""
    folder = write_pictures(tmp_path / "pictures", 30)
    (folder / "p_3.png").write_bytes(b"no image")
    (folder / "p_10.png").write_bytes(b"")
    (folder / "p_11.txt").write_text(" \n")
    return folder


def run(encoder, out, workers=0, shard_rows=12, **sources):
    options = {key: sources.pop(key) for key in ("dtype", "batch_size") if key in sources}
    opened = {content: open_source(path, content) for content, path in sources.items()}
    chosen = {"batch_size": 5, "progress": False} | options
    settings = EmbedSettings(workers=workers, shard_rows=shard_rows, **chosen)
    return embed(encoder, out, settings=settings, **opened)


def rows_of(out, side):
    return torch.cat([batch.rows for batch in Corpus(out, side).batches()])


def metadata(out, number):
    return parquet.read_table(out / "metadata" / f"metadata_{number}.parquet").to_pylist()


def failures(out):
    lines = (out / "__realign__/failures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_pairs_lie_in_the_same_row_and_failures_are_listed(encoder, pictures, tmp_path):
    report = run(encoder, tmp_path / "out", workers=2, pairs=pictures)
    records = [row for number in range(3) for row in metadata(tmp_path / "out", number)]
    embedded = [i for i in range(30) if i not in (3, 10, 11)]
    assert [row["id"] for row in records] == [f"p_{i}" for i in embedded]
    assert [row["source"] for row in records] == [str(pictures / f"p_{i}.png") for i in embedded]
    images = encoder.embed_images([Image.open(row["source"]) for row in records])
    texts = encoder.embed_texts([row["caption"] for row in records])
    for side, expected in (("image", images), ("text", texts)):
        rows = rows_of(tmp_path / "out", side)
        assert rows.dtype == torch.float16
        torch.testing.assert_close(rows.float(), expected, rtol=0, atol=3e-4)
    reasons = {failure["id"]: failure["reason"] for failure in failures(tmp_path / "out")}
    assert reasons == {
        "p_3": "no image that Pillow knows",
        "p_10": "no image that Pillow knows",
        "p_11": "empty caption",
    }
    assert (report["rows"], report["failures"]) == ({"text": 27, "image": 27}, 3)


def test_the_encoder_travels_with_the_rows_and_another_one_is_refused(
    encoder, pictures, tmp_path, capsys
):
    ours, theirs, out = tmp_path / "ours", tmp_path / "theirs", tmp_path / "out"
    run(encoder, ours, pairs=pictures)
    text, image = ours / "text_emb", ours / "img_emb"
    weights = encoder.facts()["weights"]
    name = f"{Path(encoder.name).name} {weights}"
    assert Corpus(ours, "text").encoder == Corpus(text).encoder == name
    shutil.copytree(ours, theirs)
    record = (theirs / "__realign__/embed.json").read_text()
    (theirs / "__realign__/embed.json").write_text(record.replace(weights, "0123abcd"))
    aligner = ReAlign.fit(text, image)
    aligner.save(tmp_path / "aligner.safetensors")
    back = ReAlign.load(tmp_path / "aligner.safetensors")
    assert back.encoder == back.record["encoder"] == name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows
        space = SharedSpace.fit(text=text, image=image)
    space.save(tmp_path / "space.safetensors")
    assert SharedSpace.load(tmp_path / "space.safetensors").encoder == back.encoder

    align(Corpus(ours, "text"), Corpus(ours, "image"), tmp_path / "aligned")
    assert Corpus(tmp_path / "aligned", "text").encoder == name

    both = rf"/theirs.* of the encoder .* 0123abcd, .* {weights}; embed both with one encoder"
    for fit in (ReAlign.fit, lambda a, b: SharedSpace.fit(text=a, image=b)):
        with pytest.raises(ValueError, match=both):
            fit(theirs / "text_emb", image)
    sides = ["--text", theirs, "--image", ours, "--out", out]
    aligned = ["--aligner", tmp_path / "aligner.safetensors", "--text", theirs, "--out", out]
    for arguments in (["align", *sides], ["fit", *sides], ["apply", *aligned]):
        assert main.main([*map(str, arguments)]) == 3
        assert re.search(both, capsys.readouterr().err)
    (theirs / "__realign__/embed.json").unlink()  # an unknown encoder passes
    assert ReAlign.fit(theirs / "text_emb", image).encoder == back.encoder


def test_two_sides_that_are_no_pairs_share_no_number(encoder, pictures, tmp_path):
    (tmp_path / "t.txt").write_text("a red cat\n\na blue dog\n")
    run(encoder, tmp_path / "out", images=pictures, texts=tmp_path / "t.txt")
    names = sorted(path.name for path in (tmp_path / "out").glob("*_emb/*"))
    assert names == ["img_emb_1.npy", "img_emb_2.npy", "img_emb_3.npy", "text_emb_0.npy"]
    assert Corpus(tmp_path / "out", "text").num_rows == 2
    assert Corpus(tmp_path / "out", "image").num_rows == 28
    assert metadata(tmp_path / "out", 0)[1] == {
        "id": "2",
        "caption": "a blue dog",
        "source": str(tmp_path / "t.txt"),
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_for_any_number_of_processes(encoder, pictures, tmp_path, workers):
    for name, count in (("one", 0), ("other", workers)):
        run(encoder, tmp_path / name, workers=count, pairs=pictures)
    assert embedded_files(tmp_path / "one") == embedded_files(tmp_path / "other")


def test_dtype_of_the_rows(encoder, pictures, tmp_path):
    run(encoder, tmp_path / "out", images=pictures, dtype="float32")
    norms = rows_of(tmp_path / "out", "image").norm(dim=1)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.ones(len(norms)), rtol=0, atol=1e-6)


def test_what_is_finished_is_not_embedded_again(encoder, pictures, tmp_path):
    first = run(encoder, tmp_path / "out", pairs=pictures)
    before = embedded_files(tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_emb/*")}
    resumed = run(encoder, tmp_path / "out", pairs=pictures)
    assert (first["embedded_now"], resumed["embedded_now"]) == (30, 0)
    assert resumed["finished_before"] == 30
    assert embedded_files(tmp_path / "out") == before
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_changed_image_and_a_lost_shard_are_embedded_anew(encoder, pictures, tmp_path):
    out = tmp_path / "out"
    run(encoder, out, pairs=pictures)
    picture(99).save(pictures / "p_20.png")  # in shard 1
    (out / "text_emb" / "text_emb_2.npy").unlink()
    resumed = run(encoder, out, pairs=pictures)
    assert (resumed["embedded_now"], resumed["finished_before"]) == (18, 12)
    run(encoder, tmp_path / "fresh", pairs=pictures)
    assert embedded_files(out) == embedded_files(tmp_path / "fresh")


def test_more_and_fewer_items(encoder, pictures, tmp_path):
    out = tmp_path / "out"
    run(encoder, out, pairs=pictures)
    for number in range(30, 40):
        picture(number).save(pictures / f"p_{number}.png")
        (pictures / f"p_{number}.txt").write_text("a cat")
    assert run(encoder, out, pairs=pictures)["finished_before"] == 24  # two whole shards
    for number in range(20, 40):
        (pictures / f"p_{number}.png").unlink()
    run(encoder, out, pairs=pictures)
    assert Corpus(out, "image").num_rows == Corpus(out, "text").num_rows == 17
    run(encoder, tmp_path / "fresh", pairs=pictures)
    assert embedded_files(out) == embedded_files(tmp_path / "fresh")


def test_a_shard_of_failures_alone_has_no_files(encoder, pictures, tmp_path):
    for number in range(12):
        (pictures / f"p_{number}.png").write_bytes(b"x")
    run(encoder, tmp_path / "out", pairs=pictures)
    names = [path.name for path in sorted((tmp_path / "out" / "img_emb").iterdir())]
    assert names == ["img_emb_1.npy", "img_emb_2.npy"]
    assert run(encoder, tmp_path / "out", pairs=pictures)["embedded_now"] == 0


def test_nothing_but_failures_is_an_error(encoder, pictures, tmp_path):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"all 30 items failed; see .*out/__realign__/failures\.jsonl"
    ):
        run(encoder, tmp_path / "out", images=pictures)
    assert len(failures(tmp_path / "out")) == 30


def test_an_output_begun_otherwise_is_refused(encoder, pictures, tmp_path):
    out = tmp_path / "out"
    run(encoder, out, pairs=pictures)
    before = embedded_files(out)
    with pytest.raises(
        ValueError, match=r"begun with batch_size 5, now it is 4; .* delete it to embed"
    ):
        run(encoder, out, pairs=pictures, batch_size=4)
    with pytest.raises(ValueError, match="begun with sources"):
        run(encoder, out, images=pictures)
    assert embedded_files(out) == before


def test_an_output_of_something_else_is_refused(encoder, pictures, tmp_path):
    (tmp_path / "out" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "out" / "img_emb" / "img_emb_0.npy", np.ones((2, 24), "f2"))
    with pytest.raises(ValueError, match="no embed run of ours wrote it"):
        run(encoder, tmp_path / "out", images=pictures)


def test_one_process_at_a_time(encoder, pictures, tmp_path):
    out = tmp_path / "out"
    with locked(out / "__realign__/_embed"), pytest.raises(OSError, match="is working on it"):
        run(encoder, out, images=pictures)


def test_a_source_that_changes_meanwhile_is_an_error(encoder, pictures, tmp_path, monkeypatch):
    source = open_source(pictures, "images")

    def read_and_change(item):
        picture(77).save(pictures / "p_0.png", compress_level=0)
        return read_image(item)

    monkeypatch.setattr(embed_run, "read_image", read_and_change)
    with pytest.raises(ValueError, match="changed while it was embedded"):
        embed(
            encoder, tmp_path / "out", images=source, settings=EmbedSettings(8, 0, progress=False)
        )
    monkeypatch.undo()
    assert run(encoder, tmp_path / "out", shard_rows=100_000, batch_size=8, images=pictures)["rows"]


def test_a_source_that_loses_items_meanwhile_is_an_error(encoder, pictures, tmp_path):
    source = open_source(pictures, "images")
    (pictures / "p_29.png").unlink()
    with pytest.raises(ValueError, match="out: a source changed while it was read"):
        embed(
            encoder, tmp_path / "out", images=source, settings=EmbedSettings(8, 0, progress=False)
        )


def test_a_model_without_finite_rows_is_an_error(model, pictures, tmp_path):
    state = torch.load(model[1], weights_only=True)
    state["visual.proj"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    broken = load_encoder(model[0], tmp_path / "nan.pt", device="cpu")
    with pytest.raises(ValueError, match="no finite row for 'p_0'"):
        run(broken, tmp_path / "out", images=pictures)
    assert not list((tmp_path / "out").glob("img_emb/*"))


def test_a_decoding_process_that_dies_is_one_clear_error(encoder, pictures, tmp_path, monkeypatch):
    source = open_source(pictures, "images")

    def die(item):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does for memory

    monkeypatch.setattr(embed_run, "read_image", die)
    with pytest.raises(OSError, match=r"a decoding process died.*fewer --workers"):
        embed(
            encoder, tmp_path / "out", images=source, settings=EmbedSettings(8, 1, progress=False)
        )


def test_a_name_that_is_no_utf8(encoder, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    shutil.copy(folder / "p_0.png", os.fsencode(folder) + b"/\xff.png")
    run(encoder, tmp_path / "out", images=folder)
    assert [row["id"] for row in metadata(tmp_path / "out", 0)] == ["p_0", "\\udcff"]


def test_killed_at_any_moment_it_ends_with_the_same_bytes():
    require("open_clip")
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "hostile.kills", "--command", "embed", "--kills", "3"]
    done = programs.run(*arguments, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == 3


def command_line(*arguments, capsys):
    status = main.main(["embed", *map(str, arguments)])
    return status, capsys.readouterr()


def test_the_command_line(model, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--model", model[0], "--pretrained", model[1], "--device", "cpu"]
    arguments = ["--pairs", pictures, *options, "--out", out, "--workers", 1]
    status, printed = command_line(*arguments, capsys=capsys)
    assert status == 0, printed.err
    assert "27 text rows and 27 image rows of 24 columns in 1 shards" in printed.out
    assert "3 items failed and are no rows" in printed.out
    assert "30/30" in printed.err  # the progress bar
    status, printed = command_line(*arguments, "--quiet", capsys=capsys)
    assert (status, printed.err, printed.out) == (0, "", "")
    status, printed = command_line(*arguments, "--json", capsys=capsys)
    assert json.loads(printed.out)["finished_before"] == 30


def test_the_command_lines_errors_are_one_line(model, pictures, tmp_path, capsys):
    out, options = ["--out", tmp_path / "out"], ["--model", model[0], "--pretrained", model[1]]
    for arguments, expected, words in (
        ([*options, *out], 2, "give --images, --texts or both, or --pairs alone"),
        ([*options, *out, "--pairs", pictures, "--images", pictures], 2, "or --pairs alone"),
        ([*options, *out, "--images", tmp_path / "none"], 6, "does not exist"),
        ([*options[:2], *out, "--images", pictures], 3, "with --pretrained"),
        (
            ["--model", "/no/such", *out, "--images", pictures],
            3,
            "expected a directory of Hugging Face",
        ),
        (
            [*options, "--images", pictures, "--out", pictures / "out"],
            3,
            "which is read; give another",
        ),
    ):
        status, printed = command_line(*arguments, capsys=capsys)
        assert status == expected
        assert words in printed.err
        assert printed.err.count("\n") == 1
