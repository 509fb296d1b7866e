"""WebDataset tars: one row a sample, every other member kept."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

DIMENSION = 6
QUICK = Settings(progress=False, batch_bytes=100)


def random_rows(count, dtype="float32", seed=0):
    return (np.random.default_rng(seed).standard_normal((count, DIMENSION)) + 1).astype(dtype)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def save(path, members):
    """A tar of (name, bytes), with times and rights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 1000 + number, 0o640
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(rows, make=np.array):
    """Samples of three members, the row in the middle, in folders with long names."""
    for i, row in enumerate(rows):
        key = f"{'é' * 60}/{'folder' * 10}/{i:05}"
        yield f"{key}.cls", b"%d" % i
        yield f"{key}.emb.NPY", npy(make(row))
        yield f"{key}.txt", f"word é {i}".encode()


def load(path):
    with tarfile.open(path) as tar:
        return [(m.name, m.mtime, m.mode, tar.extractfile(m).read()) for m in tar]


def read(path, **options):
    return torch.cat([b.rows for b in Corpus(path, **options).batches(batch_rows=4)]).numpy()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_are_read_and_all_else_is_kept(tmp_path, dtype):
    np.save(tmp_path / "target.npy", -random_rows(20))
    (tmp_path / "npy").mkdir()
    for i, count in enumerate((9, 1, 4)):
        rows = random_rows(count, dtype, i)
        np.save(tmp_path / "npy" / f"x_{i}.npy", rows)
        save(tmp_path / "in" / f"x_{i}.tar", members_of(rows, lambda row: row[None]))
        np.testing.assert_array_equal(read(tmp_path / "in" / f"x_{i}.tar"), rows)
    corpus = Corpus(tmp_path / "in")
    assert (corpus.num_rows, corpus.format, str(corpus.dtype)) == (14, "tar", f"torch.{dtype}")
    assert torch.equal(corpus.take([13, 0, 8, 9]), Corpus(tmp_path / "npy").take([13, 0, 8, 9]))
    np.save(tmp_path / "target.npy", -random_rows(20, dtype))
    align(tmp_path / "npy", tmp_path / "target.npy", tmp_path / "want", QUICK)
    align(tmp_path / "in", tmp_path / "target.npy", tmp_path / "out", QUICK)
    for i in range(3):
        before, after = (load(tmp_path / place / f"x_{i}.tar") for place in ("in", "out"))
        assert [one[:3] for one in before] == [one[:3] for one in after]
        want = np.load(tmp_path / "want" / f"x_{i}.npy")
        assert [one[3] for one in after[1::3]] == [npy(row[None]) for row in want]
        assert [one[3] for one in before[::3] + before[2::3]] == [
            one[3] for one in after[::3] + after[2::3]
        ]


def test_the_member_is_chosen_by_its_ending(tmp_path):
    a, b = random_rows(2)
    path = save(tmp_path / "x.tar", [("0.a.npy", npy(a)), ("0.b.npy", npy(b))])
    for column in ("b", "b.npy"):
        np.testing.assert_array_equal(read(path, column=column), [b])
    with pytest.raises(
        ValueError, match=r"sample '0' has no 'embedding\.npy'; .*of: a\.npy, b\.npy"
    ):
        read(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.npy", "row"), ("1.npy", "row"), ("0.txt", b"")], r"'0' do not lie together"),
        ([("0.npy", "row"), ("0.npy", "row")], "has two members 0.npy"),
        ([("0.npy", "row"), ("1.txt", b"")], "sample '1' has no 'npy'.* of: txt"),
        ([("0.npy", b"junk")], r"0\.npy is not a \.npy file"),
        ([("0.npy", "row"), ("1.npy", b"junk")], r"1\.npy is not a \.npy file"),
        ([("0.npy", npy(np.zeros(3, int)))], "0.npy holds int64, expected"),
        ([("0.npy", npy(np.zeros((2, 3))))], r"0\.npy has shape \(2, 3\)"),
        (
            [("0.npy", "row"), ("1.npy", npy(np.zeros(9)))],
            "1.npy holds 9 of float64, expected 6 of",
        ),
        ([("0.npy", npy(np.array([None])))], r"0\.npy is not a \.npy file \(Object arrays"),
        ([], "has no samples"),
    ],
)
def test_what_is_no_row_is_named(tmp_path, members, words):
    row = npy(random_rows(1)[0])
    path = save(tmp_path / "x.tar", [(n, row if d == "row" else d) for n, d in members])
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_truncated_and_compressed_tars(tmp_path):
    path = save(tmp_path / "x.tar", members_of(random_rows(5)))
    whole = path.read_bytes()
    for length in (0, 100, 512, 1000, 5000, len(whole) // 2, len(whole) - 10000):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path}: .*write it again"):
            read(path)
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match="write it again, uncompressed"):
        read(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_tars_never_escape(tmp_path, data):
    path = save(tmp_path / "x.tar", members_of(random_rows(2)))
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        read(path)
    except (ValueError, TypeError) as error:
        assert str(path) in str(error)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    path = save(tmp_path / "x.tar", members_of(random_rows(3)))
    with pytest.raises(ValueError, match="got 2 rows, expected 3"):
        with Corpus(path).shards[0].writer(tmp_path / "out" / "x.tar") as writer:
            writer.write(torch.zeros(2, DIMENSION))
    assert os.listdir(tmp_path / "out") == []


def test_there_and_back_keeps_keys_and_members(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    rows = random_rows(300)
    members = [
        m
        for i, row in enumerate(rows)
        for m in (
            (f"k{i:05}.jpg", b"\xff" * i),
            (f"k{i:05}.txt", b"w"),
            (f"k{i:05}.embedding.npy", npy(row)),
        )
    ]
    save(tmp_path / "in" / "x.tar", members)
    convert(Corpus(tmp_path / "in"), tmp_path / "table", "parquet")
    table = pq.read_table(tmp_path / "table" / "x.parquet")
    assert table.column_names == ["__key__", "jpg", "txt", "embedding"]
    assert table["__key__"][299].as_py() == "k00299" and table["txt"][0].as_py() == "w"
    convert(Corpus(tmp_path / "table"), tmp_path / "back", "tar")
    assert [(n, d) for n, _, _, d in load(tmp_path / "back" / "x.tar")] == members


def test_columns_become_members(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = {"id": ["é", None], "n": [1, 2], "txt": ["a", "b"], "embedding": list(random_rows(2))}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    convert(Corpus(tmp_path / "x.parquet"), tmp_path / "out", "tar")
    names = {name: data for name, _, _, data in load(tmp_path / "out" / "x.tar")}
    assert sorted(names) == [
        f"00000000{i}.{e}" for i in "01" for e in ("embedding.npy", "json", "txt")
    ]
    assert json.loads(names["000000000.json"]) == {"id": "é", "n": 1}
    assert (
        json.loads(names["000000001.json"]) == {"id": None, "n": 2}
        and names["000000001.txt"] == b"b"
    )
    pq.write_table(pa.table(table | {"json": ["1", "2"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="row 0 has columns id, n, txt, json, not all of which"):
        convert(Corpus(tmp_path / "x.parquet"), tmp_path / "new", "tar")


@pytest.mark.parametrize("ids", [["b", "é", None], [7, 5, 6]])
def test_ids_in_the_json_go_through_every_conversion(tmp_path, ids):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    expected = [value and str(value) for value in ids]
    for name, more in (("alone", {}), ("more", {"n": [1, 2, 3]})):
        place = tmp_path / f"{name}.parquet"
        table = pa.table({"id": ids, **more, "embedding": list(random_rows(3))})
        pq.write_table(table, place)
        for step, form in enumerate(("tar", "parquet", "tar")):
            before, place = place, tmp_path / f"{name}-{step}"
            (shard,) = convert(Corpus(before), place, form)
            if None in ids:
                with pytest.raises(ValueError, match="row 2 has the id None of NoneType, expec"):
                    list(Corpus(place).ids())
            else:
                assert list(Corpus(place).ids()) == expected
            if form == "parquet":
                assert pq.read_table(shard).column_names == ["__key__", "json", "embedding"]
        convert(Corpus(place), tmp_path / f"{name}-pickle", "pickle")
        pickled = Corpus(tmp_path / f"{name}-pickle", allow_pickle=True)
        assert list(pickled.ids()) == [text or "000000002" for text in expected]


def test_text_that_is_no_utf8_says_so(tmp_path):
    row = npy(random_rows(1)[0])
    path = save(tmp_path / "x.tar", [("0.npy", row), ("0.txt", b"\xff\xfe")])
    with pytest.raises(ValueError, match=rf"{path}: 0\.txt is no UTF-8"):
        convert(Corpus(path), tmp_path / "out", "parquet")


def test_webdataset_reads_what_we_write(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    np.save(tmp_path / "x.npy", random_rows(7))
    convert(Corpus(tmp_path / "x.npy"), tmp_path / "out", "tar")
    loaded = webdataset.WebDataset(str(tmp_path / "out" / "x.tar"), shardshuffle=False).decode()
    np.testing.assert_array_equal([one["embedding.npy"] for one in loaded], random_rows(7))
