"""Two processes of a distributed training, which a fork server starts in a second."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = 2


def run_distributed(function: Callable[..., Any], log: Path, *arguments: Any) -> None:
    """Run a function of a module in two processes, with what a launcher tells each of them.

    The libraries are imported once, in the fork server, and not in each process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["realign_fast.revision.trainer", "accelerate", "peft"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(PROCESSES):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment["ACCELERATE_USE_CPU"] = "true"
        parameters = (environment, log.with_suffix(f".{rank}"), function, arguments)
        started.append(context.Process(target=_run, args=parameters, daemon=True))
        started[-1].start()
    for process in started:
        process.join(120)
    said = "".join(path.read_text()[-3000:] for path in sorted(log.parent.glob(f"{log.stem}.*")))
    assert [process.exitcode for process in started] == [0] * PROCESSES, said


def _run(
    environment: dict[str, Any], log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code or 0)
