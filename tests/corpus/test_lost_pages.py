"""Files that another process cuts off while they are read: an error that names the file."""

import json
import os
import pickle
import re
import signal
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import programs

pytestmark = pytest.mark.usefixtures("needs_the_reader")

ROWS, COLUMNS = 4000, 256

READ = """
import os, sys
from realign_fast.corpus import Corpus, io_extension
from realign_fast.corpus.formats import arrow_columns
io_extension.survive_lost_pages()
rows_of = arrow_columns.rows_of
def cut_rows_of(values, shard, first):  # between the look at the size and the copy
    os.truncate(shard.path, 200)
    return rows_of(values, shard, first)
arrow_columns.rows_of = cut_rows_of
for path in sys.argv[1:]:
    try:
        for batch in Corpus(path, allow_pickle=True).batches(batch_rows=1000):
            os.truncate(path, 200)
            batch.rows.sum()
        print("read")
    except ValueError as error:
        print(error)
"""

CUT = """
import os
from realign_fast.corpus.shard import ContiguousShard
read = ContiguousShard._read_blocks
def cut(shard, *arguments):
    for rows in read(shard, *arguments):
        if shard.path.name.startswith("cut"):
            os.truncate(shard.path, 200)
        yield rows
ContiguousShard._read_blocks = cut
"""


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype("f4")


def save_tensors(path, rows, padding=0):
    entry = {"dtype": "F32", "shape": rows.shape, "data_offsets": [0, rows.nbytes]}
    head = json.dumps({"embedding": entry}).encode()
    head += b" " * (-len(head) % 8 + padding)
    path.write_bytes(struct.pack("<Q", len(head)) + head + rows.tobytes())


def run(arguments, folder):
    environment = os.environ | {"PYTHONPATH": f"{folder}:{os.getcwd()}"}
    return programs.run(*arguments, env=environment, timeout=300)


def test_every_format_reports_a_file_that_is_cut_off(tmp_path, rows):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), COLUMNS)
    table = pa.table({"embedding": vectors})
    np.save(tmp_path / "x.npy", rows)
    save_tensors(tmp_path / "x.safetensors", rows)
    save_tensors(tmp_path / "odd.safetensors", rows, padding=1)
    pq.write_table(table, tmp_path / "plain.parquet", compression="none", use_dictionary=False)
    pq.write_table(table, tmp_path / "x.parquet")
    for name, writer in (("x.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table, 1500)
    entries = [{"id": i, "embed": row} for i, row in enumerate(rows)]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(entries, 4))
    paths = sorted(tmp_path.iterdir())
    ended = run(["-c", READ, *paths], tmp_path)
    assert ended.returncode == 0, ended.stderr
    expected = [f"{path}: changed while it was read" for path in paths]
    for line, start in zip(ended.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("command", ["align", "align, bad rows", "align with workers", "convert"])
def test_a_command_reports_a_file_that_is_cut_off(tmp_path, rows, command):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(CUT)
    (tmp_path / "in").mkdir()
    for name in ("cut_0", "x_1"):
        np.save(tmp_path / "in" / f"{name}.npy", rows)
    np.save(tmp_path / "target.npy", -rows[:1000])
    out = tmp_path / "out"
    arguments = ["align", "--text", tmp_path / "in", "--image", tmp_path / "target.npy"]
    arguments += ["--out", out, "--quiet", "--batch-bytes", "1000000"]
    arguments += ["--workers", "2"] if command == "align with workers" else []
    arguments += ["--bad-rows", "skip"] if command == "align, bad rows" else []
    if command == "convert":
        arguments = ["convert", tmp_path / "in", out, "--to", "safetensors", "--quiet"]
    ended = run(["-m", "realign_fast", *arguments], tmp_path / "hook")
    assert ended.returncode == 3, (ended.returncode, ended.stderr)
    assert re.search(r"cut_0\.npy: changed (while it was read|during the run)", ended.stderr)
    assert not list(out.glob("**/cut_0.[ns]*"))


@pytest.mark.parametrize("before", ["nothing", "faulthandler"])
def test_other_bus_errors_end_the_process_as_before(tmp_path, before):
    """A map that is not ours, and a signal that is sent."""
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    begin = """
import faulthandler, mmap, os, signal
from realign_fast.corpus import io_extension
"""
    begin += "faulthandler.enable()\n" if before == "faulthandler" else ""
    begin += "io_extension.survive_lost_pages()\n"
    touch = f"""
with open({str(tmp_path / "x")!r}, "r+b") as file:
    data = mmap.mmap(file.fileno(), 0)
    file.truncate(10)
    data[100_000]
"""
    for end in (touch, "os.kill(os.getpid(), signal.SIGBUS)"):
        ended = run(["-c", begin + end], tmp_path)
        assert ended.returncode == -signal.SIGBUS
        assert ("Fatal Python error: Bus error" in ended.stderr) == (before == "faulthandler")


def test_a_library_installs_no_handler(tmp_path):
    lines = "from realign_fast.corpus import Corpus; import signal, ctypes; "
    lines += "print([line for line in open('/proc/self/status') if line.startswith('SigCgt')][0])"
    ended = run(["-c", lines], tmp_path)
    caught = int(ended.stdout.split()[1], 16)
    assert not caught >> (signal.SIGBUS - 1) & 1
