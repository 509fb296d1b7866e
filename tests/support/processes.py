"""Functions in processes of their own, which a fork server starts in a second."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_apart(function: Callable[..., Any], log: Path, *arguments: Any, processes: int = 1) -> None:
    """Run a function of a module, with what a launcher of distributed trainings tells a process.

    The libraries are imported once, in the fork server, and not in each process. What a process
    prints is in `log`, with its rank as the suffix.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["realign_fast.revision.trainer", "accelerate", "peft"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, logs = [], [log.with_suffix(f".{rank}") for rank in range(processes)]
    for rank, file in enumerate(logs):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment["ACCELERATE_USE_CPU"] = "true"
        parameters = (environment, file, function, arguments)
        started.append(context.Process(target=_run, args=parameters, daemon=True))
        started[-1].start()
    for process in started:
        process.join(120)
    said = "".join(file.read_text()[-3000:] for file in logs if file.exists())
    assert [process.exitcode for process in started] == [0] * processes, said


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
