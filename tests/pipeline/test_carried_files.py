"""``--with-metadata``: ``metadata/`` and the other side of a root go along with aligned rows."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.kill_and_resume import child, tree

from realign_fast import Corpus
from realign_fast.cli import main
from realign_fast.pipeline import carried_files, plan
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.plan import plan_align, plan_unify
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.unify_run import SpaceSides
from realign_fast.pipeline.verify import verify
from realign_fast.storage import atomic

SETTINGS = Settings(progress=False, with_metadata=True)
CARRIED = ["img_emb/img_emb_0.npy", "img_emb/img_emb_1.npy"]
CARRIED += ["metadata/metadata_0.parquet", "metadata/metadata_1.parquet"]


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("text_emb", "img_emb", "metadata"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    for number, count in enumerate((30, 20)):
        for shift, side in enumerate(("text", "img")):
            rows = (generator.standard_normal((count, 16)) + shift).astype("f2")
            np.save(tmp_path / f"root/{side}_emb/{side}_emb_{number}.npy", rows)
        ids = pa.table({"id": [f"{number}-{row}" for row in range(count)]})
        pq.write_table(ids, tmp_path / f"root/metadata/metadata_{number}.parquet")
    return tmp_path / "root"


def run(command, root, out, *options, image=None):
    paths = "--text", str(root), "--image", str(image or root), "--out", str(out)
    return main.main([command, *paths, "--with-metadata", "--quiet", *options])


def test_a_result_has_the_folders_of_an_index_of_both_sides(root, tmp_path):
    """As ``clip-retrieval index`` pairs them: the files of each folder in the order of names."""
    out = tmp_path / "out"
    align(root, root, out, SETTINGS)
    tables = [pq.read_table(path) for path in sorted((out / "metadata").iterdir())]
    for side, rows_of in (("text", out), ("img", root)):
        paths = sorted((out / f"{side}_emb").iterdir())
        assert [len(np.load(path)) for path in paths] == [table.num_rows for table in tables]
        expected = Corpus(rows_of, "text" if side == "text" else "image").take(range(50)).numpy()
        assert np.array_equal(np.concatenate([np.load(path) for path in paths]), expected)
    ids = [f"{n}-{row}" for n, count in enumerate((30, 20)) for row in range(count)]
    assert pa.concat_tables(tables)["id"].to_pylist() == ids
    manifest = json.loads((out / "__realign__/manifest.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == CARRIED
    assert all((out / name).samefile(root / name) for name in CARRIED)
    assert verify(out) == ({"shards": 2, "rows": 50, "statistics": 8, "files": 4}, [])


def test_a_second_run_keeps_them_and_a_changed_source_replaces_its_own(
    root, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    align(root, root, out, SETTINGS)
    before = tree(out)
    with monkeypatch.context() as patch:
        patch.setattr(carried_files, "file_digest", None)  # nothing is read or written again
        patch.setattr(carried_files, "_place", None)
        align(root, root, out, SETTINGS)
    assert tree(out) == before
    for mode in ("incremental", "overwrite", "incremental"):  # without the option they stay
        align(root, root, out, Settings(progress=False, mode=mode))
        assert tree(out) == before
    (root / CARRIED[0]).unlink()
    np.save(root / CARRIED[0], np.load(out / CARRIED[0])[::-1])
    os.utime(root / CARRIED[0], ns=(10**18, 10**18))
    align(root, root, out, SETTINGS)
    assert (out / CARRIED[0]).samefile(root / CARRIED[0]) and verify(out)[1] == []
    shutil.copy(root / CARRIED[0], tmp_path / "copy")
    os.replace(tmp_path / "copy", out / CARRIED[1])
    (out / CARRIED[2]).unlink()
    np.save(out / "img_emb/img_emb_2.npy", np.zeros((3, 16), "f2"))
    assert main.main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    messages = [
        "_1.npy: has blake2b",
        "_0.parquet: missing",
        "_2.npy: is a shard that the manifest",
    ]
    assert [message in line for line, message in zip(lines, messages, strict=False)] == [True] * 3
    assert len(lines) == 4 and "4 files checked, 3 faults" in lines[3]


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_killed_run_is_continued(root, tmp_path, cut):
    out, place, calls = tmp_path / "out", carried_files._place, []

    def kill_at(source, target):
        calls.append(target)
        if len(calls) == cut:
            os.kill(os.getpid(), signal.SIGKILL)
        return place(source, target)

    def killed():
        carried_files._place = kill_at
        align(root, root, out, SETTINGS)

    _, status = os.waitpid(child(killed), 0)
    assert os.WIFSIGNALED(status) and not (out / "__realign__/manifest.json").exists()
    assert sum((out / name).exists() for name in CARRIED) == cut - 1
    align(root, root, out, SETTINGS)
    align(root, root, tmp_path / "clean", SETTINGS)
    assert tree(out) == tree(tmp_path / "clean")


def test_what_a_killed_run_left_beside_its_files_is_removed(root, tmp_path):
    """Killed when a file had its name already, and its temporary folder was still there."""
    out = tmp_path / "out"

    def killed():
        atomic._sync = lambda path: path.name == "img_emb" and os.kill(os.getpid(), signal.SIGKILL)
        align(root, root, out, SETTINGS)

    _, status = os.waitpid(child(killed), 0)
    partial = out / "img_emb/.img_emb_0.npy.partial"
    assert os.WIFSIGNALED(status) and partial.is_dir() and (out / CARRIED[0]).exists()
    align(root, root, out, SETTINGS)
    assert sorted(path.name for path in (out / "img_emb").iterdir()) == [
        "img_emb_0.npy",
        "img_emb_1.npy",
    ]


@pytest.mark.parametrize("place", ["/dev/shm", "memory://"])
def test_other_file_systems_and_buckets_get_copies(root, tmp_path, place):
    if place == "memory://":
        import fsspec

        out, read = "memory://bucket/carried", fsspec.filesystem("memory").cat_file
    else:
        folder = Path(tempfile.mkdtemp(dir=place))
        assert folder.stat().st_dev != root.stat().st_dev, "choose another file system"
        out, read = str(folder / "out"), lambda path: Path(path).read_bytes()
    try:
        for _ in range(2):
            align(root, root, out, SETTINGS)
            assert [read(f"{out}/{name}") for name in CARRIED] == [
                (root / name).read_bytes() for name in CARRIED
            ]
            assert verify(out)[1] == []
        assert (root / CARRIED[0]).stat().st_nlink == 1
    finally:
        if place != "memory://":
            shutil.rmtree(folder)


@pytest.mark.parametrize("mode", ["incremental", "overwrite"])
def test_nothing_of_others_is_replaced(root, tmp_path, capsys, mode):
    """Neither rows of unify, whose run ended or was killed, nor a file of the user."""
    options = "--mode", mode
    assert run("unify", root, tmp_path / "space") == 0
    shutil.copytree(tmp_path / "space", tmp_path / "killed")
    (tmp_path / "killed/__realign__/manifest.json").unlink()
    (tmp_path / "mine/metadata").mkdir(parents=True)
    (tmp_path / "mine" / CARRIED[3]).write_bytes(b"mine")
    for name, message in (
        ("space", "img_emb_0.npy: is not " if mode == "overwrite" else "holds the result of an"),
        ("killed", "img_emb_0.npy: is not " if mode == "overwrite" else "holds the result of an"),
        ("mine", "metadata_1.parquet: is not "),
    ):
        before = tree(tmp_path / name)
        assert run("align", root, tmp_path / name, *options) == 2
        assert message in capsys.readouterr().err
        assert tree(tmp_path / name) == before


def test_metadata_of_two_roots_do_not_become_one(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "other")
    pq.write_table(pa.table({"id": ["x"] * 30}), tmp_path / "other/metadata/metadata_0.parquet")
    assert run("unify", root, tmp_path / "out", image=tmp_path / "other") == 2
    assert "would both become metadata/metadata_0.parquet" in capsys.readouterr().err


def test_the_other_side_is_the_one_that_the_map_was_fitted_to(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "other")
    for more in ((), ("--dry-run",)):
        assert run("align", root, tmp_path / "out", *more, image=tmp_path / "other") == 2
        message = f"{root}/img_emb would go along, but the rows move to {tmp_path}/other"
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "link").symlink_to(root)
    assert run("align", root, tmp_path / "out", image=tmp_path / "link/img_emb") == 0
    shutil.rmtree(root / "img_emb")  # nothing goes along that the map was not fitted to
    assert run("align", root, tmp_path / "text", image=tmp_path / "other") == 0
    assert sorted(path.name for path in (tmp_path / "text").iterdir() if path.name[0] != "_") == [
        "metadata",
        "text_emb",
    ]


@pytest.mark.parametrize("mode", ["incremental", "overwrite"])
def test_a_file_that_left_the_source_does_not_stay_in_the_output(root, tmp_path, capsys, mode):
    out, options = tmp_path / "out", ("--mode", mode)
    assert run("align", root, out) == 0
    (root / CARRIED[3]).unlink()
    if mode == "incremental":  # where the output may hold the last link to the file
        before = tree(out)
        assert run("align", root, out, *options) == 2
        message = f"{out / CARRIED[3]}: went along with an earlier run, and {root} has it no more; "
        assert f"{message}remove {out / CARRIED[3]}, or" in capsys.readouterr().err
        assert tree(out) == before
        (out / CARRIED[3]).unlink()
    assert run("align", root, out, *options) == 0
    assert run("align", root, tmp_path / "clean") == 0
    assert tree(out) == tree(tmp_path / "clean") and not (out / CARRIED[3]).exists()


@pytest.mark.parametrize("mode", ["incremental", "overwrite"])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_root_that_lost_a_shard(root, tmp_path, capsys, mode, with_metadata):
    """The message names all that is to be removed, and after that the run is that of the rest."""
    out = tmp_path / "out"
    assert run("align", root, out) == 0
    for path in root.glob("*/*_1.*"):
        path.unlink()
    paths = "--text", str(root), "--image", str(root), "--out", str(out), "--quiet", "--mode", mode
    assert main.main(["align", *paths, *["--with-metadata"] * with_metadata]) == 2
    lost = [str(out / name) for name in ("text_emb/text_emb_1.npy", CARRIED[1], CARRIED[3])]
    message = capsys.readouterr().err
    assert f"{lost[0]}: is no shard that {root} becomes" in message
    assert f"remove what the source has no more ({', '.join(lost)}), or" in message
    for name in lost:
        os.unlink(name)
    assert run("align", root, out, "--mode", mode) == 0
    assert verify(out) == ({"shards": 1, "rows": 30, "statistics": 4, "files": 2}, [])


@pytest.mark.parametrize("command", ["align", "unify"])
def test_a_plan_counts_the_files_that_will_be_copied(root, tmp_path, monkeypatch, command):
    carried = CARRIED if command == "align" else CARRIED[2:]
    total = sum((root / name).stat().st_size for name in carried)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    corpora = Corpus(root, "text"), Corpus(root, "image")

    def steps(out, **options):
        settings = Settings(progress=False, **options)
        if command == "align":
            return plan_align(*corpora, out, settings)
        sides = SpaceSides(dict(zip(("text", "image"), corpora, strict=True)))
        return plan_unify(sides, out, settings)

    def added(out, mode="incremental"):
        last = [steps(out, mode=mode, with_metadata=more)[-1] for more in (True, False)]
        names = "bytes_read", "bytes_written", "requests"
        return [last[0][name] - last[1][name] for name in names]

    try:
        assert added(tmp_path / "out") == [0, 0, 0]  # they are links
        assert added(folder / "out") == [total, total, 0]
        monkeypatch.setattr(plan, "UPLOAD_BYTES", 600)
        requests = sum(-(-(root / name).stat().st_size // 600) for name in carried)
        assert added("memory://bucket/planned") == [total, total, requests]
        assert run(command, root, folder / "out") == 0
        assert added(folder / "out") == [0, 0, 0]
        assert added(folder / "out", "overwrite") == [total, total, 0]
    finally:
        shutil.rmtree(folder)


def test_a_job_array_brings_them_along_at_its_end(root, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("align", root, whole) == 0
    for side in ("--text", "--image"):
        assert main.main(["stats", side, str(root), "--out", str(out), "--quiet"]) == 0
    sides = "--text", str(root), "--image", str(root), "--out", str(out), "--quiet"
    assert main.main(["merge", *sides, "--after", "statistics"]) == 0
    drift = "--aligner", str(out), "--text", str(root), "--out", str(out), "--quiet"
    assert main.main(["stats", *drift]) == 0
    assert main.main(["merge", *sides, "--after", "drift"]) == 0
    capsys.readouterr()
    assert main.main(["apply", *drift[:-1], "--shard", "1/2", "--with-metadata"]) == 0
    assert "merge --with-metadata" in capsys.readouterr().out
    assert main.main(["apply", *drift, "--shard", "2/2"]) == 0
    assert not (out / "img_emb").exists()
    assert main.main(["merge", *sides, "--with-metadata"]) == 0
    assert tree(out) == tree(whole)
