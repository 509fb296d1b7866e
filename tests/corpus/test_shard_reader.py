"""The native reader: bytes of a file in mapped blocks."""

import errno
import gc
import os
import re
import sys
import threading
import time

import pytest

io = pytest.importorskip("realign_fast._io", reason="the native reader was not built")

PAGE = 4096


@pytest.fixture
def content():
    return os.urandom(10 * PAGE + 123)


@pytest.fixture
def file(tmp_path, content):
    path = tmp_path / "rows"
    path.write_bytes(content)
    with open(path, "rb") as file:
        yield file


@pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (2, 1), (5, 3), (100, 8)])
@pytest.mark.parametrize("block_bytes", [1, 777, PAGE, 3 * PAGE + 1, 1 << 20])
@pytest.mark.parametrize(("begin", "end"), [(0, None), (128, None), (PAGE + 3, 2 * PAGE + 5)])
def test_blocks_are_the_bytes(file, content, ahead, threads, block_bytes, begin, end):
    begin = begin if block_bytes > 1 else len(content) - 300
    end = end if block_bytes > 1 and end else len(content)
    options = {"ahead": ahead, "threads": threads}
    blocks = io.ShardReader(file.fileno(), begin, end, block_bytes, **options)
    pieces = [bytes(block) for block in blocks]
    assert b"".join(pieces) == content[begin:end]
    assert {len(piece) for piece in pieces[:-1]} <= {block_bytes}
    assert len(pieces) == -(-(end - begin) // block_bytes)


def test_kept_blocks_stay_as_they_are(file, content):
    kept = list(io.ShardReader(file.fileno(), 0, len(content), 1000))
    assert b"".join(map(bytes, kept)) == content
    assert len({block.address for block in kept}) == len(kept)


def test_writes_to_a_block_never_reach_the_file(file, content):
    for block in io.ShardReader(file.fileno(), 0, len(content), PAGE):
        memoryview(block)[0] ^= 0xFF
    assert os.pread(file.fileno(), len(content), 0) == content


def test_the_pages_of_a_block_go_with_it_and_no_others(tmp_path):
    """Blocks share a mapping: what is written to a block stays while another is let go of."""
    content = os.urandom(64 << 20)
    path = tmp_path / "rows"
    path.write_bytes(content)
    with open(path, "rb") as file:
        size, kept = (4 << 20) + 777, []
        blocks = io.ShardReader(file.fileno(), 99, len(content), size, ahead=1, threads=1)
        for number, block in enumerate(blocks):
            if number % 3 == 1:
                memoryview(block)[:] = bytes(len(block))
                kept.append(block)
            else:
                assert bytes(block) == content[99 + number * size :][:size]
            del block
        assert all(not any(bytes(block)) for block in kept)
        assert resident_bytes(path) < len(content) / 2
    assert path.read_bytes() == content


def resident_bytes(path):
    """Return how much of the mappings of a file this process has in memory."""
    with open("/proc/self/smaps") as lines:
        entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", lines.read(), flags=re.MULTILINE)
    mine = [entry for entry in entries if entry.partition("\n")[0].endswith(str(path))]
    assert mine
    return sum(int(re.search(r"^Rss: +(\d+)", entry, re.MULTILINE)[1]) << 10 for entry in mine)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_ends_early_is_an_error(file, content, threads):
    reader = io.ShardReader(file.fileno(), 0, len(content) + 1, PAGE, ahead=1, threads=threads)
    with pytest.raises(EOFError):
        list(reader)
    with pytest.raises(EOFError):  # and stays one
        next(reader)


def test_an_error_of_the_system_keeps_its_number(tmp_path):
    with pytest.raises(OSError) as caught:
        io.ShardReader(987654, 0, 10, 10)
    assert caught.value.errno == errno.EBADF
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            list(io.ShardReader(directory, 0, 10, 10))
        assert caught.value.errno == errno.ENODEV  # a directory cannot be mapped
    finally:
        os.close(directory)


@pytest.mark.parametrize("arguments", [(-1, 5, 1), (5, 4, 1), (0, 5, 0)])
def test_bad_ranges_are_refused(file, arguments):
    with pytest.raises(ValueError, match="expected 0 <= begin <= end"):
        io.ShardReader(file.fileno(), *arguments)
    with pytest.raises(ValueError, match="threads 0"):
        io.ShardReader(file.fileno(), 0, 9, 1 << 20, threads=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda file: io.Block(),  # nothing would be in it
        lambda file: io.ChunkFacts(),
        lambda file: io.ShardReader(file, 0, 10, 10),
        lambda file: io.ShardReader(file.fileno(), 0, 10, 10, 2),
        lambda file: io.ShardReader(file.fileno(), 0, 10, 10, ahead="two"),
        lambda file: io.ShardReader(file.fileno(), 0, 10, 10, cached=True),
        lambda file: io.PickledRows(file.fileno(), 10, ("a", 1), 100),
        lambda file: io.PickledRows(file.fileno(), 10, None, 100),
        lambda file: io.read_chunks(file.fileno()),
        lambda file: io.MappedBuffer(3),
    ],
)
def test_wrong_arguments_are_type_errors(file, wrong):
    with pytest.raises(TypeError):
        wrong(file)


def test_objects_hold_and_release_their_references(file, content):
    """The module counts references by hand: those of types, of buffers and of returned values."""

    def use_everything():
        blocks = list(io.ShardReader(file.fileno(), 0, 3 * PAGE, PAGE))
        views = [memoryview(block) for block in blocks]
        for wrong in (lambda: io.ShardReader(-1, 0, 9, 9), lambda: io.ShardReader("two")):
            with pytest.raises((OSError, TypeError)):
                wrong()
        mapped = io.MappedBuffer(content)
        assert not mapped.lost
        with pytest.raises(io.NotPlain):
            io.PickledRows(file.fileno(), len(content), ("rows",), 100)
        with pytest.raises(io.NotPlain):
            io.read_chunks(file.fileno(), 0)
        assert b"".join(map(bytes, views)) == content[: 3 * PAGE]

    def counts():
        gc.collect()
        types = [io.Block, io.ShardReader, io.MappedBuffer, io.PickledRows, io.NotPlain]
        return [sys.getrefcount(held) for held in (*types, content, None)]

    use_everything()
    before = counts()
    for _ in range(1000):
        use_everything()
    changes = [after - count for after, count in zip(counts(), before, strict=True)]
    assert changes[:-1] == [0] * len(changes[:-1])
    assert abs(changes[-1]) < 500  # None, which others count too


def test_nothing_is_read_of_an_empty_range(file):
    assert list(io.ShardReader(file.fileno(), 7, 7, 10)) == []


def test_a_reader_can_be_left_at_any_moment(file, content):
    """Its threads end with it, and its descriptor is closed."""

    def held():
        return [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]

    descriptors, threads = held()
    for taken in range(12):
        reader = io.ShardReader(file.fileno(), 0, len(content), PAGE, ahead=4, threads=3)
        blocks = [next(reader) for _ in range(min(taken, 11))]
        del reader
        gc.collect()
        assert b"".join(map(bytes, blocks)) == content[: len(blocks) * PAGE]
    deadline = time.monotonic() + 20  # (the system may list a thread for a moment after its end)
    while held() > [descriptors, threads] and time.monotonic() < deadline:
        time.sleep(0.01)
    now_descriptors, now_threads = held()
    assert now_descriptors <= descriptors  # (fewer, if another test's file is closed meanwhile)
    assert now_threads <= threads


def test_it_reads_ahead_and_no_further(tmp_path):
    """Pages in memory say how far it has come: three blocks ahead of the one that is held."""
    path = tmp_path / "rows"
    path.write_bytes(os.urandom(8 << 20))
    with open(path, "rb") as file:
        reader = io.ShardReader(file.fileno(), 0, 8 << 20, 1 << 20, ahead=3, threads=3)
        held = next(reader)
        deadline = time.monotonic() + 20
        while resident_bytes(path) < 4 << 20 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert resident_bytes(path) == 4 << 20
        assert len(held) == 1 << 20


def test_readers_of_several_threads(file, content):
    results = []

    def read():
        blocks = io.ShardReader(file.fileno(), 0, len(content), 500)
        results.append(b"".join(map(bytes, blocks)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content] * 4


def test_threads_share_one_reader(file, content):
    """Each block is given once, and every thread comes to the end."""

    def read(reader, blocks):
        blocks.extend(map(bytes, reader))

    for _ in range(20):
        reader = io.ShardReader(file.fileno(), 0, len(content), 500, ahead=4, threads=4)
        blocks = []
        threads = [
            threading.Thread(target=read, args=(reader, blocks), daemon=True) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert sorted(blocks) == sorted(content[i : i + 500] for i in range(0, len(content), 500))


def test_threads_share_the_error_of_one_reader(file, content):
    reader = io.ShardReader(file.fileno(), 0, len(content) + 1, PAGE, ahead=2, threads=2)
    errors = []

    def read():
        try:
            list(reader)
        except EOFError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 3


def test_a_forked_process_refuses_the_reader_and_ends(file, content):
    """Its threads do not exist there: neither the next block nor the end may wait for them."""
    reader = io.ShardReader(file.fileno(), 0, len(content), 500, ahead=4, threads=4)
    begin = bytes(next(reader))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            next(reader)
        except RuntimeError as error:
            code = 0 if "was forked" in str(error) else 2
        del reader
        os._exit(code)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    assert begin + b"".join(map(bytes, reader)) == content
