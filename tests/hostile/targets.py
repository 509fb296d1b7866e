"""What is fuzzed: each target is a sound file, and the reader of that file.

A reader may return, or refuse its file with a ValueError, TypeError or OSError that names it.
Anything else, a crash and a reader that does not end included, is a fault.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save

from realign_fast import Corpus, Moments, ReAlign, SharedSpace
from realign_fast.corpus.row_values import column_values, read_entries
from realign_fast.frame import FixedFrame
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.manifest import read_manifest
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify
from realign_fast.revision.conversation_files import read_sample
from realign_fast.storage.paths import storage_path

ROWS = np.random.default_rng(0).standard_normal((7, 8)).astype("f4")
REFUSALS = (ValueError, TypeError, OSError)


class Target(NamedTuple):
    """A file of a folder, its sound contents, and what reads it."""

    file: str  # its path in the folder
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]  # of the folder
    prepare: Callable[[Path], object] = lambda folder: None  # writes the other files


def _bytes_of(write: Callable[[Any], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _table(rows: np.ndarray = ROWS) -> pyarrow.Table:
    lists = pyarrow.array(list(rows), pyarrow.list_(pyarrow.from_numpy_dtype(rows.dtype)))
    texts = pyarrow.array([f"text {number}" for number in range(len(rows))])
    return pyarrow.table({"id": texts, "embedding": lists})


def _npy() -> list[bytes]:
    arrays = ROWS, ROWS.astype("f2"), ROWS.astype("f8"), ROWS[:0]
    return [_bytes_of(partial(np.save, arr=array)) for array in arrays]


def _npz() -> list[bytes]:
    ids = np.array([str(number) for number in range(len(ROWS))])
    writers = np.savez, np.savez_compressed
    return [_bytes_of(lambda file, w=write: w(file, embedding=ROWS, id=ids)) for write in writers]


def _pt() -> list[bytes]:
    rows = torch.from_numpy(ROWS)
    values = rows, {"embedding": rows.bfloat16(), "id": [str(n) for n in range(7)]}
    return [_bytes_of(partial(torch.save, value)) for value in values]


def _safetensors() -> list[bytes]:
    rows = torch.from_numpy(ROWS)
    return [save({"embedding": rows}), save({"a": rows.bfloat16()})]


def _parquet() -> list[bytes]:
    options = (
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"row_group_size": 3, "write_page_checksum": True},
    )
    return [
        _bytes_of(lambda file, o=option: pyarrow.parquet.write_table(_table(), file, **o))
        for option in options
    ]


def _arrow(kind: str) -> list[bytes]:
    def write(file: Any, compression: str | None) -> None:
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with getattr(pyarrow.ipc, kind)(file, _table().schema, options=options) as writer:
            writer.write_table(_table(), 3)

    return [_bytes_of(partial(write, compression=name)) for name in (None, "zstd")]


def _pickled() -> list[bytes]:
    entries = [{"id": str(number), "embed": row} for number, row in enumerate(ROWS)]
    lists = [{"id": "a", "embed": [1.0, 2.0]}, {"id": "b", "embed": [3.0, 4.0]}]
    return [pickle.dumps(value, p) for p in (3, 4, 5) for value in (entries, lists)]


def _tar() -> list[bytes]:
    def write(file: Any) -> None:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number, row in enumerate(ROWS):
                members = {"npy": _bytes_of(partial(np.save, arr=row)), "txt": b"a text"}
                members["json"] = json.dumps({"id": number}).encode()
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{number:03}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))

    return [_bytes_of(write)]


def _read_corpus(name: str, folder: Path) -> None:
    """Read all rows in two sizes of batches, some of them alone, and their ids."""
    corpus = Corpus(folder / name, allow_pickle=True)
    count = 0
    for batch_rows in (3, 1000):
        for batch in corpus.batches(batch_rows=batch_rows):
            assert batch.rows.shape[1] == corpus.dimension
            count += len(batch.rows)
    assert count == 2 * corpus.num_rows
    if corpus.num_rows:
        assert corpus.take([corpus.num_rows - 1, 0]).shape == (2, corpus.dimension)
    try:
        deque(corpus.ids(), maxlen=0)
    except ValueError as error:
        if "holds no ids" not in str(error):
            raise


def _read_list(name: str, folder: Path) -> None:
    for number, entry in enumerate(read_entries(folder / name)):
        read_sample(entry, f"{folder / name}: entry {number}")


def _conversations() -> list[bytes]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    entries = [
        {"id": "1", "image": "1", "conversations": turns},
        {"id": 2, "caption": "a cat", "images": ["2", "3"]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    lines = b"\n".join(json.dumps(entry).encode() for entry in entries)
    return [json.dumps(entries, indent=1).encode(), lines]


def _parquet_list() -> list[bytes]:
    tables = [
        pyarrow.Table.from_pylist([json.loads(line)]) for line in _conversations()[1].splitlines()
    ]
    return [_bytes_of(partial(pyarrow.parquet.write_table, table)) for table in tables]


def _clip_root(folder: Path) -> None:
    for side in ("text_emb", "img_emb"):
        (folder / side).mkdir()
        np.save(folder / side / f"{side}_0.npy", ROWS)
    (folder / "metadata").mkdir()


def _metadata(kind: str) -> list[bytes]:
    if kind == "parquet":
        table = pyarrow.table({"id": [str(n) for n in range(7)], "caption": ["a text"] * 7})
        return [_bytes_of(lambda file: pyarrow.parquet.write_table(table, file))]
    lines = [json.dumps({"id": n, "caption": "a text"}) for n in range(7)]
    return ["\n".join(lines).encode()]


def _read_ids(folder: Path) -> None:
    corpus = Corpus(folder, "text")
    deque(column_values(corpus), maxlen=0)


@cache
def _moments() -> tuple[Moments, Moments]:
    rows = torch.from_numpy(ROWS)
    return Moments(covariance=True).update(rows), Moments(covariance=True).update(rows + 1)


def _saved(thing: Callable[[], Any]) -> list[bytes]:
    path = Path(_scratch(), "saved.safetensors")
    thing().save(path)
    return [path.read_bytes()]


@cache
def _scratch() -> str:
    import atexit
    import tempfile

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _output() -> Path:
    """Return the output of a run, whose sources lie beside it."""
    root = Path(_scratch())
    for side in ("text", "image"):
        (root / side).mkdir()
        for number in range(2):
            rows = ROWS[number:] + (side == "text")
            np.save(root / side / f"rows_{number}.npy", rows)
    align(root / "text", root / "image", root / "out", Settings(progress=False))
    return root / "out"


def _copy_output(folder: Path) -> None:
    shutil.copytree(_output(), folder, dirs_exist_ok=True, copy_function=shutil.copy2)


def _output_seed(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(_output().glob(name))][:1]


def _resume(folder: Path) -> None:
    """Check the output, and continue its run: a damaged record is refused or written anew."""
    root = _output().parent
    verify(folder)
    align(root / "text", root / "image", folder, Settings(progress=False))
    faults = verify(folder)[1]
    assert not faults, faults


def _space() -> SharedSpace:
    rows = torch.from_numpy(ROWS)
    return SharedSpace.fit(text=rows, image=rows.flip(0) + 1)


def _targets() -> Iterator[tuple[str, Target]]:
    shards = {
        "npy": _npy,
        "npz": _npz,
        "pt": _pt,
        "safetensors": _safetensors,
        "parquet": _parquet,
        "arrow": partial(_arrow, "new_file"),
        "arrow-stream": partial(_arrow, "new_stream"),
        "pickle": _pickled,
        "tar": _tar,
    }
    suffixes = {"arrow-stream": "arrow", "pickle": "pkl"}
    for name, seeds in shards.items():
        file = f"rows.{suffixes.get(name, name)}"
        yield name, Target(file, seeds, partial(_read_corpus, file))
    yield "conversations", Target("list.json", _conversations, partial(_read_list, "list.json"))
    parquet_list = Target("list.parquet", _parquet_list, partial(_read_list, "list.parquet"))
    yield "conversations-parquet", parquet_list
    for kind in ("jsonl", "parquet"):
        file = f"metadata/metadata_0.{kind}"
        yield f"metadata-{kind}", Target(file, partial(_metadata, kind), _read_ids, _clip_root)
    objects: dict[str, tuple[Callable[[], Any], Any]] = {
        "moments": (lambda: _moments()[0], Moments),
        "aligner": (lambda: ReAlign.from_moments(*_moments(), method="coral"), ReAlign),
        "space": (_space, SharedSpace),
        "frame": (lambda: FixedFrame.fit(*_moments()), FixedFrame),
    }
    for name, (thing, kind) in objects.items():
        file = f"{name}.safetensors"
        load = lambda folder, k=kind, f=file: k.load(folder / f)  # noqa: E731
        yield name, Target(file, partial(_saved, thing), load)
    records = "__realign__/"
    yield (
        "manifest",
        Target(
            f"{records}manifest.json",
            partial(_output_seed, f"{records}manifest.json"),
            lambda folder: read_manifest(storage_path(folder / records)),
        ),
    )
    resumed = {
        "resume-manifest": "manifest.json",
        "resume-aligner": "aligner.safetensors",
        "resume-statistics": "_stats/source-moments/*.safetensors",
        "resume-result": "_stats/apply/*.json",
    }
    for name, pattern in resumed.items():
        found = sorted(_output().glob(records + pattern))
        file = str(found[0].relative_to(_output()))
        yield name, Target(file, partial(_output_seed, file), _resume, _copy_output)


@cache
def targets() -> dict[str, Target]:
    """Return all targets by name."""
    return dict(_targets())


def place(target: Target, folder: Path, data: bytes) -> None:
    """Make a folder with the files of a target, ``data`` among them."""
    folder.mkdir()
    target.prepare(folder)
    path = folder / target.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def fault_of(target: Target, folder: Path, data: bytes) -> str:
    """Read hostile contents; return what is wrong with the answer, or an empty text."""
    try:
        place(target, folder, data)
        try:
            target.read(folder)
        except REFUSALS as error:
            if str(folder) in str(error) or (isinstance(error, OSError) and error.filename):
                return ""
            return f"an error that does not name the file: {type(error).__name__}: {error}"
        return ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)
