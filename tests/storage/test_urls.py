"""Corpora by URL: the bytes of the local run, little fetched, and what is said when it fails.

Every server is a real one on this machine: HTTP from the standard library (`far.py`), S3 by moto.
"""

import os
import pickle
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from support.far import web
from support.kill_and_resume import tree

from realign_fast import ReAlign
from realign_fast.cli import main
from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.corpus.format_registry import FORMATS
from realign_fast.pipeline.align_run import align, align_work
from realign_fast.pipeline.plan import plan
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify
from realign_fast.storage import url
from realign_fast.storage.paths import storage_path

fsspec = pytest.importorskip("fsspec")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

D, QUIET = 24, Settings(progress=False)


def write(folder, seed, sizes=(50, 1, 31), dtype="f2"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        np.save(
            folder / f"emb_{index}.npy", (generator.standard_normal((size, D)) + seed).astype(dtype)
        )
    return folder


@pytest.fixture
def corpora(tmp_path):
    """Folders of text and of images, in what the web server shows."""
    return write(tmp_path / "www/text", 1), write(tmp_path / "www/image", 2, (40, 9))


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("aiohttp")
    (tmp_path / "www").mkdir(exist_ok=True)
    with web(tmp_path / "www") as (address, state):
        yield address, state


def shards(out):
    """The bytes of what a run leaves, less what names its sources."""
    shards_by_name = {name: data for name, data in tree(out).items() if not name.endswith(".json")}
    return {
        name.rpartition("/")[2].split(".")[0] + Path(name).suffix: d
        for name, d in shards_by_name.items()
    }


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_bytes_of_the_local_run(form, tmp_path, corpora, served):
    for folder in corpora:
        convert(Corpus(folder), tmp_path / "www" / form / folder.name, form)
    how, names = {"allow_pickle": True}, (("text", "text"), ("image", "image"))
    near = [Corpus(tmp_path / "www" / form / name, **how) for name, _ in names]
    far = [Corpus(f"{served[0]}/{form}/{name}", **how) for name, _ in names]
    align(*near, tmp_path / "near", QUIET)
    align(*far, tmp_path / "far", QUIET)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")
    assert verify(tmp_path / "far")[1] == []


@pytest.mark.parametrize("form", ("npy", "parquet", "arrow-stream"))
def test_a_bucket_gives_the_bytes_of_the_local_run(form, tmp_path, corpora, bucket):
    for folder in corpora:
        convert(Corpus(folder), tmp_path / form / folder.name, form)
        bucket.put(str(tmp_path / form / folder.name), f"rows/{folder.name}", recursive=True)
    align(tmp_path / form / "text", tmp_path / form / "image", tmp_path / "near", QUIET)
    align("s3://rows/text", "s3://rows/image", tmp_path / "far", QUIET)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")


def test_a_fit_on_a_sample_takes_the_rows_of_the_local_one(tmp_path, corpora, served):
    settings = Settings(progress=False, fit_rows=30)
    align(*corpora, tmp_path / "near", settings)
    align(f"{served[0]}/text", f"{served[0]}/image", tmp_path / "far", settings)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")


def test_worker_processes_read_urls(tmp_path, corpora, served, engine):
    align(*corpora, tmp_path / "near", QUIET)
    address = served[0]
    settings = Settings(progress=False, workers=engine.workers)
    align(f"{address}/text", f"{address}/image", tmp_path / "far", settings, engine)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")


def test_the_command_line_reads_memory_of_its_process_and_files_by_url(tmp_path, corpora, capsys):
    text, image = corpora
    for path in image.iterdir():
        fsspec.filesystem("memory").pipe(f"/cli-image/{path.name}", path.read_bytes())
    inputs = ["--source", f"file://{text}", "--target", "memory://cli-image"]
    assert main.main(["align", *inputs, "--out", str(tmp_path / "out")]) == 0
    copy = str(tmp_path / "copy")
    assert main.main(["convert", "memory://cli-image", copy, "--to", "safetensors"]) == 0
    assert Corpus(copy).num_rows == 49
    with pytest.raises(SystemExit, match="2"):  # a result in memory would end with the command
        main.main(["align", *inputs, "--out", "memory://result"])
    assert "is memory of this process" in capsys.readouterr().err


def test_a_path_by_file_url_is_mapped():
    assert storage_path("file:///data/text") == Path("/data/text")


def test_a_clip_retrieval_root_and_its_pairs(tmp_path, served):
    write(tmp_path / "www/root/text_emb", 1, (5, 6))
    write(tmp_path / "www/root/img_emb", 2, (5, 7))
    with pytest.raises(ValueError, match=r"emb_1.npy: has 6 rows, .*img_emb/emb_1.npy has 7"):
        Corpus(f"{served[0]}/root", "text")


def test_opening_reads_headers_only(tmp_path, served):
    write(tmp_path / "www/big", 1, (90_000, 90_000))
    corpus = Corpus(f"{served[0]}/big")
    assert corpus.num_rows == 180_000
    assert sum(served[1].fetched(f"emb_{i}.npy") for i in (0, 1)) < 40_000


@pytest.mark.parametrize("form", ("parquet", "safetensors"))
def test_opening_a_format_fetches_a_small_part(form, tmp_path, served):
    write(tmp_path / "rows", 1, (130_000,))
    (path,) = convert(Corpus(tmp_path / "rows"), tmp_path / "www/big", form, batch_bytes=1 << 19)
    assert Corpus(f"{served[0]}/big").num_rows == 130_000
    assert served[1].fetched(path.name) < path.stat().st_size / 2


def test_rows_that_are_taken_are_fetched_alone(tmp_path, served):
    write(tmp_path / "www/big", 1, (90_000,))
    corpus, rows = Corpus(f"{served[0]}/big"), np.load(tmp_path / "www/big/emb_0.npy")
    before = served[1].fetched("emb_0.npy")
    ids = [89_999, 7, 50_000, 7, 8]
    assert np.array_equal(corpus.take(ids).numpy(), rows[ids])
    assert served[1].fetched("emb_0.npy") - before < 50_000


@pytest.mark.parametrize("codec", ["NONE", "SNAPPY"])
def test_a_sample_of_parquet_fetches_the_row_groups_of_its_rows(tmp_path, served, codec):
    """Other columns in between are not fetched, and the plan says how much is read."""
    rows = np.random.default_rng(1).standard_normal((40_000, D)).astype("f4")
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
    table = pa.table({"text": [os.urandom(60) for _ in rows], "embedding": embedding})
    options = {"row_group_size": 2_000, "compression": codec, "use_dictionary": False}
    for name in ("text", "image"):
        folder = tmp_path / "www" / f"parquet-{name}"
        folder.mkdir()
        pq.write_table(
            table.slice(0 if name == "text" else 7), folder / f"{name}.parquet", **options
        )
    group_bytes = 2_000 * D * 4
    corpora = [Corpus(f"{served[0]}/parquet-{name}") for name in ("text", "image")]
    before = served[1].fetched("text.parquet")
    ids = [39_999, 7, 23_456, 8, 1_999]
    assert np.array_equal(corpora[0].take(ids).numpy(), rows[ids])
    fetched = served[1].fetched("text.parquet") - before
    assert fetched < 3.3 * group_bytes + 2 * (128 << 10), "(and twice the first piece of a jump)"
    out, settings = storage_path(tmp_path / "out"), Settings(progress=False, fit_rows=3)
    planned = plan(align_work(*corpora, out, settings))["passes"]
    assert [step["bytes_read"] for step in planned[:3]] == [3 * group_bytes] * 3
    report = align(*corpora, out, settings)
    facts = ("name", "rows", "bytes_read")
    assert [[p[f] for f in facts] for p in report["passes"]] == [
        [p[f] for f in facts] for p in planned
    ]


def test_batches_are_cut_as_those_of_the_file(tmp_path, corpora, served):
    near, far = Corpus(corpora[0]), Corpus(f"{served[0]}/text")
    for start in (0, 13, 50, 60):
        ours = [(b.shard, b.first, b.rows) for b in near.batches(batch_rows=7, start=start)]
        theirs = [(b.shard, b.first, b.rows) for b in far.batches(batch_rows=7, start=start)]
        assert [batch[:2] for batch in ours] == [batch[:2] for batch in theirs]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(ours, theirs, strict=True))


def test_several_pieces_are_on_their_way(tmp_path, served, monkeypatch):
    """Pieces arrive in any order and are delivered in theirs."""
    monkeypatch.setattr("realign_fast.storage.read_ahead.PIECE_BYTES", 999)
    write(tmp_path / "www/text", 1, (700,))
    corpus, rows = Corpus(f"{served[0]}/text"), np.load(tmp_path / "www/text/emb_0.npy")
    served[1].delay = 0.02
    rows_read = torch.cat([batch.rows for batch in corpus.batches(batch_rows=100)])
    assert np.array_equal(rows_read.numpy(), rows)
    assert 4 <= served[1].most_busy <= 8


def test_the_other_columns_of_an_arrow_file_stay_where_they_are(tmp_path, served):
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "www/fat").mkdir()
    rows = np.random.default_rng(0).standard_normal((64, D)).astype("f4")
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
    table = pa.table({"picture": [os.urandom(1 << 18) for _ in rows], "embedding": column})
    path = tmp_path / "www/fat/emb.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    (batch,) = Corpus(f"{served[0]}/fat").batches()
    assert np.array_equal(batch.rows.numpy(), rows)
    assert served[1].fetched("emb.arrow") < path.stat().st_size / 2


@pytest.mark.parametrize("form", ("npy", "parquet"))
def test_a_broken_connection_is_taken_up_again(form, tmp_path, corpora, served, monkeypatch):
    monkeypatch.setattr(url, "WAITS", (0.0, 0.0, 0.0))
    (path, *_) = convert(Corpus(corpora[0]), tmp_path / "www" / form, form)
    corpus = Corpus(f"{served[0]}/{form}")
    served[1].cuts[path.name] = 2
    rows_read = torch.cat([batch.rows for batch in corpus.batches()])
    assert torch.equal(rows_read, torch.cat([batch.rows for batch in Corpus(corpora[0]).batches()]))
    assert served[1].cuts[path.name] == 0


def test_a_run_that_stopped_on_a_dead_server_reads_only_the_rest(
    tmp_path, corpora, served, monkeypatch
):
    monkeypatch.setattr(url, "WAITS", (0.0, 0.0))
    sources = f"{served[0]}/text", f"{served[0]}/image"
    source, target = map(Corpus, sources)
    served[1].cuts["emb_2.npy"] = 10**6
    with pytest.raises(OSError, match=r"text/emb_2.npy: cannot be read in 3 attempts .*run the s"):
        align(source, target, tmp_path / "far", QUIET)
    served[1].cuts.clear()
    source = Corpus(sources[0])
    served[1].log.clear()
    align(source, target, tmp_path / "far", QUIET)
    align(*corpora, tmp_path / "near", QUIET)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")
    served[1].log.clear()
    align(source, target, tmp_path / "far", QUIET)  # finished: nothing is read again
    assert served[1].fetched("emb_0.npy") == served[1].fetched("emb_2.npy") == 0


def test_an_object_replaced_during_the_run_is_refused(tmp_path, corpora, served):
    source, target = Corpus(f"{served[0]}/text"), Corpus(f"{served[0]}/image")
    shard = corpora[0] / "emb_2.npy"
    rows = np.load(shard)
    served[1].before["emb_2.npy"] = lambda: np.save(shard, rows[::-1])
    with pytest.raises(ValueError, match=r"text/emb_2.npy: changed"):
        align(source, target, tmp_path / "far", QUIET)
    align(f"{served[0]}/text", f"{served[0]}/image", tmp_path / "far", QUIET)
    align(*corpora, tmp_path / "near", QUIET)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")


def test_a_server_that_tells_no_version_is_warned_about(tmp_path, corpora, served):
    served[1].versions = False
    with pytest.warns(UserWarning, match=r"emb_0.npy: its server gives no ETag and no time"):
        align(f"{served[0]}/text", f"{served[0]}/image", tmp_path / "far", QUIET)


@pytest.mark.parametrize("form", ("safetensors", "parquet", "arrow", "arrow-stream", "tar"))
def test_every_format_says_what_its_server_did(form, tmp_path, corpora, served, monkeypatch):
    monkeypatch.setattr(url, "WAITS", ())
    (path, *_) = convert(Corpus(corpora[0]), tmp_path / "www" / form, form)
    corpus = Corpus(f"{served[0]}/{form}")
    served[1].cuts[path.name] = 10**6
    with pytest.raises(OSError, match=rf"{path.name}: cannot be read in 1 attempts .*run the same"):
        list(corpus.batches())


@pytest.mark.parametrize("form", ("parquet", "arrow", "arrow-stream"))
def test_a_server_that_dies_in_the_middle_is_named(form, tmp_path, corpora, served, monkeypatch):
    """pyarrow would call the file damaged and print a page."""
    monkeypatch.setattr(url, "WAITS", ())
    monkeypatch.setattr("realign_fast.storage.read_ahead.FIRST_BYTES", 512)
    monkeypatch.setattr("realign_fast.storage.read_ahead.PIECE_BYTES", 512)
    monkeypatch.setattr("realign_fast.storage.url.BUFFER_BYTES", 512)
    (path, *_) = convert(Corpus(corpora[0]), tmp_path / "www" / form, form)
    corpus = Corpus(f"{served[0]}/{form}")
    served[1].cuts[path.name], served[1].cut_within = 10**6, range(1000, 1800)
    with pytest.raises(OSError, match=rf"{path.name}: cannot be read in 1 attempts .*same command"):
        list(corpus.batches())
    served[1].cuts.clear()
    assert sum(len(batch.rows) for batch in corpus.batches()) == 82


def test_a_replaced_object_of_a_bucket_is_read_anew(tmp_path, corpora, bucket):
    for folder in corpora:
        bucket.put(str(folder), f"rows/{folder.name}", recursive=True)
    align("s3://rows/text", "s3://rows/image", tmp_path / "far", QUIET)
    rows = np.load(corpora[0] / "emb_0.npy")
    np.save(corpora[0] / "emb_0.npy", rows[::-1])
    bucket.put(str(corpora[0] / "emb_0.npy"), "rows/text/emb_0.npy")
    report = align("s3://rows/text", "s3://rows/image", tmp_path / "far", QUIET)
    align(*corpora, tmp_path / "near", QUIET)
    assert shards(tmp_path / "near") == shards(tmp_path / "far")
    assert report["passes"][0]["finished_before"] == 32
    assert report["passes"][1]["finished_before"] == 49


def test_a_copied_output_is_verified_and_applied_by_url(tmp_path, corpora, bucket):
    align(*corpora, tmp_path / "out", QUIET)
    bucket.put(str(tmp_path / "out"), "rows/out", recursive=True)
    assert verify(storage_path("s3://rows/out"))[1] == []
    aligner = ReAlign.from_pretrained("s3://rows/out")
    assert torch.equal(
        aligner.shift, ReAlign.load(tmp_path / "out/__realign__/aligner.safetensors").shift
    )
    bucket.pipe("rows/out/emb_0.npy", bucket.cat("rows/out/emb_0.npy")[:-2] + b"\0\0")
    (fault,) = [line for line in verify(storage_path("s3://rows/out"))[1] if "checksum" in line]
    assert fault.startswith("s3://rows/out/emb_0.npy: checksum is")


def test_secrets_of_urls_are_written_nowhere_and_a_new_signature_is_the_same_source(
    tmp_path, corpora, served
):
    def shard(side, signature):
        address = served[0].replace("http://", "http://user:SECRET@")
        return f"{address}/{side}/emb_0.npy?part=SECRET&X-Amz-Signature={signature}SECRET"

    align(shard("text", 1), shard("image", 1), tmp_path / "out", QUIET)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 10 and not [path for path in files if b"SECRET" in path.read_bytes()]
    assert "/text/emb_0.npy?part=***" in (tmp_path / "out/__realign__/manifest.json").read_text()
    report = align(shard("text", 2), shard("image", 2), tmp_path / "out", QUIET)
    assert [done["rows"] for done in report["passes"]] == [0] * 4
    assert verify(tmp_path / "out")[1] == []


@pytest.mark.parametrize("status", (401, 404, 500, None))
def test_secrets_of_urls_are_in_no_error_and_no_traceback(status, corpora, served, monkeypatch):
    monkeypatch.setattr(url, "WAITS", ())
    served[1].statuses["emb_0.npy"] = status
    address = served[0] if status else "http://127.0.0.1:9"
    text = f"{address}/text/emb_0.npy?sig=SECRET".replace("http://", "http://user:SECRET@")
    with pytest.raises(
        OSError, match=r"http://\*\*\*@127.*/text/emb_0.npy\?sig=\*\*\*: "
    ) as caught:
        Corpus(text)
    lines = traceback.format_exception(caught.value)  # without those of the source of this test
    assert not [line for line in lines if "SECRET" in line and "sig=SECRET" not in line]
    assert "SECRET" not in str(caught.value) + repr(url.Url(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://token@host/a", "https://***@host/a"),
        ("https://user:p@ss@host:80/a@b", "https://***@host:80/a@b"),
        ("sftp://user:password@host/a", "sftp://user:***@host/a"),
        ("abfs://container@account.dfs.core.windows.net/a",) * 2,
        ("s3://bucket/a?versionId=3",) * 2,
        ("https://host/a?sv=1&SIG=x%2F&se=2", "https://host/a?sv=***&SIG=***&se=***"),
        ("https://host/a?id=1", "https://host/a?id=***fc942c07"),
        ("https://host/a?id=2", "https://host/a?id=***f6c78813"),
        ("https://host/a?token", "https://host/a?***29827124"),
        ("zip://a::https://u:p@host/b.zip?sig=1", "zip://a::https://***@host/b.zip?sig=***"),
        ("simplecache::https://host/a?k=1::x", "simplecache::https://host/a?k=***fc942c07::x"),
    ],
)
def test_a_url_is_shown_without_its_secrets(text, shown):
    assert str(url.Url(text)) == shown and pickle.loads(pickle.dumps(url.Url(text)))._text == text


def test_what_is_not_there_is_named(served):
    with pytest.raises(FileNotFoundError) as caught:
        Corpus(f"{served[0]}/text/emb_9.npy")
    assert caught.value.strerror == f"{served[0]}/text/emb_9.npy: is not there; check its name"


@pytest.mark.parametrize("place, fault", [("nobody/text", "its bucket"), ("rows/text", "")])
def test_a_bucket_that_is_not_there_is_told_from_a_folder(bucket, place, fault):
    with pytest.raises(FileNotFoundError) as caught:
        Corpus(f"s3://{place}")
    expected = f"s3://{place}: {fault} is not there; check its name"
    assert caught.value.strerror == expected.replace("  ", " ")


@pytest.mark.parametrize("status", (401, 403))
def test_what_is_refused_is_named(status, corpora, served):
    served[1].statuses["emb_0.npy"] = status
    with pytest.raises(PermissionError, match=r"text/emb_0.npy: access is refused \(.*credentials"):
        Corpus(f"{served[0]}/text")


def test_a_server_that_nobody_runs(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(url, "WAITS", (0.0,))
    (tmp_path / "www").mkdir()
    with web(tmp_path / "www") as (address, _):
        pass
    with pytest.raises(
        OSError, match=r"/a.npy: cannot be read in 2 attempts .*its server cannot"
    ) as caught:
        Corpus(f"{address}/a.npy")
    assert not isinstance(caught.value, FileNotFoundError)


def test_a_server_without_ranges_is_named(tmp_path, served):
    write(tmp_path / "www/text", 1, (90_000,))
    served[1].ranges = False
    corpus = Corpus(f"{served[0]}/text")
    with pytest.raises(OSError, match=r"emb_0.npy: its server sends whole files.*simplecache::"):
        list(corpus.batches())
    cached = Corpus(f"simplecache::{served[0]}/text/emb_0.npy")
    assert sum(len(batch.rows) for batch in cached.batches()) == 90_000


def test_a_bucket_without_credentials(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(PermissionError, match=r"s3://rows/text: access is refused .*credentials"):
        Corpus("s3://rows/text")


@pytest.mark.parametrize("name", ("text", "text/a.npy"))
def test_a_protocol_whose_package_is_missing_says_which(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main.main(["convert", f"gs://bucket/{name}", "out", "--to", "npy"]) == 9
    message = capsys.readouterr().err
    assert f"gs://bucket/{name}: its protocol is read through another package" in message
    assert "install gcsfs" in message


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"s3://bucket/text: .*realign_fast\[urls\]"):
        Corpus("s3://bucket/text")


def test_a_protocol_that_nobody_knows():
    with pytest.raises(ValueError, match="nosuch://a: Protocol not known: nosuch"):
        Corpus("nosuch://a")


@pytest.mark.parametrize(
    ("text", "name", "child"),
    [
        ("s3://bucket/text/", "text", "s3://bucket/text/a b.npy"),
        ("s3://bucket", "bucket", "s3://bucket/a b.npy"),
        ("simplecache::s3://bucket/text", "text", "simplecache::s3://bucket/text/a b.npy"),
        ("zip://text::s3://bucket/all.zip", "text", "zip://text/a b.npy::s3://bucket/all.zip"),
        ("https://host/a%20b?key=1", "a b", "https://host/a%20b/a%20b.npy?key=***fc942c07"),
        ("hf://datasets/o/n@main/x?y", "x?y", "hf://datasets/o/n@main/x?y/a b.npy"),
    ],
)
def test_names_and_children(text, name, child):
    path = url.Url(text)
    assert (path.name, str(path / "a b.npy"), path / "") == (name, child, path)
    assert pickle.loads(pickle.dumps(path)) == path
    assert (path / "a b.npy").name == "a b.npy"
