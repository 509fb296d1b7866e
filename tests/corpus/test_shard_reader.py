"""The native reader: bytes of a file in blocks, by mapping or through a ring of buffers."""

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


def ring(block_bytes, buffers=2):
    return io.Ring(buffers, block_bytes)


@pytest.mark.parametrize("through_ring", [False, True])
@pytest.mark.parametrize(("ahead", "threads"), [(1, 0), (1, 1), (2, 1), (5, 3), (100, 8)])
@pytest.mark.parametrize("block_bytes", [1, 777, PAGE, 3 * PAGE + 1, 1 << 20])
@pytest.mark.parametrize(("begin", "end"), [(0, None), (128, None), (PAGE + 3, 2 * PAGE + 5)])
def test_blocks_are_the_bytes(file, content, through_ring, ahead, threads, block_bytes, begin, end):
    begin = begin if block_bytes > 1 else len(content) - 300
    end = end if block_bytes > 1 and end else len(content)
    options = {"ahead": ahead, "threads": threads}
    options |= {"ring": ring(block_bytes)} if through_ring else {}
    blocks = io.ShardReader(file.fileno(), begin, end, block_bytes, **options)
    pieces = [bytes(block) for block in blocks]
    assert b"".join(pieces) == content[begin:end]
    assert {len(piece) for piece in pieces[:-1]} <= {block_bytes}
    assert len(pieces) == -(-(end - begin) // block_bytes)


@pytest.mark.parametrize("through_ring", [False, True])
def test_kept_blocks_stay_as_they_are(file, content, through_ring):
    """More of them than the ring has buffers; none waits for another to be given back."""
    options = {"ring": ring(1000)} if through_ring else {}
    kept = list(io.ShardReader(file.fileno(), 0, len(content), 1000, **options))
    assert b"".join(map(bytes, kept)) == content
    assert len({block.address for block in kept}) == len(kept)


def test_a_ring_is_used_again_and_again(file, content):
    buffers = ring(1000)
    assert all(address % PAGE == 0 for address in buffers.addresses)
    for _ in range(2):
        used = set()
        for block in io.ShardReader(file.fileno(), 0, len(content), 1000, ahead=1, ring=buffers):
            used.add(block.address)
            del block
        assert used <= set(buffers.addresses)


def test_a_ring_reads_past_the_cache_where_it_can(tmp_path, content):
    """Every file system has the ring; what cannot do O_DIRECT is read as usual."""
    for folder in (tmp_path, "/dev/shm"):
        path = os.path.join(folder, f"realign-fast-{os.getpid()}")
        try:
            with open(path, "wb") as file:
                file.write(content)
            with open(path, "rb") as file:
                try:
                    os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
                    can = True
                except OSError:
                    can = False
                reader = io.ShardReader(file.fileno(), 5, len(content), 999, ring=ring(999))
                assert reader.direct == can
                assert b"".join(map(bytes, reader)) == content[5:]
        finally:
            os.unlink(path)


@pytest.mark.parametrize("through_ring", [False, True])
def test_writes_to_a_block_never_reach_the_file(file, content, through_ring):
    options = {"ring": ring(PAGE)} if through_ring else {}
    for block in io.ShardReader(file.fileno(), 0, len(content), PAGE, **options):
        memoryview(block)[0] ^= 0xFF
    assert os.pread(file.fileno(), len(content), 0) == content


@pytest.mark.parametrize("threads", [0, 1])
def test_the_pages_of_a_block_go_with_it_and_no_others(tmp_path, threads):
    """Blocks share a mapping: what is written to a block stays while another is let go of."""
    content = os.urandom(64 << 20)
    path = tmp_path / "rows"
    path.write_bytes(content)
    with open(path, "rb") as file:
        size, kept = (4 << 20) + 777, []
        blocks = io.ShardReader(file.fileno(), 99, len(content), size, ahead=1, threads=threads)
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


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("through_ring", [False, True])
def test_a_file_that_ends_early_is_an_error(file, content, through_ring, threads):
    options = {"ring": ring(PAGE)} if through_ring else {}
    options["threads"] = threads
    reader = io.ShardReader(file.fileno(), 0, len(content) + 1, PAGE, ahead=1, **options)
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
    with pytest.raises(ValueError, match="smaller blocks"):
        io.ShardReader(file.fileno(), 0, 9, 1 << 20, ring=ring(PAGE))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda file: io.Block(),  # nothing would be in it
        lambda file: io.ChunkFacts(),
        lambda file: io.Ring("two", PAGE),
        lambda file: io.Ring(2),
        lambda file: io.ShardReader(file, 0, 10, 10),
        lambda file: io.ShardReader(file.fileno(), 0, 10, 10, 2),
        lambda file: io.ShardReader(file.fileno(), 0, 10, 10, ring=file),
        lambda file: io.ShardReader(file.fileno(), 0, 10, 10, cached=True),
        lambda file: io.PickledRows(file.fileno(), 10, ("a", 1), 100),
        lambda file: io.PickledRows(file.fileno(), 10, None, 100),
        lambda file: io.read_chunks(file.fileno()),
        lambda file: io.MappedBuffer(3),
        lambda file: next(io.Ring(2, PAGE)),
    ],
)
def test_wrong_arguments_are_type_errors(file, wrong):
    with pytest.raises(TypeError):
        wrong(file)


def test_objects_hold_and_release_their_references(file, content):
    """The module counts references by hand: those of types, of buffers and of returned values."""

    def use_everything():
        buffers = ring(PAGE)
        blocks = list(io.ShardReader(file.fileno(), 0, 3 * PAGE, PAGE, ring=buffers))
        views = [memoryview(block) for block in blocks]
        assert buffers.take().address in buffers.addresses or buffers.free == 0
        for wrong in (lambda: io.ShardReader(-1, 0, 9, 9), lambda: io.Ring("two", PAGE)):
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
        types = [io.Block, io.Ring, io.ShardReader, io.MappedBuffer, io.PickledRows, io.NotPlain]
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


def test_it_reads_ahead_and_no_further(file, content):
    """Buffers in use say how far it has come: those ahead, and the one that is held."""
    buffers = ring(PAGE, buffers=8)
    reader = io.ShardReader(file.fileno(), 0, len(content), PAGE, ahead=3, threads=3, ring=buffers)
    held = next(reader)
    deadline = time.monotonic() + 20
    while buffers.free > 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert buffers.free == 4
    assert bytes(held) == content[:PAGE]


def test_readers_of_several_threads(file, content):
    results = []

    def read():
        blocks = io.ShardReader(file.fileno(), 0, len(content), 500, ring=buffers)
        results.append(b"".join(map(bytes, blocks)))

    buffers = ring(500)
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


@pytest.mark.parametrize("through_ring", [False, True])
def test_a_forked_process_refuses_the_reader_and_ends(file, content, through_ring):
    """Its threads do not exist there: neither the next block nor the end may wait for them."""
    options = {"ring": ring(500)} if through_ring else {}
    reader = io.ShardReader(file.fileno(), 0, len(content), 500, ahead=4, threads=4, **options)
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
