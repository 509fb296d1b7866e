"""Results of 4 MiB and more ask for huge pages, in ordinary storage.

The tests read the request (`hg` in the mapping's flags), not the pages: Linux grants a huge page
only while it finds 2 MiB of free memory in one piece, which no program can count on.
"""

import copy
import mmap
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from support.op_checks import random_map, require_compiled

from realign_fast import align_rows

COLUMNS, MIB = 1024, 1 << 20
MAP = random_map(COLUMNS)


def mapping_of(address):
    """Return the kilobytes of each field of the mapping at an address and its flags, or {}."""
    fields, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if borders := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(borders[1], 16) <= address < int(borders[2], 16)
        elif inside and line.endswith(" kB"):
            fields[line.split(":")[0]] = int(line.split()[1])
        elif inside and line.startswith("VmFlags:"):
            fields["flags"] = line.split()[1:]
    return fields


def asks_for_huge_pages(address):
    """Return whether the mapping at an address has been advised to use huge pages."""
    return "hg" in mapping_of(address)["flags"]


def require_huge_pages():
    """Skip where the system knows no request for huge pages or does not show it."""
    require_compiled()
    if not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this system has no transparent huge pages")
    with mmap.mmap(-1, 8 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as probe:
        try:
            probe.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pytest.skip("the system refuses huge pages")
        view = torch.frombuffer(probe, dtype=torch.uint8)
        shown = asks_for_huge_pages(view.data_ptr() + 4 * MIB)
        del view
    if not shown:
        pytest.skip("the system does not show a request for huge pages")


def result(mebibytes, linear=MAP[0]):
    """Return float32 rows of this size, and their image."""
    rows = torch.ones(mebibytes * MIB // 4 // COLUMNS, COLUMNS)
    return rows, align_rows(rows, linear, *MAP[1:])


@pytest.mark.parametrize("linear", (MAP[0], MAP[1]), ids=("align_rows", "map_rows"))
def test_a_large_result_asks_for_huge_pages(linear):
    require_huge_pages()
    # An allocation of more than 32 MiB is never a reused part of the heap.
    rows, out = result(34, linear)
    middle = 17 * MIB
    assert not asks_for_huge_pages(rows.data_ptr() + middle)
    assert asks_for_huge_pages(out.data_ptr() + middle)


def test_the_storage_of_a_large_result_is_an_ordinary_one():
    require_compiled()
    rows, out = result(5)
    expected = align_rows(rows[:1], *MAP)
    assert out.untyped_storage().nbytes() == out.nbytes and out.untyped_storage().resizable()
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), out.clone()):
        assert torch.equal(other, out) and other.data_ptr() != out.data_ptr()
    count = len(out)
    out.resize_(2 * count, COLUMNS)
    assert bool((out[:count] == expected).all())
    out[count:] = 1.0
    out.resize_(3, COLUMNS)
    assert bool((out == expected).all())
    shared = align_rows(rows, *MAP).share_memory_()
    assert shared.is_shared() and bool((shared == expected).all())


def test_a_large_result_is_freed_by_another_thread():
    require_compiled()
    if not Path("/proc/self/smaps").exists():
        pytest.skip("this system does not list mappings")
    left = []
    for _ in range(5):  # the system may give the addresses to another allocation at once
        held = [result(34)[1]]
        address = held[0].data_ptr() + 17 * MIB
        assert mapping_of(address)["Rss"] >= 34 * 1024 - 8
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        if not (left := mapping_of(address)):
            break
    assert left == {}
