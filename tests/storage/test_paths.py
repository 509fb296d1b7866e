"""Local and remote paths answer the same questions in the same way, and writes are atomic."""

import hashlib
import os
import pickle
from pathlib import Path

import fsspec
import pytest

from realign_fast.storage.atomic import partial_path, pending_file, replaced
from realign_fast.storage.paths import (
    LocalPath,
    explained,
    local_path,
    map_concurrently,
    output_path,
    storage_path,
    write_json,
    write_whole,
)
from realign_fast.storage.read_ahead import pieces
from realign_fast.storage.url import Url


@pytest.fixture(params=("local", "memory"))
def folder(request, tmp_path):
    """A directory of each implementation, with `rows.bin` and `inner/` in it."""
    fsspec.filesystem("memory").store.clear()
    root = storage_path(tmp_path if request.param == "local" else "memory://folder")
    for name in ("rows.bin", "inner/more.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_whole(b"0123456789")
    return root


def test_both_kinds_of_path_list_and_describe_what_is_there(folder):
    """Names, kinds and sizes are those that were written; nothing else appears."""
    assert sorted(folder.listed()) == [("inner", True), ("rows.bin", False)]
    assert {path.name for path in folder.iterdir()} == {"inner", "rows.bin"}
    assert folder.is_dir() and (folder / "rows.bin").is_file()
    assert not (folder / "absent").exists()
    assert (folder / "rows.bin").stamp()[0] == 10
    identity = (folder / "rows.bin").identity()
    assert identity["path"] == str((folder / "rows.bin").resolve()) and identity["size"] == 10
    assert (folder / "inner/more.bin").is_within(folder) and folder.is_within(folder)
    assert not folder.is_within(folder / "inner")


def test_both_kinds_of_path_read_the_same_bytes(folder):
    """Every way to read gives the content, at any offset."""
    path = folder / "rows.bin"
    with path.opened() as file:
        assert (file.stamp()[0], file.pread(4, 3), file.pread(4, 8)) == (10, b"3456", b"89")
        assert b"".join(pieces(file.pread, 2, 7)) == b"23456"
    with path.open("rb") as data:
        assert data.read(6) == b"012345"
    for stamp in (None, path.stamp()):
        with path.local_copy(stamp) as copy:
            assert Path(copy).read_bytes() == path.read_bytes() == b"0123456789"


def test_both_kinds_of_path_write_files_that_appear_when_they_are_committed(folder):
    """A file that is discarded leaves what was there, and no other name."""
    path = folder / "rows.bin"
    with pytest.raises(KeyboardInterrupt), path.pending_file() as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"0123456789"
    with path.pending_file() as file:
        file.write(b"whole")
        assert path.read_bytes() == b"0123456789"
    assert path.read_bytes() == b"whole"
    assert {entry.name for entry in folder.iterdir()} == {"inner", "rows.bin"}


def test_both_kinds_of_path_remove_files(folder):
    """Removing an absent file is an error unless allowed."""
    (folder / "rows.bin").unlink()
    (folder / "rows.bin").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "rows.bin").unlink()


def test_paths_are_equal_hashed_sorted_and_pickled_by_their_text(folder):
    """A path is the same in another process, and a local one is its ``pathlib.Path``."""
    path = folder / "rows.bin"
    assert pickle.loads(pickle.dumps(path)) == path and len({path, folder / "rows.bin"}) == 1
    assert type(pickle.loads(pickle.dumps(path))) is type(path)
    assert min(folder / "b", folder / "a").name == "a"
    if isinstance(path, LocalPath):
        assert path == Path(str(path)) and hash(path) == hash(Path(str(path)))


def test_an_argument_becomes_a_local_path_or_a_url(tmp_path):
    """Text, ``pathlib`` paths and URLs are accepted; a file: URL is local."""
    assert storage_path(str(tmp_path)) == storage_path(tmp_path) == LocalPath(tmp_path)
    assert storage_path(f"file://{tmp_path}") == LocalPath(tmp_path)
    assert isinstance(storage_path("s3://bucket/text"), Url)
    assert storage_path(storage_path("s3://bucket/text")) == Url("s3://bucket/text")
    with pytest.raises(ValueError, match="s3://b/x: is a URL, this is written to a directory"):
        local_path("s3://b/x")
    with pytest.raises(ValueError, match=r"https://host/x: is read only: a web server takes no"):
        output_path("https://host/x")
    with pytest.raises(ValueError, match=r"is read only: a chain of systems takes no files"):
        output_path("simplecache::s3://b/x")


def test_links_are_followed_and_named(tmp_path):
    """A link lies where its target lies, and an error names both."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert storage_path(tmp_path / "link").is_within(storage_path(tmp_path / "real"))
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"broken \(a link to .*absent\): No such file"):
        storage_path(tmp_path / "broken").stamp()


def test_an_error_is_explained_once(tmp_path):
    """The message names the file and an advice, however many layers explain it."""
    path = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as caught, explained(path), explained(path):
        open(path)
    assert str(caught.value).count(str(path)) == 1
    with pytest.raises(FileNotFoundError, match=r"absent/x: .*check that the directory exists"):
        write_whole(path / "x", b"")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="has no file whose read fails")
def test_an_error_of_a_read_names_the_file():
    """The system names none: it knows a file that is open by its number."""
    with pytest.raises(OSError, match=r"^\[Errno 5\] /proc/self/mem: Input/output error; check"):
        local_path("/proc/self/mem").read_bytes()


def test_json_is_written_into_a_new_directory(tmp_path):
    """The directory is made; a number that json lacks is refused and leaves nothing."""
    write_json(tmp_path / "new/x.json", {"a": 1})
    assert (tmp_path / "new/x.json").read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "new/x.json", {"a": float("nan")})
    assert os.listdir(tmp_path / "new") == ["x.json"]


@pytest.mark.parametrize("is_directory", (False, True))
def test_what_a_library_wrote_replaces_a_path_whole_or_not_at_all(is_directory, tmp_path):
    """`replaced` renames a file or directory on success and removes it after an error."""

    def make(partial):
        if is_directory:
            partial.mkdir()
            partial = partial / "content"
        partial.write_text("new")

    target = tmp_path / "target"
    make(tmp_path / ".target.partial")  # a killed process left this
    with pytest.raises(KeyboardInterrupt), replaced(target) as partial:
        make(partial)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with replaced(target) as partial:
        make(partial)
        assert not target.exists()
    assert os.listdir(tmp_path) == ["target"]
    assert (target / "content" if is_directory else target).read_text() == "new"


def test_items_are_mapped_in_order_whatever_runs_at_a_time(tmp_path):
    """Results keep the order of the items for one thread, several threads, and URLs."""
    numbers = list(range(40))
    for path, threads in ((tmp_path, 1), (tmp_path, 4), ("memory://x", 1)):
        root = storage_path(path)
        squares = map_concurrently(lambda n: n * n, numbers, lambda n, root=root: root, threads)
        assert squares == [number**2 for number in numbers]


@pytest.mark.parametrize("length", [1, 200, 245, 246, 247, 254, 255])
def test_names_of_any_length_have_a_temporary_name(length, tmp_path):
    """A name stands in its temporary name while that has at most 255 bytes, and then its hash."""
    path = tmp_path / ("é" * (length // 2) + "x" * (length % 2))
    partial = partial_path(path)
    if length <= 246:
        assert partial.name == f".{path.name}.partial"
    else:
        digest = hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()
        assert partial.name == f".{digest}.hashed.partial"
    with pending_file(path) as file:
        file.write(b"rows")
        assert os.listdir(tmp_path) == [partial.name]
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"rows"


def test_a_file_is_whole_before_it_gets_its_name(tmp_path, monkeypatch):
    """What is written is out of this process before the sync; every descriptor is closed."""
    seen, sync, replace = [], os.fsync, os.replace
    partial = tmp_path / ".x.partial"

    def noted_sync(descriptor):
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert len(seen) > 1 or partial.read_bytes() == b"rows"
        sync(descriptor)

    def noted_replace(source, target):
        seen.append((str(source), Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    before = os.listdir("/proc/self/fd")
    with pending_file(tmp_path / "x") as file:
        file.write(b"rows")
    assert seen == [str(partial), (str(partial), b"rows"), str(tmp_path)]
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_block_that_fails_leaves_the_file_of_before_and_nothing_else(tmp_path):
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), pending_file(tmp_path / "x") as file:
        file.write(b"rows")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"before"
