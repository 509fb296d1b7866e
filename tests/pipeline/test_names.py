"""Any name that the file system has is a name of sources, shards and outputs."""

import io
import os
import sys

import numpy as np
import pytest

from realign_fast import ReAlign
from realign_fast.cli import main
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify

QUIET = Settings(progress=False)
NAMES = [b"x\xff\xfe", b"a\nb", b" ", b"-", "\u00fc".encode(), b"%41?#", b"\xed\xa0\x80"]


@pytest.fixture(params=NAMES)
def corpora(request, tmp_path):
    """``(source, target, output)`` with a strange name for the source, its shard and the output."""
    name = os.fsdecode(request.param)
    generator = np.random.default_rng(0)
    for folder, shard in (
        (tmp_path / f"text-{name}", f"a{name}.npy"),
        (tmp_path / "image", "a.npy"),
    ):
        folder.mkdir()
        np.save(folder / shard, generator.standard_normal((40, 8)).astype("f4"))
    return tmp_path / f"text-{name}", tmp_path / "image", tmp_path / f"out-{name}"


def test_a_run_is_resumed_and_verified_whatever_the_names_are(corpora):
    source, target, out = corpora
    align(source, target, out, QUIET)
    assert verify(out)[1] == [] and ReAlign.from_pretrained(out).dimension == 8
    assert [path.name for path in out.glob("*.npy")] == [path.name for path in source.iterdir()]
    assert [done["rows"] for done in align(source, target, out, QUIET)["passes"]] == [0] * 4


def test_a_name_that_is_not_utf_8_is_printed_with_escapes(corpora, monkeypatch):
    source, target, out = corpora
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", "strict"))
    sides = ["--source", str(source), "--target", str(target)]
    assert main.main(["align", *sides, "--out", str(out), "--quiet"]) == 0
    assert main.main(["verify", str(out)]) == 0
    sys.stdout.flush()
    escaped = os.fsencode(out).decode(errors="backslashreplace")
    assert f"{escaped}: 1 shards, 40 rows" in printed.getvalue().decode()
