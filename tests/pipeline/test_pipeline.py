"""The pipeline end to end: files in, files out, against a float64 oracle; no half is ever left."""

import errno
import json
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import programs

from realign_fast import Corpus, ReAlign
from realign_fast.corpus import ShardWriter
from realign_fast.moments import Moments
from realign_fast.pipeline.align_run import AlignRun, align, align_work
from realign_fast.pipeline.plan import plan
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.shard_tasks import ShardTask
from realign_fast.storage.paths import output_path

QUIET = Settings(progress=False)
D = 24
SHARDS = (300, 1, 0, 517)  # one of a single row, one of none
# A result is rounded once to its dtype; entries of unit rows are below 1.
TOLERANCE = {"f2": 2.0**-11, "f4": 2.0**-23, "f8": 1e-14}


def oracle(source, target):
    """Section 4 of arXiv 2602.07026 in float64: what the rows become, and numbers on the way."""

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    u, v = unit(source.astype("f8")), unit(target.astype("f8"))
    mu_y, mu_x = u.mean(0), v.mean(0)
    trace_y, trace_x = ((u - mu_y) ** 2).sum() / len(u), ((v - mu_x) ** 2).sum() / len(v)
    scale = np.sqrt(trace_x / trace_y)
    half = unit(mu_x + scale * (u - mu_y))
    result = unit(half - half.mean(0) + mu_x)
    return result, {
        "scale": scale,
        "source_trace": trace_y,
        "target_trace": trace_x,
        "centroid_gap": np.linalg.norm(mu_x - mu_y),
        "drift": np.linalg.norm(mu_x - half.mean(0)),
        "residual_gap": np.linalg.norm(mu_x - result.mean(0)),
    }


def rows_of(count, seed, dtype="f4"):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((count, D)) + generator.standard_normal(D)).astype(dtype)


def write_corpus(folder, rows, sizes=SHARDS):
    folder.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1])):
        np.save(folder / f"emb_{index}.npy", part)
    return folder


def read_corpus(folder):
    return Corpus(folder).take(range(len(Corpus(folder)))).numpy()


@pytest.fixture
def corpora(tmp_path):
    """Two corpora on disk: ``(text folder, image folder, text rows, image rows)``."""
    text, image = rows_of(sum(SHARDS), 1), rows_of(400, 2)
    folders = write_corpus(tmp_path / "text", text), write_corpus(tmp_path / "image", image, [400])
    return *folders, text, image


def plan_align(source, target, out, settings):
    out = output_path(out)
    return plan(align_work(source, target, out, settings))


def names(folder):
    """The names of the files of an output, without those for resuming (test_resume.py)."""
    records = folder / "__realign__"
    files = {path.name for place in (folder, records) for path in place.iterdir()}
    return sorted(files - {"__realign__", "_stats", "manifest.json"})


def contents(folder):
    """Bytes by name of what a run must reproduce: every shard and every tensor of the aligner."""
    shards = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    tensors = load_file(folder / "__realign__/aligner.safetensors")
    return shards | {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_flat_corpora_match_the_oracle(tmp_path, dtype):
    text, image = rows_of(sum(SHARDS), 1, dtype), rows_of(400, 2, dtype)
    source = write_corpus(tmp_path / "text", text)
    target = write_corpus(tmp_path / "image", image, [400])
    report = align(source, target, tmp_path / "out", QUIET)
    expected, numbers = oracle(text, image)
    aligned = read_corpus(tmp_path / "out")
    assert aligned.dtype == np.dtype(dtype)
    np.testing.assert_allclose(aligned.astype("f8"), expected, rtol=0, atol=TOLERANCE[dtype])
    for name, value in numbers.items():
        assert report["fitted"][name] == pytest.approx(value, abs=1e-6), name
    shards = [f"emb_{index}.npy" for index in range(4)]
    assert names(tmp_path / "out") == ["aligner.safetensors", *shards, "report.json"]
    assert [len(np.load(tmp_path / "out" / name)) for name in shards] == list(SHARDS)


def test_a_clip_retrieval_root_gives_both_sides_and_its_layout(tmp_path):
    text, image = rows_of(sum(SHARDS), 1, "f2"), rows_of(sum(SHARDS), 2, "f2")
    write_corpus(tmp_path / "root" / "text_emb", text)
    write_corpus(tmp_path / "root" / "img_emb", image)
    report = align(tmp_path / "root", tmp_path / "root", tmp_path / "out", QUIET)
    aligned = read_corpus(tmp_path / "out" / "text_emb")
    np.testing.assert_allclose(aligned.astype("f8"), oracle(text, image)[0], atol=TOLERANCE["f2"])
    assert names(tmp_path / "out") == ["aligner.safetensors", "report.json", "text_emb"]
    assert report["target"]["rows"] == sum(SHARDS)


def test_a_single_file_and_other_dtypes_on_the_two_sides(tmp_path):
    text, image = rows_of(50, 1, "f8"), rows_of(60, 2, "f2")
    np.save(tmp_path / "text.npy", text)
    np.save(tmp_path / "image.npy", image)
    align(tmp_path / "text.npy", tmp_path / "image.npy", tmp_path / "out", QUIET)
    aligned = np.load(tmp_path / "out" / "text.npy")
    # The kernel sums fp16 rows in fp32, so the mean of the images is good to 1e-7.
    np.testing.assert_allclose(aligned, oracle(text, image)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("trap", ["path", "object", "file of it", "hard link", "both", "copy"])
def test_one_side_given_twice_is_refused(corpora, tmp_path, trap):
    source, image, *_ = corpora
    other = tmp_path / "other"
    other.mkdir()
    target = {"path": source, "object": Corpus(source), "file of it": source / "emb_3.npy"}
    if trap == "hard link":
        os.link(source / "emb_0.npy", other / "x.npy")
    elif trap == "both":  # a folder that has the shards of both sides
        for number, path in enumerate((source / "emb_0.npy", image / "emb_0.npy")):
            (other / f"{number}.npy").symlink_to(path)
    elif trap == "copy":
        shutil.copytree(source, other, copy_function=shutil.copyfile, dirs_exist_ok=True)
    sides = (target["object"] if trap == "object" else source), target.get(trap, other)
    message = "the two are one side" if trap == "copy" else "is in both sides"
    with pytest.raises(ValueError, match=message):
        align(*sides, tmp_path / "out", QUIET)
    if trap != "copy":
        with pytest.raises(ValueError, match=message):
            plan_align(*map(as_corpus, sides), tmp_path / "out", QUIET)


def as_corpus(side):
    return side if isinstance(side, Corpus) else Corpus(side)


def test_the_report_is_what_the_files_say(corpora, tmp_path):
    source, target, text, image = corpora
    returned = align(source, target, tmp_path / "out", QUIET)
    report = json.loads((tmp_path / "out" / "__realign__/report.json").read_text())
    assert report == returned
    assert set(report) == {"source", "target", "result", "bad_rows", "fitted", "passes"} | {
        "peak_memory_bytes",
        "threads",
        "kernels",
        "versions",
        "device",
        "fitted_on",
        "sample",
    }
    assert report["fitted_on"] == "every row" and report["sample"] is None
    assert report["source"] == {
        "path": str(source),
        "shards": 4,
        "rows": len(text),
        "dimension": D,
        "dtype": "float32",
        "bytes": text.nbytes,
    }
    result = read_corpus(tmp_path / "out").astype("f8")
    target_mean = (image / np.linalg.norm(image, axis=1, keepdims=True)).astype("f8").mean(0)
    gap = np.linalg.norm(result.mean(0) - target_mean)
    trace = ((result - result.mean(0)) ** 2).sum() / len(result)
    assert report["result"] == pytest.approx({"centroid_gap": gap, "trace": trace}, abs=1e-6)
    assert report["result"]["centroid_gap"] == report["fitted"]["residual_gap"]
    passes = {done["name"]: done for done in report["passes"]}
    assert list(passes) == ["source moments", "target moments", "source drift", "apply"]
    assert passes["target moments"]["rows"] == 400
    assert passes["apply"]["bytes_read"] == passes["apply"]["bytes_written"] == text.nbytes
    assert passes["source drift"]["bytes_written"] == 0
    for done in passes.values():
        moved = done["bytes_read"] + done["bytes_written"]
        assert done["gb_per_second"] == pytest.approx(moved / done["seconds"] / 1e9)
        assert done["rows_per_second"] == pytest.approx(done["rows"] / done["seconds"])
    loaded = ReAlign.load(tmp_path / "out" / "__realign__/aligner.safetensors")
    assert loaded.record == report["fitted"]


def with_bad_rows(rows):
    """Rows with a zero row, a NaN and an infinity, in shards 0 and 3; and the places of each."""
    rows = rows.copy()
    rows[[3, 310]], rows[7, 2], rows[800, 0] = 0, np.nan, -np.inf
    return rows, [3, 310], [7, 800]


def test_skipped_rows_keep_their_places_as_zeros(corpora, tmp_path):
    _, target, text, image = corpora
    bad, zero, nonfinite = with_bad_rows(text)
    source = write_corpus(tmp_path / "bad", bad)
    settings = Settings(bad_rows="skip", batch_bytes=100 * D * 4, progress=False)
    report = align(source, target, tmp_path / "out", settings)
    aligned, good = read_corpus(tmp_path / "out"), np.setdiff1d(range(len(text)), zero + nonfinite)
    np.testing.assert_allclose(aligned[good], oracle(text[good], image)[0], atol=TOLERANCE["f4"])
    assert not aligned[zero + nonfinite].any()
    for done in report["passes"]:
        expected = (0, 0) if done["name"] == "target moments" else (2, 2)
        assert (done["zero_rows"], done["nonfinite_rows"]) == expected
    assert report["fitted"]["source_count"] == len(good)
    assert report["bad_rows"] == "skip"


def test_kept_rows_count_zeros_as_data_and_become_nan_elsewhere(corpora, tmp_path):
    _, target, text, image = corpora
    bad, zero, nonfinite = with_bad_rows(text)
    source = write_corpus(tmp_path / "bad", bad)
    report = align(source, target, tmp_path / "out", Settings(bad_rows="keep", progress=False))
    aligned, finite = read_corpus(tmp_path / "out"), np.setdiff1d(range(len(text)), nonfinite)
    assert np.isnan(aligned[nonfinite]).all()
    assert report["fitted"]["source_count"] == len(finite)
    # u = 0 counts in the mean, and in the trace as E|u|^2 - |mu|^2; it goes where unit(b) + h goes.
    u = bad[finite].astype("f8")
    u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-300)
    v = image.astype("f8") / np.linalg.norm(image.astype("f8"), axis=1, keepdims=True)
    traces = [(w**2).sum(1).mean() - (w.mean(0) ** 2).sum() for w in (u, v)]
    z = v.mean(0) + np.sqrt(traces[1] / traces[0]) * (u - u.mean(0))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    z += v.mean(0) - z.mean(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(aligned[finite], z, atol=TOLERANCE["f4"])
    assert np.isfinite(aligned[zero]).all()


def test_a_corpus_without_a_usable_row_cannot_be_fitted_on(corpora, tmp_path):
    source, target, *_ = corpora
    empty = write_corpus(tmp_path / "zeros", np.zeros((5, D), "f4"), [5])
    skip = Settings(bad_rows="skip", progress=False)
    for pair in ((empty, target), (source, empty)):
        with pytest.raises(ValueError, match=r"zeros: no usable row \(5 zero, 0 non-finite"):
            align(*pair, tmp_path / "out", skip)
    assert names(tmp_path / "out") == []


def test_apply_refuses_a_bad_row_in_the_middle_and_keeps_finished_shards(corpora, tmp_path):
    source, target, text, image = corpora
    run, out = AlignRun(QUIET), tmp_path / "out"
    aligner = run.fit(Corpus(source), Corpus(target))
    bad = text.copy()
    bad[301 + 400] = 0
    write_corpus(source, bad)
    small = AlignRun(Settings(progress=False, batch_bytes=50 * D * 4))
    with pytest.raises(ValueError, match=r"emb_3\.npy: row 400 is zero"):
        small.apply(aligner, Corpus(source), out)
    assert names(out) == ["aligner.safetensors", "emb_0.npy", "emb_1.npy", "emb_2.npy"]
    expected = oracle(text, image)[0][:300]
    np.testing.assert_allclose(np.load(out / "emb_0.npy"), expected, atol=TOLERANCE["f4"])


def test_no_write_is_in_flight_when_a_shard_is_given_up(corpora, tmp_path, monkeypatch):
    """A slow disk, and a bad row while it still writes: the file closes after the last write."""
    source, target, text, _ = corpora
    aligner = AlignRun(QUIET).fit(Corpus(source), Corpus(target))
    text[160] = 0
    write_corpus(source, text)
    log, write, leave = [], ShardWriter.write, ShardWriter.__exit__

    def slow_write(self, rows):
        time.sleep(0.05)
        write(self, rows)
        log.append("written")

    monkeypatch.setattr(ShardWriter, "write", slow_write)
    monkeypatch.setattr(ShardWriter, "__exit__", lambda *a: (log.append("closed"), leave(*a))[1])
    run = AlignRun(Settings(progress=False, batch_bytes=50 * D * 4))
    with pytest.raises(ValueError, match="row 160 is zero"):
        run.apply(aligner, Corpus(source), tmp_path / "out")
    assert log == ["written"] * 3 + ["closed"]
    assert names(tmp_path / "out") == ["aligner.safetensors"]


def test_a_buffer_is_not_reused_before_it_is_written(corpora, tmp_path, monkeypatch):
    source, target, text, image = corpora
    write = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", lambda *a: (time.sleep(0.005), write(*a))[1])
    align(source, target, tmp_path / "out", Settings(progress=False, batch_bytes=20 * D * 4))
    expected = oracle(text, image)[0]
    np.testing.assert_allclose(read_corpus(tmp_path / "out"), expected, atol=TOLERANCE["f4"])


@pytest.mark.parametrize("batch", [1, 7])
def test_a_full_disk_is_one_error_and_leaves_no_half(corpora, tmp_path, batch):
    """The system's own limit on file sizes stands for the disk: the writer's thread meets EFBIG."""
    source, target, *_ = corpora
    aligner = AlignRun(QUIET).fit(Corpus(source), Corpus(target))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"emb_0\.npy.*disk has room"):
            AlignRun(Settings(progress=False, batch_bytes=batch * D * 4)).apply(
                aligner, Corpus(source), tmp_path / "out"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "out") == ["aligner.safetensors"]


def test_a_failed_run_leaves_no_report_and_a_rerun_mends_it(corpora, tmp_path, monkeypatch):
    source, target, *_ = corpora
    out = tmp_path / "out"
    align(source, target, out, QUIET)
    before = contents(out)
    write = ShardWriter.write

    def interrupted(self, rows):
        if self.path.name == "emb_3.npy":
            raise KeyboardInterrupt
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            align(source, target, out, Settings(progress=False, method="mean-shift"))
    assert "report.json" not in names(out)
    assert not [name for name in names(out) if name.endswith(".partial")]
    align(source, target, out, QUIET)
    assert contents(out) == before


def test_apply_brings_the_aligner_it_used(corpora, tmp_path):
    source, target, *_ = corpora
    align(source, target, tmp_path / "out", QUIET)
    reverse = AlignRun(QUIET).fit(Corpus(target), Corpus(source))
    AlignRun(QUIET).apply(reverse, Corpus(source), tmp_path / "out")
    assert ReAlign.load(tmp_path / "out" / "__realign__/aligner.safetensors").scale == reverse.scale


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_threads(corpora, tmp_path, threads):
    source, target, *_ = corpora
    before = torch.get_num_threads()
    align(source, target, tmp_path / "out", QUIET)
    torch.set_num_threads(threads)
    try:
        align(source, target, tmp_path / "again", QUIET)
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_killed_run_leaves_only_whole_shards_and_a_rerun_gives_the_same_bytes(tmp_path):
    rows = rows_of(60_000, 1)
    source = write_corpus(tmp_path / "text", rows, [20_000] * 3)
    target = write_corpus(tmp_path / "image", rows_of(400, 2), [400])
    align(source, target, tmp_path / "clean", QUIET)
    slow = (
        "import sys, time\nfrom realign_fast import corpus, pipeline\n"
        "write = corpus.ShardWriter.write\n"
        "corpus.ShardWriter.write = lambda *a: (time.sleep(0.02), write(*a))\n"
        "pipeline.align(*sys.argv[1:], pipeline.Settings(batch_bytes=1 << 16, progress=False))\n"
    )
    out = tmp_path / "out"
    process = programs.Program(["-W", "ignore", "-c", slow, source, target, out])
    try:
        while not (out / "emb_0.npy").exists() and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    complete = [name for name in names(out) if name.endswith(".npy") and name[0] != "."]
    assert "emb_0.npy" in complete and len(complete) < 3 and "report.json" not in names(out)
    assert all(np.load(out / name).shape == (20_000, D) for name in complete)
    align(source, target, out, QUIET)
    assert names(out) == names(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")


def refused(out, source, target, match, error=ValueError):
    with pytest.raises(error, match=match):
        align(source, target, out, QUIET)


def test_an_output_that_is_an_input_is_refused(corpora, tmp_path):
    source, target, *_ = corpora
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "links").mkdir()
    for path in source.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    before = {path: path.read_bytes() for path in (*source.iterdir(), *target.iterdir())}
    for out in (source, target, tmp_path / "link", source / ".." / "text"):
        refused(out, source, target, "holds rows that are read; give another --out")
    refused(tmp_path / "links", tmp_path / "links", target, "holds rows that are read")
    refused(source, tmp_path / "links", target, "holds rows that are read")
    assert before == {path: path.read_bytes() for path in before}
    assert os.listdir(target) == ["emb_0.npy"] and len(os.listdir(source)) == len(SHARDS)


def test_checkpoints_are_not_written_through_a_link(corpora, tmp_path):
    source, target, *_ = corpora
    for number, (name, place) in enumerate((("", source), ("", target), ("apply", tmp_path))):
        link = tmp_path / f"out-{number}" / "__realign__/_stats" / name
        link.parent.mkdir(parents=True)
        link.symlink_to(place)
        refused(tmp_path / f"out-{number}", source, target, "_stats.* is a link to .*; remove it")
    assert os.listdir(target) == ["emb_0.npy"] and len(os.listdir(source)) == len(SHARDS)


def test_an_output_inside_a_source_is_refused(corpora, tmp_path):
    source, target, *_ = corpora
    for out in (source / "aligned", target / "a" / "b", tmp_path / "x" / ".." / "text" / "a"):
        refused(out, source, target, "holds rows that are read; give another --out")
    assert not (source / "aligned").exists()
    align(source / "emb_0.npy", target, source / "aligned", QUIET)  # a file is no folder of shards
    assert (source / "aligned" / "emb_0.npy").exists()


def test_a_result_is_not_replaced_by_another_source_of_the_same_names(corpora, tmp_path):
    """Shards of many corpora are called train-00000-of-00003; a moved corpus is the same one."""
    text, image, *_ = corpora
    out = tmp_path / "out"
    align(text, image, out, QUIET)
    before = {path.name: path.read_bytes() for path in out.glob("*.npy")}
    other = tmp_path / "other"
    shutil.copytree(text, other)  # with the times of its files
    align(other, image, out, QUIET)
    another = tmp_path / "another"
    another.mkdir()
    for path in text.glob("*.npy"):
        np.save(another / path.name, -np.load(path))
    with pytest.raises(
        ValueError,
        match=r"out: holds the result of .*other/emb_0\.npy and 3 other shards, .*remove",
    ):
        align(another, image, out, QUIET)
    with pytest.raises(ValueError, match="out: holds the result of"):
        plan_align(Corpus(another), Corpus(image), out, QUIET)
    assert before == {path.name: path.read_bytes() for path in out.glob("*.npy")}


def test_an_output_with_other_shards_is_refused(corpora, tmp_path):
    source, target, *_ = corpora
    out = tmp_path / "out"
    out.mkdir()
    (out / "emb_9.npy").write_bytes(b"kept")
    refused(out, source, target, r"emb_9\.npy: is no shard that .*text becomes")
    other = tmp_path / "other"
    other.mkdir()
    (other / "emb_0.npy").write_bytes(b"kept")  # a name that ours would take
    refused(other, source, target, r"emb_0\.npy: would be replaced, but .*other has no manifest")
    assert (other / "emb_0.npy").read_bytes() == b"kept"
    root = tmp_path / "root"
    root.mkdir()
    source.rename(root / "text_emb")
    refused(root, root / "text_emb", target, "text_emb.*emb_0.npy: is no shard")
    assert (out / "emb_9.npy").read_bytes() == b"kept"


def test_an_output_that_cannot_be_written_is_refused_before_reading(corpora, tmp_path, monkeypatch):
    source, target, *_ = corpora
    monkeypatch.setattr(AlignRun, "fit", lambda *a: pytest.fail("rows were read"))
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", source, target, "file: is a file, and --out is a directory", OSError)
    refused(tmp_path / "file" / "out", source, target, "file.*: Not a directory", OSError)
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "loop", tmp_path / "loop" / "out"):
        refused(out, source, target, "loop.*: Too many levels of symbolic links", OSError)
    (tmp_path / "old").mkdir()
    for place in ("old/_stats", "old/__realign__"):
        (tmp_path / place).write_text("")
        refused(tmp_path / "old", source, target, f"{place}.*: (File exists|Not a dir)", OSError)
        (tmp_path / place).unlink()


def test_columns_that_differ_are_refused(corpora, tmp_path):
    source, target, *_ = corpora
    np.save(tmp_path / "wide.npy", np.ones((5, D + 1), "f4"))
    refused(tmp_path / "out", source, tmp_path / "wide.npy", "text: rows have 24 columns, in .* 25")
    aligner = AlignRun(QUIET).fit(Corpus(source), Corpus(target))
    with pytest.raises(ValueError, match=r"wide\.npy: rows have 25 columns, the aligner 24"):
        AlignRun(QUIET).apply(aligner, Corpus(tmp_path / "wide.npy"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def peak_memory(root, rows):
    """Peak memory in bytes of a process that aligns ``rows`` rows."""
    folder = root / str(rows)
    folder.mkdir()
    block = np.random.default_rng(0).standard_normal((8192, 512)).astype("f2")
    header = {"descr": "<f2", "fortran_order": False, "shape": (rows, 512)}
    with open(folder / "emb_0.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(rows // len(block)):
            file.write(block.data)
    command = ["-W", "ignore", "-m", "realign_fast", "align", "--quiet"]
    out = root / f"{rows}-out"
    np.save(root / "target.npy", block + 0.5)
    paths = ["--source", folder, "--target", root / "target.npy", "--out", out]
    ran = programs.run(*command, *paths)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((out / "__realign__/report.json").read_text())
    for path in (folder / "emb_0.npy", out / "emb_0.npy"):
        path.unlink()
    return report["peak_memory_bytes"]


def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    # 256 and 512 MiB: both are more than what is mapped ahead of its use (112 MiB).
    small, large = peak_memory(tmp_path, 1 << 18), peak_memory(tmp_path, 1 << 19)
    assert large - small < 30 << 20, f"{small >> 20} MiB, then {large >> 20} MiB"


def test_a_shard_is_synced_while_the_next_is_computed(corpora, tmp_path, monkeypatch):
    source, target, *_ = corpora
    order, sync, write = [], os.fsync, ShardTask.read

    def slow(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".emb_0.npy.partial"):
            time.sleep(0.5)
            order.append("synced")
        sync(descriptor)

    def noted(work, index, *arguments):
        order.append(f"shard {index}")
        return write(work, index, *arguments)

    aligner = AlignRun(QUIET).fit(Corpus(source), Corpus(target))
    monkeypatch.setattr(ShardTask, "read", noted)
    monkeypatch.setattr(os, "fsync", slow)
    AlignRun(QUIET).apply(aligner, Corpus(source), tmp_path / "out")
    assert order.index("shard 1") < order.index("synced")


def test_a_sync_that_fails_is_the_error_and_other_shards_are_whole(corpora, tmp_path, monkeypatch):
    source, target, *_ = corpora
    aligner = AlignRun(QUIET).fit(Corpus(source), Corpus(target))
    AlignRun(QUIET).apply(aligner, Corpus(source), tmp_path / "whole")
    sync = os.fsync

    def failing(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".emb_0.npy.partial"):
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            AlignRun(QUIET).apply(aligner, Corpus(source), tmp_path / "out")
    first, *later = sorted(path.name for path in (tmp_path / "whole").glob("*.npy"))
    written = sorted(path.name for path in (tmp_path / "out").glob("*.npy"))
    assert first not in written and written == later[: len(written)]
    assert not list((tmp_path / "out").glob(".*.partial"))
    AlignRun(QUIET).apply(aligner, Corpus(source), tmp_path / "out")
    for name in (first, *later):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("method", ["coral", "diagonal", "noise"])
def test_products_are_computed_once_and_give_the_same_rows_and_moments(
    tmp_path, monkeypatch, method, dtype
):
    """Of four batches one has bad rows, which is mapped again."""
    generator = np.random.default_rng(3)
    rows = torch.from_numpy(generator.standard_normal((64, D)) + 0.5).to(getattr(torch, dtype))
    rows[40], rows[41, 2] = 0, torch.nan
    save_file({"embedding": rows}, tmp_path / "text.safetensors")
    spread = 0.2 + np.arange(D) / D
    sides = torch.from_numpy(generator.standard_normal((2, 300, D)) * spread + 0.2)
    aligner = ReAlign.fit(*sides, method=method)
    settings = Settings("keep", 16 * rows.itemsize * D, progress=False)
    calls, forward = [], ReAlign.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            ReAlign, "forward", lambda *a, **b: calls.append(len(a[1])) or forward(*a, **b)
        )
        source = Corpus(tmp_path / "text.safetensors")
        moments = AlignRun(settings).apply(aligner, source, tmp_path / "out")
    assert calls.count(16) == 1
    expected = torch.empty_like(rows)
    aligner(rows, out=expected)
    result = Corpus(tmp_path / "out").take(range(64))
    assert result.view(torch.uint8).equal(expected.view(torch.uint8))
    measured = Moments()
    for batch in rows.split(16):
        measured.update(batch, through=aligner.row_map, bad_rows="keep")
    assert moments.mean.equal(measured.mean) and moments.trace == measured.trace
    assert (moments.count, moments.zero_rows, moments.nonfinite_rows) == (63, 1, 1)
