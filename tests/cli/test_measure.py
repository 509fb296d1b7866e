"""The commands evaluate-search and substitution, on pairs of the demo corpus."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from realign_fast import Corpus, ReAlign, SharedSpace, metrics
from realign_fast.cli.main import main
from realign_fast.demo import DATA
from realign_fast.pipeline import paired_rows

HELD_OUT = str(DATA / "heldout")
SIDES = ["--text", HELD_OUT, "--image", HELD_OUT]


def run(capsys, *words):
    """Run a command with --json; return its status and what it printed."""
    status = main([*words, "--json", "--quiet"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def rows():
    return {
        side: torch.nn.functional.normalize(Corpus(HELD_OUT, side).take(range(400)).double())
        for side in ("text", "image")
    }


def test_search_in_a_space_of_a_file_has_the_figures_of_the_library(rows, tmp_path, capsys):
    space = SharedSpace.fit(**rows, layout="blocks")
    space.save(tmp_path / "space.safetensors")
    words = ["evaluate-search", *SIDES, "--space", str(tmp_path / "space.safetensors")]
    status, found = run(capsys, *words)
    number = torch.arange(400)
    stored = {name: space.documents(name, side) for name, side in rows.items()}
    expected = metrics.mixed_gallery(
        space.query(rows["image"], "image"), stored, {"text": number}, own={"image": number}
    )
    cells = found["image_queries"]["space"]
    assert (status, found["searched"], found["splits"]) == (0, 400, 1)
    assert cells["mixed_recall_at_10"] == expected.recall[10] > 0.3
    assert cells["mixed_recall_at_10_error"] == expected.recall[10].standard_error
    assert found["image_queries"]["encoder"]["recall_at_1"] < 0.3
    assert found["text_queries"]["encoder"]["share_of_text"] > 0.9
    assert run(capsys, *words[:-1], str(tmp_path)) == (status, found), "a directory"
    for option, value in (("--method", "center"), ("--splits", "2")):
        status, error = run(capsys, *words, option, value)
        name = option.replace("method", "fit")
        assert status == 2 and f"{name}: is an option of a fit" in error["error"]["message"]
    SharedSpace.fit(**rows).save(tmp_path / "space.safetensors")
    assert "image_queries" not in run(capsys, *words)[1], "a space of texts' queries"


def test_pairs_of_the_same_id_are_those_of_the_same_row(capsys):
    """Metadata gives both sides the same ids in the same order, so that the splits are alike."""
    words = ["evaluate-search", *SIDES, "--splits", "2", "--sample", "100", "--queries", "text"]
    (status, by_row), (_, by_id) = run(capsys, *words), run(capsys, *words, "--pairs", "id")
    assert status == 0 and by_row == by_id and "image_queries" not in by_row
    assert by_row["searched"] == 50
    figures = by_row["text_queries"]
    assert figures["space"]["mixed_ndcg"] > figures["encoder"]["mixed_ndcg"]
    sides = [Corpus(HELD_OUT, side) for side in ("text", "image")]
    every, few = ([*paired_rows.sampled_ids(sides, most)] for most in (400, 100))
    assert [len(side) for side in every] == [400, 400]
    assert few[0] == few[1] and set(few[0]) <= set(every[0]) and 60 < len(few[0]) < 140
    main([*words])
    printed = capsys.readouterr().out
    assert f"{figures['space']['mixed_ndcg']:.4f} ± " in printed


def test_captions_of_one_image_are_searched_once(rows, tmp_path, capsys):
    """Five texts of each image, whose pairs are those of ids or of rows."""
    ids = [f"a-{row // 5}" for row in range(200)]
    image = rows["image"][:200].view(40, 5, -1)[:, :1].expand(40, 5, -1).reshape(200, -1)
    for side, table_rows, names in (("text", rows["text"][:200], ids), ("image", image, ids[::-1])):
        columns = {"id": names, "embedding": table_rows.float().numpy().tolist()}
        pq.write_table(pa.table(columns), tmp_path / f"{side}.parquet")
    tables = ["--text", str(tmp_path / "text.parquet"), "--image", str(tmp_path / "image.parquet")]
    assert main(["evaluate-search", *tables, "--splits", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert "row 0 is taken as a pair and has the ids 'a-0' and 'a-39'" in printed.err
    by_row = json.loads(printed.out)
    by_id = run(capsys, "evaluate-search", *tables, "--splits", "2", "--pairs", "id")[1]
    assert (by_row["pairs"], by_row["repeated"]) == (40, 160)
    assert (by_id["pairs"], by_id["repeated"]) == (40, 160)


def test_sides_that_do_not_fit_are_refused(tmp_path, capsys):
    rows = np.random.default_rng(0).standard_normal((400, 128)).astype("f4")
    folders = {name: tmp_path / name for name in ("few", "bad", "wide", "copy")}
    for folder in folders.values():
        folder.mkdir()
    np.save(folders["few"] / "rows.npy", rows[:30])
    np.save(folders["wide"] / "rows.npy", np.ones((400, 9), "f4"))
    np.save(folders["copy"] / "rows.npy", np.load(DATA / "heldout/img_emb/img_emb_0.npy"))
    rows[7, 3] = np.nan
    np.save(folders["bad"] / "rows.npy", rows)
    for command, name, code, words in (
        (
            "evaluate-search",
            "few",
            2,
            "30 and 400 rows, expected pairs in one order",
        ),
        ("evaluate-search", "bad", 3, "bad/rows.npy: row 7 is zero or not finite"),
        ("evaluate-search", "wide", 3, "rows have 9 columns"),
        ("evaluate-search", "copy", 3, "copy: holds the rows of"),
        ("substitution", "few", 3, "few: has no metadata/ and no other columns; give a root"),
    ):
        status, found = run(capsys, command, "--text", str(folders[name]), "--image", HELD_OUT)
        assert status == code and words in found["error"]["message"], found


def test_maps_are_measured_by_readers_of_captions(rows, tmp_path, capsys):
    aligner, space = (str(tmp_path / f"{name}.safetensors") for name in ("aligner", "space"))
    ReAlign.fit(rows["text"], rows["image"]).save(aligner)
    SharedSpace.fit(**rows, method="center").save(space)
    words = ["substitution", *SIDES, "--seeds", "2", "--steps", "60", "--buckets", "32"]
    files = ["--aligner", aligner, "--space", space]
    status, found = run(capsys, *words, *files, "--method", "center")
    assert status == 0 and (found["texts"], found["images"], found["tested"]) == (400, 400, 80)
    shares = found["share_closed"]
    assert [*found["interval"]] == ["source", "center", aligner, space, "target"]
    assert shares["source"] == 0 and shares["target"] == 1
    losses = found["loss"]
    assert losses["center"] == pytest.approx(losses[space], rel=0.05), "fitted on 320 rows, on 400"
    assert max(losses[aligner], losses["target"]) < losses["source"]
    assert found["interval"]["center"][0] < shares["center"]
    for side, empty in (("text", [None] * 60), ("image", [""] * 100)):
        captions = [f"word{row % 7} no" for row in range(400)]
        captions[: len(empty)] = empty
        table = pa.table({"caption": captions, "embedding": rows[side].float().numpy().tolist()})
        pq.write_table(table, tmp_path / f"{side}.parquet")
    tables = ["--text", str(tmp_path / "text.parquet"), "--image", str(tmp_path / "image.parquet")]
    status, found = run(capsys, "substitution", *tables, "--seeds", "2", "--steps", "5")
    assert status == 0 and (found["texts"], found["images"]) == (340, 300), found
    assert found["without_words"] == {"text": 60, "image": 100}
    status, found = run(capsys, "substitution", *tables, "--sample", "20")
    assert "text.parquet: 17 of 20 captions have a word" in found["error"]["message"]
    status, found = run(capsys, *words, "--test", "0")
    assert status == 3 and "`test` takes 0 of 400 target rows" in found["error"]["message"]
