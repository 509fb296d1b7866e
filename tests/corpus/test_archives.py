"""Arrays of `.npz` and tensors of `.pt` files: which are rows, and what is refused how."""

import logging
import os
import pickle
import re
import resource
import zipfile

import numpy as np
import pytest
import torch

from realign_fast.cli.main import main
from realign_fast.corpus import Corpus
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

ROWS = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
TENSOR = torch.from_numpy(ROWS)


def everything(path, **options):
    batches = Corpus(path, **options).batches(batch_rows=4)
    return torch.cat([batch.rows for batch in batches])


@pytest.mark.parametrize(
    ("arrays", "column"),
    [
        ({"arr_0": ROWS}, None),
        ({"features": ROWS, "ids": np.arange(9), "names": np.array(["a"] * 9)}, None),
        ({"embedding": ROWS, "other": ROWS + 1}, None),
        ({"image": ROWS, "text": ROWS + 1}, "image"),
        ({"rows": np.asfortranarray(ROWS)}, None),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_array_of_rows_is_found(tmp_path, arrays, column, save):
    save(tmp_path / "x.npz", **arrays)
    assert torch.equal(everything(tmp_path, column=column), TENSOR)


@pytest.mark.parametrize(
    ("value", "column"),
    [
        (TENSOR, None),
        (TENSOR.double(), None),
        (TENSOR.bfloat16(), None),
        (torch.nn.Parameter(TENSOR), None),
        (TENSOR.t().contiguous().t(), None),
        (torch.cat([TENSOR, TENSOR])[:9], None),
        ({"features": TENSOR, "ids": torch.arange(9), "names": ["a"] * 9, "model": "b"}, None),
        ({"embedding": TENSOR, "other": TENSOR + 1}, None),
        ({"image": TENSOR, "text": TENSOR + 1}, "image"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_the_tensor_of_rows_is_found_whatever_its_type(tmp_path, value, column, suffix):
    torch.save(value, tmp_path / f"x.{suffix}")
    rows = next(v for k, v in value.items() if k != "x") if isinstance(value, dict) else value
    read = everything(tmp_path, column=column)
    assert read.dtype == rows.dtype and torch.equal(read, rows.detach())


@pytest.mark.parametrize("suffix", ["pt", "pkl"])
def test_a_file_of_the_same_name_in_another_directory_is_another_file(
    tmp_path, monkeypatch, suffix
):
    for number, name in enumerate(("first", "second")):
        rows = np.full((3, 4), number, np.float32)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if suffix == "pt":
            torch.save(torch.from_numpy(rows), "x.pt")
        else:
            with open("x.pkl", "wb") as file:
                pickle.dump(
                    [{"id": str(n), "embed": row.tolist()} for n, row in enumerate(rows)], file
                )
        os.utime(f"x.{suffix}", (1, 1))
        corpus = Corpus(f"x.{suffix}", allow_pickle=True)
        assert np.array_equal(np.asarray(corpus), rows)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Bomb(), "holds objects other than tensors, arrays and plain data; they are never loaded"),
        (
            {"rows": TENSOR, "more": Bomb()},
            "holds objects other than tensors, arrays and plain data",
        ),
        (torch.nn.Linear(3, 4), "holds objects other than tensors, arrays and plain data"),
        ([TENSOR], "holds a list, expected a tensor"),
        (
            {"a": TENSOR, "b": TENSOR},
            r"no rows 'embedding', only a \[9, 4\] torch.float32, b .*choose",
        ),
        ({"a": TENSOR.int(), "b": "c"}, r"no rows 'embedding', only a \[9, 4\] torch.int32, b str"),
        (TENSOR[0], r"no rows 'embedding', only it \[4\]"),
        (TENSOR[:1].clone().expand(9, 4), r"share their memory; save tensor.contiguous\(\)"),
    ],
)
def test_other_values_are_refused_and_nothing_is_run(tmp_path, monkeypatch, value, words):
    monkeypatch.chdir(tmp_path)
    torch.save(value, "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{words}"):
        Corpus("x.pt")
    assert not os.path.exists("boom")


def save_sparse(path):
    torch.save({"a": TENSOR.to_sparse()}, path)


def save_as_before_torch_1_6(path):
    torch.save(TENSOR, path, _use_new_zipfile_serialization=False)


def save_header(path, text=b"[]"):
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("name", "save", "words"),
    [
        (
            "x.pt",
            save_as_before_torch_1_6,
            r"it is truncated or damaged, or older than torch 1.6",
        ),
        ("x.pt", save_sparse, r"only a \[9, 4\] .* sparse; .* save tensor.to_dense\(\)$"),
        ("x.safetensors", save_header, r"\(its header is no json object\); write it with"),
        (
            "s3://",
            None,
            "^realign-fast: error: s3://: names no bucket; expected s3://bucket/folder$",
        ),
        pytest.param(
            "\udcff.npy",
            None,
            r"/\\xff.npy: No such file.*exists and that this user may use it$",
            id="bytes",
        ),
    ],
)
def test_advice_of_an_error_helps(tmp_path, capfd, monkeypatch, name, save, words):
    # pytest's own workers cannot send a log with a name that is not UTF-8.
    monkeypatch.setattr(logging.getLogger("realign_fast"), "propagate", False)
    path = name if "://" in name else tmp_path / name
    if save:
        save(path)
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "npy"]) != 0
    message = capfd.readouterr().err.strip()
    assert re.search(words, message) and "rename" not in message, message


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"a": np.array([Bomb()])},
            "holds objects other than tensors, arrays .*never loaded; write it wi",
        ),
        (
            {"a": ROWS, "b": np.array([Bomb()])},
            "holds objects other than tensors, arrays .*never loaded; write it wi",
        ),
        ({"a": ROWS.astype(int)}, r"no rows 'embedding', only a \[9, 4\] int64; expected floats"),
        ({"a": ROWS.astype(">f4")}, r"no rows 'embedding', only a \[9, 4\] >f4; expected floats"),
        ({"a": ROWS[0]}, r"no rows 'embedding', only a \[4\]"),
        ({"a": ROWS, "b": ROWS}, "no rows 'embedding', only a .*, b .*; choose one"),
        ({}, "no rows 'embedding', only no entry"),
    ],
)
def test_arrays_that_are_no_rows_are_refused(tmp_path, monkeypatch, arrays, words):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz: .*{words}"):
        Corpus("x.npz")
    assert not os.path.exists("boom")


def test_a_checkpoint_beside_shards_is_no_shard(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    torch.save({"weight": TENSOR}, tmp_path / "model.pt")
    np.savez(tmp_path / "cache.npz", ROWS)
    assert [shard.path.name for shard in Corpus(tmp_path).shards] == ["x.npy"]
    (tmp_path / "x.npy").unlink()
    with pytest.raises(ValueError, match=r"has .* and .*; a folder holds one format"):
        Corpus(tmp_path)


def test_the_result_of_a_dict_is_that_dict_with_other_rows(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "target.npy", -ROWS)
    entries = {"rows": TENSOR, "model": "ViT", "ids": ["a"] * 9, "n": torch.arange(9)}
    torch.save(entries, tmp_path / "in/x.pt")
    align(tmp_path / "in", tmp_path / "target.npy", tmp_path / "out", Settings(progress=False))
    result = torch.load(tmp_path / "out/x.pt", weights_only=True)
    assert list(result) == list(entries) and not torch.equal(result["rows"], TENSOR)
    assert (result["model"], result["ids"], result["n"].tolist()) == ("ViT", ["a"] * 9, [*range(9)])


def test_shards_with_the_longest_names_are_aligned_and_resumed(tmp_path):
    """Names of 225 to 255 bytes, which leave no room for the endings of our own files."""
    names = ["a" * 221 + ".npy", "\u00e9" * 120 + "1.npy", "b" * 251 + ".npy", "b" * 250 + "c.npy"]
    for number, name in enumerate(names):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "in" / name, ROWS + number)
    np.save(tmp_path / "target.npy", -ROWS)
    run = tmp_path / "in", tmp_path / "target.npy", tmp_path / "out", Settings(progress=False)
    align(*run)
    results = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    assert set(results) == set(names)
    report = align(*run)
    assert [entry["rows"] for entry in report["passes"]] == [0] * len(report["passes"])
    assert results == {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in names}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_and_their_ids_are_read_and_kept(tmp_path, save):
    arrays = {"names": np.array(["a"] * 9), "rows": ROWS, "id": np.arange(9), "more": ROWS[:, 0]}
    save(tmp_path / "x.npz", **arrays)
    corpus = Corpus(tmp_path)
    assert np.array_equal(corpus, ROWS) and np.array_equal(corpus[[8, 0]], ROWS[[8, 0]])
    assert list(corpus.ids()) == [str(number) for number in range(9)]
    with corpus.shards[0].writer(tmp_path / "y.npz") as writer:
        writer.write(-TENSOR)
    with np.load(tmp_path / "y.npz") as result:
        assert list(result) == list(arrays) and np.array_equal(result["rows"], -ROWS)
        assert all(np.array_equal(result[name], arrays[name]) for name in ("names", "id", "more"))
    save(tmp_path / "x.npz", rows=ROWS, more=ROWS[:, 0])
    with pytest.raises(ValueError, match=r"x\.npz: changed while it was read"):
        list(corpus.batches())


def test_an_array_of_a_truncated_file_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", rows=ROWS)
    whole = (tmp_path / "x.npz").read_bytes()
    for size in (0, 30, 200, len(whole) - 1):
        (tmp_path / "x.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.npz: cannot be read"):
            Corpus(tmp_path / "x.npz")


def test_bytes_before_a_zip_file_are_named(tmp_path):
    """Python's reader of zip files allows them, and numpy looks at the first ones."""
    path = tmp_path / "x.npz"
    np.savez(path, embedding=ROWS, id=np.arange(9))
    path.write_bytes(b"before" + path.read_bytes())
    with pytest.raises(ValueError, match=r"x\.npz: cannot be read"):
        list(Corpus(path).ids())


def test_a_damaged_stream_of_bzip2_is_named(tmp_path):
    """Its library raises an OSError without a number."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        with archive.open("rows.npy", "w") as member:
            np.lib.format.write_array(member, ROWS)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"BZh") + 4] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"x\.npz: cannot be read: it is truncated or damaged"):
        Corpus(path)


def test_a_record_that_says_it_has_gigabytes_is_refused_before_they_are_allocated(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"rows": TENSOR}, path)
    damaged = bytearray(path.read_bytes())
    directory = damaged.index(b"PK\x01\x02")
    damaged[directory + 24 : directory + 28] = b"\xfe\xff\xff\xff"  # bytes of the first record
    path.write_bytes(damaged)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"x\.pt: cannot be read: .*a record is larger than the"):
        Corpus(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB


def test_a_truncated_tensor_is_one_short_error(tmp_path):
    torch.save({"rows": TENSOR}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for size in (200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.pt").write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"x\.pt: cannot be read: it is truncated or dam"
        ) as error:
            Corpus(tmp_path / "x.pt")
        assert str(error.value).endswith("; write it again") and len(str(error.value)) < 400


def test_a_file_of_no_format_is_named(tmp_path):
    (tmp_path / "x.foo").write_text("no rows")
    with pytest.raises(ValueError, match=r"x\.foo: its suffix is none of .*npy"):
        Corpus(tmp_path / "x.foo")
