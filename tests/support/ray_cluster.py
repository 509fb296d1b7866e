"""A Ray cluster of one node with two CPUs on this machine, in processes of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def free_ports(count):
    """Return numbers of ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


def until(condition, awaited, seconds=120):
    """Return the value of ``condition`` once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {awaited}"
        time.sleep(0.002)
    return value


def listens(port):
    """Return whether a process of this machine listens on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid):
    """Return the ids of every process below ``pid``."""
    parents = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            stat = (process / "stat").read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(stat[1]), []).append(int(process.name))
    children, below = [], [pid]
    while below:
        children += (below := [child for one in below for child in parents.get(one, ())])
    return children


@contextlib.contextmanager
def cluster_of_one_node(environment):
    """Start a node; yield ``(address from inside, address from outside, folder, process id)``."""
    port, client, *further_ports = free_ports(4)
    folder = tempfile.mkdtemp(prefix="realign-ray-", dir="/tmp")  # a short path: sockets are in it
    fixed = ("dashboard-port", "dashboard-agent-listen-port")
    options = [f"--{name}={number}" for name, number in zip(fixed, further_ports, strict=True)]
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--num-gpus=1", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    command += ["--disable-usage-stats", "--object-store-memory=100000000", *options]
    command += [f"--temp-dir={folder}", f"--port={port}", f"--ray-client-server-port={client}"]
    with tempfile.NamedTemporaryFile() as log:
        head = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            said = Path(log.name).read_text

            def is_up():  # ports are open before the node is known
                return "Ray runtime started" in said() and listens(port) and listens(client)

            until(lambda: head.poll() is not None or is_up(), command)
            assert head.poll() is None, said()
            yield f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}", Path(folder), head.pid
        finally:
            head.terminate()
            try:
                head.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(head.pid, signal.SIGKILL)
                subprocess.run(["rm", "-rf", folder], check=False)
