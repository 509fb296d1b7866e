"""No file is written through a link that others left, and file systems may lack syncs and locks."""

import errno
import fcntl
import os
import resource
import stat
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from realign_fast.corpus import ShardWriter
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.engines.local import Processes
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify
from realign_fast.storage import atomic
from realign_fast.storage.atomic import partial_path, replaced
from realign_fast.storage.lock import locked
from realign_fast.storage.paths import storage_path, write_json, write_whole

QUIET = Settings(progress=False)


def write_rows(path):
    with ShardWriter(path, 3, 2, torch.float32) as writer:
        writer.write(torch.ones(3, 2))


def write_as_a_library(path):
    with replaced(path) as partial:
        partial.write_bytes(b"new")


WRITERS = {
    "whole": lambda path: write_whole(path, b"new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "shard": write_rows,
    "library": write_as_a_library,
}


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"precious")
    yield tmp_path / "victim"
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (tmp_path / "folder/file").read_bytes() == b"precious"
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("kind", ["link", "hard link", "link to a folder", "link to nothing"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(writer, kind, tmp_path, victim):
    path = tmp_path / "out/a.npy"
    path.parent.mkdir()
    for planted in (path, partial_path(path)):
        if kind == "hard link":
            planted.hardlink_to(victim)
        elif kind == "link":
            planted.symlink_to(victim)
        elif kind == "link to a folder":
            planted.symlink_to(tmp_path / "folder")
        else:
            planted.symlink_to(tmp_path / "created")
    WRITERS[writer](path)
    assert stat.S_ISREG(path.lstat().st_mode) and path.stat().st_nlink == 1
    assert os.listdir(tmp_path / "out") == ["a.npy"] and path.stat().st_size > 2
    assert not (tmp_path / "created").exists()


def test_a_link_that_comes_while_a_file_is_written_is_not_followed(tmp_path, victim):
    path = storage_path(tmp_path / "a.npy")
    with pytest.raises(OSError, match="Another writer took over"), path.pending_file() as file:
        partial_path(path).unlink()
        partial_path(path).symlink_to(victim)
        file.write(b"new")
    assert not path.exists() and partial_path(path).is_symlink()


@pytest.mark.parametrize("target", ["victim", "created"])
@pytest.mark.parametrize("name", ["lock", "lock-1-of-2"])
def test_a_lock_is_never_a_link(name, target, tmp_path, victim):
    folder = tmp_path / "out/__realign__/_stats"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path / target)
    with pytest.raises(OSError, match=rf"/{name}: is a link to {tmp_path}/{target}.* remove it"):
        with locked(folder, "" if name == "lock" else "1-of-2"):
            pass
    assert not (tmp_path / "created").exists()


def test_an_output_that_is_a_file_is_said(tmp_path):
    """The message names the file that was given, not the lock that would lie in it."""
    out = tmp_path / "text.npy"
    out.write_bytes(b"rows")
    with pytest.raises(NotADirectoryError, match=r"text\.npy: is a file, and --out is a directory"):
        with locked(out / "__realign__/_stats"):
            pass
    assert out.read_bytes() == b"rows"


def test_a_lock_with_a_second_name_is_held_and_not_written(tmp_path, victim):
    (tmp_path / "_stats").mkdir()
    (tmp_path / "_stats/lock").hardlink_to(victim)
    with locked(tmp_path / "_stats"):
        with pytest.raises(OSError, match="is working on it"), locked(tmp_path / "_stats"):
            pass


def of_another_user(link, monkeypatch):
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: link.lstat().st_uid + 1)
    else:
        os.chown(link, 12345, 12345, follow_symlinks=False)


@pytest.mark.parametrize(
    "name", ["__realign__/_stats", "text_emb", "__realign__/_stats/source-moments"]
)
def test_a_folder_that_is_a_link_of_another_user_is_refused(name, tmp_path, victim, monkeypatch):
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "folder")
    with monkeypatch.context() as patch:
        of_another_user(link, patch)
        with pytest.raises(OSError, match=rf"{name}: is a link to .*folder that user .*remove it"):
            with locked(tmp_path / "out/__realign__/_stats"):
                pass
    link.unlink()
    with locked(tmp_path / "out/__realign__/_stats"):
        pass


def write_corpora(folder):
    generator = np.random.default_rng(0)
    for side in ("text", "image"):
        (folder / side).mkdir()
        np.save(folder / side / "a.npy", generator.standard_normal((40, 8)).astype("f4"))
    return folder / "text", folder / "image"


def test_a_run_into_a_folder_full_of_links_is_a_run_into_an_empty_one(tmp_path, victim):
    sides = write_corpora(tmp_path)
    align(*sides, tmp_path / "clean", QUIET)
    files = [path for path in (tmp_path / "clean").rglob("*") if path.is_file()]
    names = [path.relative_to(tmp_path / "clean") for path in files if path.name != "lock"]
    assert len(names) == 9  # shard, aligner, manifest, report, statistics of four passes, a record
    for name in names:
        planted = partial_path(tmp_path / "out" / name)
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.symlink_to(victim)
    align(*sides, tmp_path / "out", QUIET)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert verify(tmp_path / "out")[1] == []


@pytest.fixture
def unsyncable(monkeypatch):
    """A file system that refuses to sync a directory with the error that is set."""
    refusal, fsync = {"errno": errno.EINVAL}, os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal["errno"], os.strerror(refusal["errno"]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(atomic, "_unsynced", set())
    return refusal


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS", "EACCES", "EPERM", "EBADF"])
def test_a_folder_that_cannot_be_synced_is_said_once(name, tmp_path, unsyncable):
    unsyncable["errno"] = getattr(errno, name)
    sides = write_corpora(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        align(*sides, tmp_path / "out", QUIET)
        with replaced(tmp_path / "out/tree") as partial:
            partial.mkdir()
    assert verify(tmp_path / "out")[1] == [] and (tmp_path / "out/tree").is_dir()
    (message,) = [str(warning.message) for warning in caught]
    assert f"{tmp_path}/out" in message and "cannot sync" in message


def test_a_sync_that_loses_data_is_an_error(tmp_path, unsyncable):
    unsyncable["errno"] = errno.EIO
    with pytest.raises(OSError, match=rf"{tmp_path}/a: Input/output error; check that"):
        write_whole(tmp_path / "a", b"new")


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_an_error_of_the_lock_itself_names_the_file(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=rf"{tmp_path}/lock: {os.strerror(code)}; check that"):
        with locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=rf"{tmp_path}/lock: this file system has no locks"):
        with locked(tmp_path):
            pass


@pytest.fixture
def full_disk():
    """Files of this process end at 20,000 bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_scratch_disk_is_named_by_what_was_written_there(full_disk):
    remote = storage_path("memory://links/a")
    remote.write_whole(bytes(40_000))
    with pytest.raises(OSError, match=r"memory://links/a: File too large in its scratch file in"):
        with remote.local_copy():
            pass
    with pytest.raises(OSError, match=r"/realign-fast-task-.*: File too large; check that"):
        list(Processes(2)(partial(len, bytes(40_000)), range(2)))


@pytest.mark.parametrize("kind", ["missing", "file", "read-only"])
def test_a_tmpdir_that_cannot_be_written_to_is_refused(kind, tmp_path, monkeypatch):
    """Python would write to /tmp instead: the lock, the shards and the copies of sources."""
    place = tmp_path / kind
    if kind == "file":
        place.write_bytes(b"")
    elif kind == "read-only":
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write anywhere")
    remote = storage_path(f"memory://tmpdir/{kind}/a")
    remote.write_whole(b"before")

    def write():
        with remote.pending_file() as file:
            file.write(b"after")

    def fetch():
        with remote.local_copy() as path:
            return path.read_bytes()

    def lock():
        with locked(remote.parent / "locks"):
            pass

    monkeypatch.setenv("TMPDIR", str(place))
    for use in (write, fetch, lock):
        with pytest.raises(OSError, match=f"TMPDIR is {place}: expected a directory"):
            use()
    assert remote.read_bytes() == b"before" and not (remote.parent / "locks").exists()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    write(), lock()
    assert fetch() == b"after"
