"""How much memory work takes, measured in a process of its own."""

import os
from pathlib import Path

import torch


def memory_growth(work):
    """Return the bytes by which `work()` raises the resident memory above what was there before.

    A fork of this process does the work, with one thread of torch: it has no others.
    """
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
            before = _high_water()
            work()
            os.write(write_end, str(_high_water() - before).encode())
        except BaseException as error:
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer.isdecimal(), answer
    return int(answer)


def _high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
