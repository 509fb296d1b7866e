"""Python programs in forks of an interpreter that has imported torch, which takes it seconds.

``run`` and ``Program`` stand for ``subprocess.run`` and ``Popen`` of a Python command: a program
has a process, an environment, descriptors and signals of its own, imports this package itself, and
ends as an interpreter does. Only torch is imported before it begins. The start of a command itself
is tested in new interpreters (tests/cli/test_startup.py).
"""

import atexit
import functools
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path


def run(*arguments, env=None, cwd=None, timeout=120):
    """Run ``python *arguments`` to its end and return it as ``subprocess.run`` does, with text."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        program = Program(arguments, env, cwd, stdout, stderr)
        try:
            program.wait(timeout)
        finally:
            program.kill()
        printed = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(program.args, program.returncode, *printed)


def run_ranks(count, *arguments, cwd=None, timeout=120):
    """Run a script on so many ranks, as torchrun does, and return what the first one printed."""
    import realign_fast

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
    environment["PYTHONPATH"] = Path(realign_fast.__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [str(argument) for argument in arguments]
    ranks = [
        Program(command, environment | {"RANK": rank, "LOCAL_RANK": rank}, cwd, **pipes)
        for rank in range(count)
    ]
    printed = [rank.communicate(timeout) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, printed
    return printed[0][0]


class Program:
    """A process that runs ``python *arguments``, with the methods of a Popen for text.

    ``stdout`` and ``stderr`` are files, or PIPE for what fits into a pipe.
    """

    def __init__(
        self, arguments, env=None, cwd=None, stdout=None, stderr=None, start_new_session=False
    ):
        self.args, self.returncode = [os.fspath(argument) for argument in arguments], None
        environment = {name: str(value) for name, value in (env or os.environ).items()}
        folder, address = os.fspath(cwd or os.getcwd()), _interpreter()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(address)
        self.stdout, out = _reader_and_writer(stdout, 1)
        self.stderr, err = _reader_and_writer(stderr, 2)
        with tempfile.TemporaryFile("w+") as request:
            json.dump([self.args, environment, folder, start_new_session], request)
            request.seek(0)
            socket.send_fds(self._line, [b"."], [request.fileno(), 0, out, err])
            self.pid = int(self._line.recv(32))
        for stream, end in ((self.stdout, out), (self.stderr, err)):
            if stream:
                os.close(end)

    def wait(self, timeout=None):
        """Return the exit status, negative for a signal; TimeoutExpired after these seconds."""
        if self.returncode is None:
            self._line.settimeout(timeout)
            try:
                self.returncode = int(self._line.recv(32))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._line.close()
        return self.returncode

    def poll(self):
        """Return the exit status, or None while the program runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout=None):
        """Wait for the end and return what came through the pipes."""
        self.wait(timeout)
        return tuple(stream and stream.read() for stream in (self.stdout, self.stderr))

    def send_signal(self, number):
        """Send a signal to the program if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _reader_and_writer(file, standard):
    """Return the reading end of a pipe or None, and the descriptor that the program writes to."""
    if file == subprocess.PIPE:
        read_end, write_end = os.pipe()
        return open(read_end), write_end
    if file == subprocess.DEVNULL:
        return None, _devnull()
    return None, standard if file is None else file.fileno()


@functools.cache
def _devnull():
    return os.open(os.devnull, os.O_RDWR)


@functools.cache
def _interpreter():
    """Start the interpreter with torch, which ends with this process; return its address."""
    address = str(Path(tempfile.mkdtemp(prefix="programs-"), "socket"))
    command = [sys.executable, __file__, address]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
    atexit.register(_end, process)
    assert process.stdout.readline() == b"ready\n"
    return address


def _end(process):
    """Close the standard input of the interpreter, which ends it."""
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def serve(address):
    """Fork for each connection until standard input ends; return the request in a fork."""
    server, selector, running = socket.socket(socket.AF_UNIX), selectors.DefaultSelector(), {}
    server.bind(address)
    server.listen()
    selector.register(server, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    os.write(1, b"ready\n")
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                os.unlink(address)
                os.rmdir(os.path.dirname(address))
                sys.exit()
            if key.fd != server.fileno():
                pid, line = running.pop(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                selector.unregister(key.fd)
                os.close(key.fd)
                try:
                    line.sendall(str(status).encode())
                except OSError:  # nobody waits for it
                    pass
                line.close()
                continue
            line, _ = server.accept()
            _, descriptors, _, _ = socket.recv_fds(line, 1, 4)
            if (pid := os.fork()) == 0:
                for number, descriptor in enumerate(descriptors[1:]):
                    os.dup2(descriptor, number)
                with open(descriptors[0]) as file:
                    request = json.load(file)
                for other in (selector, server, line, *(line for _, line in running.values())):
                    other.close()
                for descriptor in (*descriptors[1:], *running):
                    os.close(descriptor)
                return request
            for descriptor in descriptors:
                os.close(descriptor)
            line.sendall(str(pid).encode())
            handle = os.pidfd_open(pid)
            running[handle] = pid, line
            selector.register(handle, selectors.EVENT_READ)


def become(arguments, environment, folder, new_session):
    """Run ``python *arguments`` in this process."""
    if new_session:
        os.setsid()
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    while arguments[0] == "-W":
        sys.warnoptions.append(arguments[1])
        warnings.simplefilter(arguments[1])
        arguments = arguments[2:]
    sys.orig_argv[1:] = arguments
    kind = arguments[0] if arguments[0] in ("-c", "-m") else ""
    program, *options = arguments[1:] if kind else arguments
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [{"-c": "", "-m": folder}.get(kind, os.path.dirname(program)), *paths]
    sys.argv = ["-c" if kind == "-c" else program, *options]
    for path in paths:
        if os.path.exists(hook := os.path.join(path, "sitecustomize.py")):
            runpy.run_path(hook)
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), module.__dict__)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    import torch

    become(*serve(sys.argv[1]))
