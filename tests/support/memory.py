"""Work in a fork of the test's process, and how much memory it takes there."""

import os
from pathlib import Path

import torch


def forked(work):
    """Run `work()` in a fork; return its result or error as text, and the signal that ended it.

    Text is empty where it returned None; the signal is 0 where the process ended by itself.
    """
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            result = work()
            os.write(write_end, b"" if result is None else str(result).encode())
        except BaseException as error:
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        answer = pipe.read()
    return answer, os.WTERMSIG(os.waitpid(child, 0)[1])


def memory_growth(work):
    """Return the bytes by which `work()` raises the resident memory above what was there before.

    A fork of this process does the work, with one thread of torch: it has no others.
    """

    def measured():
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
        before = _high_water()
        work()
        return _high_water() - before

    answer, _ = forked(measured)
    assert answer.isdecimal(), answer
    return int(answer)


def _high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
