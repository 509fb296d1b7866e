"""Every format through the whole pipeline: resumed, verified, by workers and by parts."""

import json
import os

import numpy as np
import pytest

from realign_fast import Corpus
from realign_fast.cli import main
from realign_fast.corpus.format_registry import FORMATS

D = 16
NAMES = [name for name in FORMATS if name != "npy"]


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("pyarrow", reason="the extra `parquet`")
    for side, shift in (("text", 0.5), ("image", -0.5)):
        os.mkdir(side)
        rows = np.random.default_rng(len(side)).standard_normal((90, D)) + shift
        for index, part in enumerate(np.split(rows.astype("f4"), [40])):
            np.save(f"{side}/emb_{index}.npy", part)
    return tmp_path


def rows_of(folder, name):
    corpus = Corpus(folder, allow_pickle=name == "pickle")
    return corpus.take(range(corpus.num_rows)).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_aligned_resumed_and_verified_as_npy_is(corpora, name, capsys):
    pickles = ["--allow-pickle"] if name == "pickle" else []
    assert main.main(["convert", "text", "other", "--to", name, "--quiet"]) == 0
    align = ["align", "--image", "image"]
    assert main.main([*align, "--text", "text", "--out", "npy"]) == 0
    command = [*align, "--text", "other", "--out", "out", *pickles]
    assert main.main(command) == 0
    np.testing.assert_array_equal(rows_of("out", name), rows_of("npy", "npy"))
    capsys.readouterr()
    assert main.main(["verify", "out"]) == 0, capsys.readouterr().out
    assert main.main(command) == 0
    assert "90 rows were finished before" in capsys.readouterr().out
    assert main.main([*command, "--json"]) == 0
    passes = json.loads(capsys.readouterr().out)["passes"]
    assert all(one["rows"] == 0 for one in passes if one["name"].startswith(("source", "apply")))


def test_another_column_is_another_corpus(corpora, capsys):
    """Statistics of one column must not be taken for those of another."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    one, two = (np.random.default_rng(k).standard_normal((50, D)).astype("f4") + k for k in (1, 2))
    columns = {name: pa.array(list(rows)) for name, rows in (("a", one), ("b", two))}
    os.mkdir("both")
    pq.write_table(pa.table(columns), "both/x.parquet")
    assert main.main(["convert", "image", "images", "--to", "parquet", "--quiet"]) == 0
    fit = ["fit", "--text", "both", "--image", "images", "--target-column", "embedding", "--quiet"]
    gaps = []
    for column in ("a", "b"):
        assert main.main([*fit, "--column", column, "--out", "out"]) == 0
        gaps.append(
            json.loads(open("out/__realign__/report.json").read())["fitted"]["centroid_gap"]
        )
    assert gaps[0] != gaps[1]


@pytest.mark.parametrize("command", ["align", "apply", "convert", "target"])
def test_a_column_of_a_format_without_columns_is_refused(corpora, capsys, command):
    both = ["--text", "text", "--image", "image"]
    assert main.main(["align", *both, "--out", "one", "--quiet"]) == 0
    commands = {
        "align": ["align", *both, "--out", "two", "--column", "emb"],
        "target": ["align", *both, "--out", "two", "--target-column", "emb"],
        "apply": ["apply", "--text", "text", "--aligner", "one", "--out", "two", "--column", "emb"],
        "convert": ["convert", "text", "two", "--to", "parquet", "--column", "emb"],
    }
    assert main.main(commands[command]) == 3
    place, option = ("image", "--target-column") if command == "target" else ("text", "--column")
    words = f"realign-fast: error: {place}: npy has no columns; leave {option} out"
    assert words in capsys.readouterr().err
    assert not os.path.exists("two")


def test_the_column_of_the_source_is_not_asked_of_a_target_without_columns(corpora):
    assert main.main(["convert", "text", "table", "--to", "parquet", "--quiet"]) == 0
    both = ["--text", "table", "--image", "image", "--column", "embedding", "--quiet"]
    assert main.main(["align", *both, "--out", "out"]) == 0


@pytest.mark.parametrize("command", ["align", "fit", "unify"])
@pytest.mark.parametrize("tables", [["text"], ["image"], ["text", "image"], []])
def test_a_column_is_that_of_the_corpora_that_have_columns(corpora, capsys, command, tables):
    """Sides whose rows lie in the column `vector` are read beside sides and queries of npy."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    outputs = {}
    for out, names in (("of_npy", []), ("of_tables", tables)):
        sides = {side: side for side in ("text", "image")}
        for side in names:
            sides[side] = f"{side}s"
            os.mkdir(sides[side])
            for shard in Corpus(side).shards:
                rows = pa.FixedSizeListArray.from_arrays(np.load(shard.path).ravel(), D)
                pq.write_table(pa.table({"vector": rows}), f"{side}s/{shard.path.stem}.parquet")
        arguments = [command, "--out", out, "--quiet"]
        arguments += [word for side, path in sides.items() for word in (f"--{side}", path)]
        arguments += ["--queries", "text/emb_1.npy"] if command == "unify" else []
        outputs[out] = [*arguments, *(["--column", "vector"] if out == "of_tables" else [])]
    assert main.main(outputs["of_npy"]) == 0
    if not tables:
        assert main.main(outputs["of_tables"]) == 3 and not os.path.exists("of_tables")
        assert "error: text: npy has no columns; leave --column out" in capsys.readouterr().err
        return
    assert main.main(outputs["of_tables"]) == 0, capsys.readouterr().err
    for side in {"align": [""], "fit": [], "unify": ["text_emb", "img_emb"]}[command]:
        (of_npy, of_tables) = (
            Corpus(os.path.join(out, side), column=column)[:].numpy()
            for out, column in (("of_npy", None), ("of_tables", "vector"))
        )
        np.testing.assert_array_equal(of_tables, of_npy)
