"""``convert``: rows and what is beside them from every format into every other."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from realign_fast.cli.main import main
from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.corpus.format_registry import FORMATS
from realign_fast.storage import atomic

pa = pytest.importorskip("pyarrow")
ipc, pq = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow.parquet")

DIMENSION = 8


def random_rows(count, dtype="float32", seed=0):
    return (np.random.default_rng(seed).standard_normal((count, DIMENSION)) + 1).astype(dtype)


def others_of(count):
    """A column of text and one of numbers."""
    return {"id": [f"é{i}" for i in range(count)], "n": list(range(count))}


def save(path, rows, form):
    """A shard with two more columns, where the format has any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    others = others_of(len(rows))
    table = pa.table({**others, "embedding": list(rows)})
    if form == "npy":
        np.save(path, rows)
    elif form == "safetensors":
        save_file({"n": np.array(others["n"]), "embedding": rows}, path)
    elif form == "npz":
        np.savez_compressed(path, **others, embedding=rows)
    elif form == "pt":
        torch.save({**others, "embedding": torch.from_numpy(rows), "model": "a name"}, path)
    elif form == "pickle":
        entries = [
            {"id": i, "n": n, "embed": r} for i, n, r in zip(*others.values(), rows, strict=True)
        ]
        path.write_bytes(pickle.dumps(entries))
    elif form == "parquet":
        pq.write_table(table, path, row_group_size=4)
    else:
        with (ipc.new_file if form == "arrow" else ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)


def suffix(form):
    return FORMATS[form].writer.suffixes[0]


def everything(corpus):
    return torch.cat([batch.rows for batch in corpus.batches(batch_rows=3)]).numpy()


def beside(folder, name, form):
    """What a shard has beside its rows, as a dict of lists."""
    if form == "pickle":
        entries = pickle.loads((folder / name).read_bytes())  # of our own writing
        return {key: [entry[key] for entry in entries] for key in entries[0] if key != "embed"}
    if form == "tar":
        with tarfile.open(folder / name) as tar:
            read = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
        return {key: [one[key] for one in read] for key in (read[0] if read else ())}
    if form in ("npy", "npz", "pt", "safetensors"):
        path = (folder / "metadata" / name).with_suffix(".parquet")
        return pq.read_table(path).to_pydict() if path.exists() else {}
    if form == "parquet":
        table = pq.read_table(folder / name)
    else:
        table = (ipc.open_file if form == "arrow" else ipc.open_stream)(folder / name).read_all()
    return table.drop_columns(["embedding"]).to_pydict()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "form", ["npy", "npz", "pt", "safetensors", "parquet", "arrow", "arrow-stream", "pickle"]
)
def test_rows_and_columns_go_from_every_format_into_every_other(tmp_path, form, to, dtype):
    parts = [random_rows(n, dtype, n) for n in (11, 1, 6)]
    for i, rows in enumerate(parts):
        save(tmp_path / "in" / f"x_{i}{suffix(form)}", rows, form)
    corpus = Corpus(tmp_path / "in", allow_pickle=True)
    done = []
    paths = convert(
        corpus, tmp_path / "out", to, done.append, batch_bytes=5 * corpus.shards[0].row_bytes
    )
    assert done == [5, 5, 1, 1, 5, 1]
    result = Corpus(tmp_path / "out", allow_pickle=True)
    assert [shard.path for shard in result.shards] == paths and result.format == to
    assert [shard.num_rows for shard in result.shards] == [11, 1, 6]
    assert everything(result).dtype == dtype
    np.testing.assert_array_equal(everything(result), np.concatenate(parts))
    for start, path, rows in zip(result.starts, paths, parts, strict=False):
        want = others_of(len(rows)) if form not in ("npy", "safetensors") else {}
        if form == "safetensors":
            want = {"n": list(range(len(rows)))}
        if to == "pickle":
            want = {"id": list(range(start, start + len(rows)))} | want
        assert beside(tmp_path / "out", path.name, to) == want


def test_there_and_back_is_the_same_file(tmp_path):
    save(tmp_path / "in" / "x.npy", random_rows(9, "float16"), "npy")
    source, place = (tmp_path / "in" / "x.npy").read_bytes(), tmp_path / "in"
    for number, to in enumerate(
        ["safetensors", "npz", "parquet", "arrow", "pt", "arrow-stream", "pickle", "tar", "npy"]
    ):
        place, before = tmp_path / str(number), place
        convert(Corpus(before, allow_pickle=True), place, to)
    assert (place / "x.npy").read_bytes() == source


def test_a_converted_dataset_is_loaded_by_its_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    for i in range(11):  # more than ten: order by name and by number differ
        save(tmp_path / "in" / f"x_{i}.parquet", random_rows(2, seed=i), "parquet")
    corpus = Corpus(tmp_path / "in")
    convert(corpus, tmp_path / "out", "hf")
    back = datasets.load_from_disk(tmp_path / "out")
    assert back["n"] == [0, 1] * 11
    np.testing.assert_array_equal(np.asarray(back["embedding"], np.float32), everything(corpus))


def test_keys_that_come_and_go_become_nulls(tmp_path):
    row = np.zeros(2, "f4")
    entries = [{"embed": row, "a": 1} for _ in range(1500)]
    entries.append({"embed": row, "b": [1.5], "c": np.arange(2)})
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(entries))
    convert(Corpus(tmp_path / "x.pkl", allow_pickle=True), tmp_path / "out", "parquet")
    last = pq.read_table(tmp_path / "out" / "x.parquet").slice(1499).to_pylist()
    assert [one["a"] for one in last] == [1, None]
    assert (last[1]["b"], last[1]["c"]) == ([1.5], [0, 1]) and last[0]["b"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([{"a": 1}, {"a": "text"}], "cannot become columns"),
        ([{"a": 1}] * 1024 + [{"a": "text"}], "cannot become columns"),
        ([{"a": [1, "text"]}], "cannot become columns"),
        ([{1: 1}], "cannot become columns"),
        ([{"embedding": 1}], "has a column 'embedding'"),
    ],
)
def test_keys_that_are_no_columns_say_so(tmp_path, more, words):
    row = np.zeros(2, "f4")
    entries = [{"embed": row, **one} for one in more]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(entries))
    with pytest.raises(ValueError, match=rf"x\.pkl: .*{words}"):
        convert(Corpus(tmp_path / "x.pkl", allow_pickle=True), tmp_path / "out", "parquet")
    assert os.listdir(tmp_path / "out") == [".converting"]


def test_tensors_that_are_no_columns_say_so(tmp_path):
    tensors = {"embedding": random_rows(3), "other": np.zeros(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"'other' is F64 \[4\], cannot become a column of 3 rows"):
        convert(Corpus(tmp_path / "x.safetensors"), tmp_path / "out", "npy")


def test_nothing_is_written_over(tmp_path):
    save(tmp_path / "in" / "x.npy", random_rows(3), "npy")
    corpus = Corpus(tmp_path / "in")
    convert(corpus, tmp_path / "out", "parquet")
    with pytest.raises(ValueError, match=r"x\.\w+: is there already; give an empty directory"):
        convert(corpus, tmp_path / "out", "parquet")
    for out in ("in", "in/side"):
        with pytest.raises(ValueError, match="in, which holds rows that are read"):
            convert(corpus, tmp_path / out, "parquet")
    with pytest.raises(ValueError, match=r"x\.npy: is there already"):
        convert(Corpus(tmp_path / "in" / "x.npy"), tmp_path / "in", "parquet")
    with pytest.raises(ValueError, match="got format 'csv', expected one of npy"):
        convert(corpus, tmp_path / "csv", "csv")
    save(tmp_path / "in" / "X.npy", random_rows(3), "npy")
    (tmp_path / "in" / "x.NPY").write_bytes((tmp_path / "in" / "x.npy").read_bytes())
    with pytest.raises(ValueError, match=r"two shards would become x\.parquet"):
        convert(Corpus(tmp_path / "in"), tmp_path / "new", "parquet")


def test_a_row_that_cannot_be_read_leaves_no_shard_behind(tmp_path):
    save(tmp_path / "x.parquet", random_rows(9), "parquet")
    corpus = Corpus(tmp_path / "x.parquet")
    save(tmp_path / "x.parquet", random_rows(8), "parquet")
    with pytest.raises(ValueError, match="changed while it was read"):
        convert(corpus, tmp_path / "out", "arrow")
    assert os.listdir(tmp_path / "out") == [".converting"]


# ---- the command line


def test_the_commands(tmp_path, capsys):
    save(tmp_path / "in" / "x.parquet", random_rows(9), "parquet")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "npy"]) == 0
    assert "wrote 9 rows in 1 shards" in capsys.readouterr().out
    other = [str(tmp_path / "other"), "--to", "npy"]
    assert main(["convert", str(tmp_path / "in"), *other, "--column", "id"]) == 3
    assert "column 'id' is string" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), *other]) == 6


def test_align_takes_a_column_for_each_side(tmp_path):
    table = pa.table(
        {"text": list(random_rows(9)), "image": list(-random_rows(7))[:9] + [None] * 2}
    )
    pq.write_table(table.select(["text"]), tmp_path / "t.parquet")
    pq.write_table(table.select(["image"]).slice(0, 7), tmp_path / "i.parquet")
    command = [
        "align",
        "--text",
        str(tmp_path / "t.parquet"),
        "--image",
        str(tmp_path / "i.parquet"),
    ]
    command += ["--out", str(tmp_path / "out"), "--quiet", "--column", "text"]
    assert main([*command, "--target-column", "image"]) == 0
    assert pq.read_table(tmp_path / "out" / "t.parquet").column_names == ["text"]
    assert main(command) == 3


def test_a_conversion_that_stopped_goes_on(tmp_path, monkeypatch):
    """Killed between two shards: nobody takes the part for the whole, and a rerun completes it."""
    for index in range(3):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"x_{index}.npy", np.random.default_rng(index).standard_normal((20, 4)))
    corpus, out = Corpus(tmp_path / "source"), tmp_path / "out"

    def stop(rows):
        stop.rows += rows
        if stop.rows > 20:
            raise KeyboardInterrupt

    stop.rows = 0
    with pytest.raises(KeyboardInterrupt):
        convert(corpus, out, "hf", stop)
    with pytest.raises(ValueError, match="a conversion that did not end"):
        Corpus(out)
    with pytest.raises(ValueError, match="another conversion that did not end"):
        convert(corpus, out, "arrow")
    first = (out / "data-00000-of-00003.arrow").stat().st_mtime_ns
    convert(corpus, out, "hf")
    assert (out / "data-00000-of-00003.arrow").stat().st_mtime_ns == first
    whole = convert(corpus, tmp_path / "whole", "hf")
    for path in whole:
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert Corpus(out).num_rows == 60


def test_what_was_refused_is_no_corpus_and_another_conversion_begins_there(tmp_path):
    save(tmp_path / "source" / "a.npy", np.full((2, DIMENSION), 1e30, np.float32), "npy")
    with pytest.raises(ValueError, match="beyond"):
        convert(Corpus(tmp_path / "source"), tmp_path / "out", "npy", dtype=torch.float16)
    with pytest.raises(ValueError, match="conversion that did not end"):
        Corpus(tmp_path / "out")
    convert(Corpus(tmp_path / "source"), tmp_path / "out", "npy")
    assert os.listdir(tmp_path / "out") == ["a.npy"]


def write_root(folder, counts, write):
    """A clip-retrieval root of texts, with a file of metadata for each shard."""
    for number, count in enumerate(counts):
        (folder / "text_emb").mkdir(parents=True, exist_ok=True)
        (folder / "metadata").mkdir(exist_ok=True)
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", random_rows(count, seed=number))
        write(folder / "metadata" / f"metadata_{number}", number, count)
    return folder


def write_lines(path, number, count):
    lines = (json.dumps({"id": f"{number}-{i}", "caption": "é"}) for i in range(count))
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")


def write_parquet(path, number, count):
    table = {"id": [f"{number}-{i}" for i in range(count)], "caption": ["é"] * count}
    pq.write_table(pa.table(table), path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_the_metadata_of_a_root_go_along(tmp_path, write):
    root = write_root(tmp_path / "root", (3, 2), write)
    ids = [f"0-{i}" for i in range(3)] + ["1-0", "1-1"]
    for form in ("pickle", "parquet", "tar", "safetensors"):
        convert(Corpus(root, "text"), tmp_path / form, form)
        found = [
            beside(tmp_path / form, path.name, form)
            for path in sorted((tmp_path / form).glob(f"text*{suffix(form)}"))
        ]
        assert [value for shard in found for value in shard["id"]] == ids
        assert {value for shard in found for value in shard["caption"]} == {"é"}
    write(root / "metadata" / "metadata_1", 1, 4)
    with pytest.raises(ValueError, match=r"metadata_1\.\w+: has more than 2 entries, .* 2 rows"):
        convert(Corpus(root, "text"), tmp_path / "more", "parquet")


def test_a_line_of_metadata_is_an_object_or_blank(tmp_path):
    root = write_root(tmp_path / "root", (2,), write_lines)
    path = root / "metadata" / "metadata_0.jsonl"
    path.write_text('{"id": "a"}\n\n{"id": "b"}\n')
    assert list(Corpus(root, "text").ids()) == ["a", "b"]
    for line, fault in (("[1, 2]", r"entry 1 is \[1, 2\], expected"), ("{", "entry 1: is no JSON")):
        path.write_text('{"id": "a"}\n' + line)
        with pytest.raises(ValueError, match=rf"metadata_0\.jsonl: {fault}"):
            list(Corpus(root, "text").ids())


def test_ids_of_a_pickle_are_those_of_the_rows_or_their_numbers_in_the_corpus(tmp_path):
    for number in range(2):
        save(tmp_path / "npy" / f"emb_{number}.npy", random_rows(2), "npy")
    convert(Corpus(tmp_path / "npy"), tmp_path / "numbered", "pickle")
    convert(Corpus(tmp_path / "npy"), tmp_path / "tar", "tar")
    convert(Corpus(tmp_path / "tar"), tmp_path / "keys", "pickle")
    for number in range(2):
        numbers = [2 * number, 2 * number + 1]
        with tarfile.open(tmp_path / "tar" / f"emb_{number}.tar") as tar:
            assert tar.getnames() == [f"{i:09}.embedding.npy" for i in numbers]
        assert beside(tmp_path / "numbered", f"emb_{number}.pkl", "pickle")["id"] == numbers
        keys = beside(tmp_path / "keys", f"emb_{number}.pkl", "pickle")["id"]
        assert keys == [f"{i:09}" for i in numbers]


class _TakesSevenBytes(io.FileIO):
    """A file that takes a part of what is written, as a disk does that is nearly full."""

    def write(self, data):
        return super().write(memoryview(data).cast("B")[:7])


@pytest.mark.parametrize("file_format", sorted({*FORMATS} - {"arrow-stream"}))
def test_short_writes_lose_no_byte(tmp_path, monkeypatch, file_format):
    np.save(tmp_path / "rows.npy", np.arange(60, dtype="f4").reshape(12, 5))
    corpus = Corpus(tmp_path / "rows.npy")
    (expected,) = convert(corpus, tmp_path / "whole", file_format)

    def opened(path, mode, buffering=-1):
        file = _TakesSevenBytes(path, mode)
        return file if buffering == 0 else io.BufferedWriter(file)

    monkeypatch.setattr(atomic, "open", opened, raising=False)
    (written,) = convert(corpus, tmp_path / "short", file_format)
    assert written.read_bytes() == expected.read_bytes()
