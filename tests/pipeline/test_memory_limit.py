"""Under a limit of address space (``ulimit -v``) a command ends with one error, or as usual."""

import contextlib
import mmap
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from realign_fast.cli import main
from realign_fast.cli.app import ExitCode
from realign_fast.corpus import Corpus
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify
from realign_fast.storage.errors import NoMemoryError, lacks_memory, memory_explained
from realign_fast.storage.paths import explained


@contextlib.contextmanager
def address_space(extra):
    """Let this process have ``extra`` bytes more than it has, and then any number again."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text and image of 100 MB each, and what align makes of them."""
    folder = tmp_path_factory.mktemp("limit")
    for side in ("text", "image"):
        (folder / side).mkdir()
        rows = np.random.default_rng(len(side)).standard_normal((1 << 18, 96), dtype="f4")
        np.save(folder / side / "a.npy", rows)
    sides = ["--text", str(folder / "text"), "--image", str(folder / "image")]
    assert main.main(["align", *sides, "--out", str(folder / "out"), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("extra", [0, 10 << 20, 40 << 20, 90 << 20])
@pytest.mark.parametrize("command", ["align", "verify"])
def test_a_command_is_one_error_or_done(command, extra, folder, tmp_path, capsys):
    sides = ["--text", f"{folder}/text", "--image", f"{folder}/image"]
    writing = ["--out", str(tmp_path / "out"), "--batch-bytes", str(30 << 20), "--quiet"]
    commands = {
        "align": ["align", *sides, *writing],
        "verify": ["verify", f"{folder}/out"],
    }
    with address_space(extra):
        status = main.main(commands[command])
    error = capsys.readouterr().err
    assert status in (0, ExitCode.SPACE), error
    if status:
        (line,) = error.splitlines()
        assert line.startswith("realign-fast: error: memory ran out (") and "ulimit -v" in line
    if extra == 0:
        assert status == ExitCode.SPACE


def test_the_functions_behind_the_commands_raise_that_error(folder, tmp_path):
    corpora = Corpus(folder / "text"), Corpus(folder / "image")
    settings = Settings(progress=False, batch_bytes=30 << 20)
    calls = (
        lambda: align(*corpora, tmp_path / "out", settings),
        lambda: verify(folder / "out"),
    )
    for call in calls:
        with pytest.raises(NoMemoryError, match="ulimit -v"), address_space(0):
            call()


def test_each_library_says_that_memory_ran_out_and_one_error_is_raised(tmp_path):
    (tmp_path / "a.npy").write_bytes(bytes(1 << 20))

    def map_file():
        with explained(tmp_path / "a.npy"), open(tmp_path / "a.npy", "rb") as file:
            mmap.mmap(file.fileno(), 1 << 20, access=mmap.ACCESS_READ)

    for ask in (lambda: np.empty(1 << 40), lambda: torch.empty(1 << 50), map_file):
        with pytest.raises(OSError, match=r"^\[Errno 12\] memory ran out \(.*\); what is finished"):
            with memory_explained(), address_space(0):
                ask()


def test_other_errors_are_raised_as_they_are():
    for error in (ValueError("/data/alloc/a.npy: truncated"), KeyError("out of memory")):
        assert not lacks_memory(error)
        with pytest.raises(type(error)), memory_explained():
            raise error
