"""``unify``: both sides as documents of one index, in every format, resumed and verified."""

import json

import numpy as np
import pytest
import torch
from support.kill_and_resume import tree

from realign_fast import Corpus, SharedSpace
from realign_fast.cli import main
from realign_fast.corpus.convert import convert
from realign_fast.pipeline import Settings, unify_run
from realign_fast.pipeline.verify import verify

D, QUIET = 12, Settings(progress=False)


def write(folder, seed, sizes, dtype="f4"):
    """Shards of rows about the mean of a modality; a narrow one, so that queries share a part."""
    generator = np.random.default_rng(seed)
    centre, spread = generator.standard_normal(D), 0.3 + generator.random(D)
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        rows = generator.standard_normal((size, D)) * spread + centre
        np.save(folder / f"emb_{index}.npy", rows.astype(dtype))
    return folder


@pytest.fixture
def sides(tmp_path):
    return write(tmp_path / "text", 1, (150, 1, 90)), write(tmp_path / "image", 2, (170, 60))


@pytest.fixture
def documents(sides):
    return {"text": Corpus(sides[0]), "image": Corpus(sides[1])}


def unify(documents, out, settings, engine=None, **choices):
    return unify_run.unify(unify_run.SpaceSides(documents, **choices), out, settings, engine)


def rows_of(folder, **options):
    corpus = Corpus(folder, **options)
    return corpus.take(range(len(corpus)))


def run(*words):
    return main.main([*map(str, words), "--quiet"])


@pytest.mark.parametrize("layout", ["single", "blocks"])
@pytest.mark.parametrize("method", ["calibrate", "center-calibrate", "center"])
def test_documents_and_queries_are_those_of_the_space(sides, documents, tmp_path, method, layout):
    out, choices = tmp_path / "out", {"method": method, "layout": layout}
    report = unify(documents, out, QUIET, **choices)
    space = SharedSpace.load(out / "__realign__/space.safetensors")
    expected = SharedSpace.fit(text=documents["text"], image=documents["image"], **choices)
    assert report["space"]["method"] == method == space.method
    for name, folder in (("text", "text_emb"), ("image", "img_emb")):
        assert space.scale(name) == pytest.approx(expected.scale(name), rel=1e-12)
        rows = rows_of(out / folder)
        assert rows.equal(space.documents(name, rows_of(documents[name].path)))
    assert verify(out)[1] == [] and verify(out)[0]["rows"] == 471
    queries = write(tmp_path / "new", 1, (9,))
    unify({}, tmp_path / "found", QUIET, queries=Corpus(queries), space=space)
    assert rows_of(tmp_path / "found" / "query_emb").equal(space.query(rows_of(queries)))
    assert verify(tmp_path / "found")[1] == []


@pytest.mark.parametrize("layout", ["single", "blocks"])
@pytest.mark.parametrize(
    "to", ["npz", "pt", "safetensors", "parquet", "arrow", "hf", "pickle", "tar"]
)
def test_every_format_keeps_itself(documents, tmp_path, to, layout):
    if to in ("parquet", "arrow", "hf"):
        pytest.importorskip("pyarrow")
    pickles = to == "pickle"
    for name, corpus in documents.items():
        convert(corpus, tmp_path / to / name, to)
    corpora = {name: Corpus(tmp_path / to / name, allow_pickle=pickles) for name in documents}
    unify(corpora, tmp_path / "out", QUIET, layout=layout)
    unify(documents, tmp_path / "npy", QUIET, layout=layout)
    for folder in ("text_emb", "img_emb"):
        written = Corpus(tmp_path / "out" / folder, allow_pickle=pickles)
        assert written.format == corpora["text"].format
        assert written.take(range(len(written))).equal(rows_of(tmp_path / "npy" / folder))
    assert verify(tmp_path / "out")[1] == []


def test_any_workers_leave_the_same_bytes_and_a_second_run_reads_nothing(
    documents, tmp_path, reads, caplog, engine
):
    choices = {"layout": "blocks", "method": "center-calibrate"}
    unify(documents, tmp_path / "one", QUIET, **choices)
    workers = Settings(progress=False, workers=engine.workers)
    unify(documents, tmp_path / "two", workers, engine, **choices)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    space = SharedSpace.from_pretrained(tmp_path / "two")
    expected = torch.empty(241, 2 * D)
    space.document_map("text")(rows_of(documents["text"].path), expected)
    assert rows_of(tmp_path / "two/text_emb").equal(expected)
    reads.clear()
    again = unify(documents, tmp_path / "two", QUIET, **choices)
    assert reads == [] and all(done["rows"] == 0 for done in again["passes"])
    assert tree(tmp_path / "two") == tree(tmp_path / "one") and not caplog.records
    unify(documents, tmp_path / "two", QUIET, layout="blocks", method="calibrate")
    warned = "text_emb: holds 3 shards of other options or of another map"
    assert warned in caplog.text
    caplog.clear()
    unify(documents, tmp_path / "two", QUIET, layout="blocks", method="calibrate")
    assert not caplog.records


def test_a_sample_is_enough_and_its_plan_is_what_runs(sides, tmp_path, capsys):
    command = ["unify", "--text", sides[0], "--image", sides[1], "--out", tmp_path / "out"]
    command += ["--fit-rows", 200, "--layout", "blocks", "--json"]
    assert run(*command, "--dry-run") == 0 and not (tmp_path / "out").exists()
    plan = json.loads(capsys.readouterr().out)
    assert plan["notes"] == ["and up to 2 passes more, as those of the moments, if it centres"]
    assert run(*command) == 0
    report = json.loads(capsys.readouterr().out)
    facts = ("name", "rows", "bytes_read")
    passes = [[step[fact] for fact in facts] for step in plan["passes"]]
    assert passes == [[done[fact] for fact in facts] for done in report["passes"]]
    assert [done["rows"] for done in report["passes"]] == [200, 200, 241, 230]
    assert plan["bytes_written"] == 2 * 471 * D * 4
    counts = {name: side["count"] for name, side in report["space"]["modalities"].items()}
    assert counts == {"text": 200, "image": 200}
    assert run(*command, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["finished_before"] == 471 and plan["notes"] == []
    assert run("verify", tmp_path / "out") == 0


def test_more_documents_and_queries_go_into_a_fitted_space(sides, tmp_path, capsys):
    out, new = tmp_path / "out", write(tmp_path / "new", 2, (40,))
    assert run("unify", "--text", sides[0], "--image", sides[1], "--out", out) == 0
    more = ["unify", "--space", out, "--out"]
    assert run(*more, tmp_path / "more", "--image", new, "--queries", sides[0]) == 0
    assert run(*more, tmp_path / "z", "--text", new, "--queries", new) == 0
    assert run("verify", tmp_path / "more") == 0
    assert "2 faults" not in capsys.readouterr().out
    space = SharedSpace.load(out / "__realign__/space.safetensors")
    assert rows_of(tmp_path / "more" / "img_emb").equal(space.image(rows_of(new)))
    before = tree(tmp_path / "more")
    for words, kept in (
        (["--queries", sides[0]], "apply image"),
        (["--image", new], "apply text queries"),
    ):
        for dry in (["--dry-run"], []):
            assert run("unify", "--space", out, *words, "--out", tmp_path / "more", *dry) == 2
            assert f"or of other sides ({kept})" in capsys.readouterr().err
        assert tree(tmp_path / "more") == before
    with pytest.warns(UserWarning, match="text: the mean of the rows lies"):
        unify({"image": Corpus(sides[0])}, tmp_path / "far", QUIET, space=space)
    with pytest.warns(UserWarning, match="image: the mean of the rows lies"):
        unify({}, tmp_path / "asked", QUIET, queries=Corpus(sides[1]), space=space)


@pytest.mark.parametrize("bad_rows", ["skip", "keep"])
@pytest.mark.parametrize("layout", ["single", "blocks"])
def test_bad_rows_keep_their_places(sides, tmp_path, bad_rows, layout):
    rows = np.load(sides[0] / "emb_0.npy")
    rows[3], rows[5, 2] = 0, np.nan
    np.save(sides[0] / "emb_0.npy", rows)
    documents = {"text": Corpus(sides[0]), "image": Corpus(sides[1])}
    settings = Settings(progress=False, bad_rows=bad_rows)
    unify(documents, tmp_path / "out", settings, layout=layout)
    space = SharedSpace.load(tmp_path / "out" / "__realign__/space.safetensors")
    unify({}, tmp_path / "found", settings, queries=documents["text"], space=space)
    assert verify(tmp_path / "out")[1] == verify(tmp_path / "found")[1] == []
    written = np.load(tmp_path / "out" / "text_emb" / "emb_0.npy")
    if bad_rows == "skip":
        assert not written[[3, 5]].any()
    else:
        assert np.isnan(written[5]).any() and np.isfinite(written[3]).all()


def test_what_no_space_is_made_of_is_one_error(sides, tmp_path, capsys):
    text, image, out = *sides, tmp_path / "out"
    both = ["--text", text, "--image", image, "--out", out]
    queries, empty = write(tmp_path / "queries", 1, (9,)), write(tmp_path / "empty", 1, (0,))
    np.save(tmp_path / "wide.npy", np.ones((5, D + 1), "f4"))
    linked = tmp_path / "linked"
    for folder in (linked, text / "below"):
        folder.mkdir()
    (linked / "text_emb").symlink_to(text / "below")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 50)
    for status, message, words in (
        (2, "give both, or --space", ["--text", text, "--out", out]),
        *(
            (2, f"{option}: is an option of a fit, and --space is", [*both, "--space", out, *given])
            for option, *given in (
                ("--layout", "--layout", "single"),
                ("--method", "--method", "auto"),
                ("--query-role", "--role", "text"),
                ("--fit-rows", "--fit-rows", 50),
                ("--seed", "--seed", 0),
            )
        ),
        (3, f"{empty}: no usable row (0 zero", [*both[:2], *both[4:], "--image", empty]),
        (2, "is in both sides", ["--text", text, "--image", text / "emb_0.npy", "--out", out]),
        (3, "columns", ["--text", text, "--image", tmp_path / "wide.npy", "--out", out]),
        (3, "expected a space", [*both, "--space", tmp_path / "bad.safetensors"]),
        (2, "query-role: 'video' is none of text, image", [*both, "--role", "video"]),
        (2, "is or lies in", ["--text", text, "--image", image, "--out", text / "out"]),
        (2, "is or lies in", [*both[:4], "--out", linked]),
        (2, "is or lies in", [*both[:4], "--queries", queries, "--out", queries / "out"]),
    ):
        assert run("unify", *words) == status, words
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and line.startswith("realign-fast: error: ")
    assert run("unify", *both) == 0
    assert run("align", *both) == 2  # which would mix two results
    assert "holds the result of another command" in capsys.readouterr().err
    role = ["--queries", image, "--role", "image", "--out", tmp_path / "roles"]
    assert run("unify", "--space", out, *role) == 3
    assert "the index is scaled for queries of 'text'" in capsys.readouterr().err


def test_verify_knows_the_rows_of_an_index(documents, tmp_path, capsys):
    out = tmp_path / "out"
    unify(documents, out, QUIET, method="center-calibrate")
    shard, space = out / "text_emb" / "emb_0.npy", out / "__realign__/space.safetensors"
    rows, saved = np.load(shard), space.read_bytes()
    np.save(shard, rows * np.float32(1.5))
    np.save(out / "img_emb" / "emb_9.npy", rows)
    SharedSpace.fit(text=documents["image"], image=documents["text"]).save(space)
    assert run("verify", out) == 1
    lines = capsys.readouterr().out
    for fault in ("checksum is", "150 rows are not of norm", "emb_9.npy: is a shard that the man"):
        assert fault in lines
    assert lines.count("the rows went through") == 2 and "the manifest says" in lines
    assert "aligner" not in lines and lines.count("unify all sides again") == 2
    np.save(shard, rows)
    (out / "img_emb" / "emb_9.npy").unlink()
    space.write_bytes(saved)
    assert run("verify", out) == 0


def test_other_options_over_a_result_are_a_warning_as_those_of_align(
    sides, documents, tmp_path, capsys
):
    unify(documents, tmp_path / "out", QUIET)
    paths = ["--text", *sides[:1], "--image", *sides[1:], "--out", tmp_path / "out"]
    assert main.main(["unify", *map(str, paths), "--layout", "blocks"]) == 0
    messages = capsys.readouterr().err
    for folder, count in (("text_emb", 3), ("img_emb", 2)):
        assert f"{folder}: holds {count} shards of other options or of another map" in messages


def test_jobs_of_an_array_need_a_round_for_each_pass_with_checkpoints(sides, tmp_path, capsys):
    command = ["unify", "--text", sides[0], "--image", sides[1], "--layout", "blocks"]
    command += ["--method", "center-calibrate"]
    for fit_rows, rounds in (("all", 3), (40, 1)):
        one, jobs = tmp_path / f"one-{fit_rows}", tmp_path / f"jobs-{fit_rows}"
        options = [*command, "--fit-rows", fit_rows]
        assert run(*options, "--dry-run", "--json", "--out", one) == 0
        plan = json.loads(capsys.readouterr().out)
        assert run(*options, "--json", "--out", one) == 0
        report = json.loads(capsys.readouterr().out)
        planned, done = ([s["rows"] for s in p["passes"]] for p in (plan, report))
        assert planned == done == ([241, 230] if rounds == 3 else [40, 40]) * 2 + [241, 230]
        finished = 0
        for _ in range(rounds):
            for job in ("3/3", "1/3", "2/3"):
                assert run(*options, "--out", jobs, "--shard", job, "--json") == 0
                report = json.loads(capsys.readouterr().out)
                rounds_left = "this was not the last round: once all jobs have ended, run them with"
                is_early = rounds == 3 and finished < 4  # of nine jobs
                assert report["next"].startswith(rounds_left) == is_early, (finished, report)
                finished += 1
        assert report["complete"] is False and report["next"].startswith("the same command without")
        assert run("verify", jobs) == 4, "no run without a part has ended it"
        assert run(*options, "--out", jobs) == 0 and tree(jobs) == tree(one)


def test_a_job_array_of_two_folders_has_the_bytes_of_one_run(sides, tmp_path, capsys):
    command = ["unify", "--text", sides[0], "--image", sides[1], "--queries", sides[0]]
    jobs, one = tmp_path / "jobs", tmp_path / "one"
    for job in ("1/2", "2/2", "1/2"):
        assert run(*command, "--out", jobs, "--shard", job) == 0
    assert "next: the same command without --shard" in capsys.readouterr().out
    align = ["--text", sides[0], "--image", sides[1]]
    for words, status, message in (
        (["align", *align, "--out", jobs], 2, "holds the result of another command"),
        (["verify", jobs], 4, "or the missing jobs and the same command without --shard"),
    ):
        assert run(*words) == status and message in capsys.readouterr().err
    for out in (jobs, one):
        assert run(*command, "--out", out) == 0
    assert tree(jobs) == tree(one)
