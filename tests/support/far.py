"""Servers for the tests of URLs: HTTP with ranges, and what stands before another and fails."""

import functools
import hashlib
import http.client
import http.server
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder with `Range`, `ETag` and what `server.state` says goes wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what follows the headers waits 40 ms

    def do_GET(self):
        path, state = Path(self.translate_path(self.path)), self.server.state
        state.asked(self.command, path, self.headers.get("Range"))
        state.busy += 1
        state.most_busy = max(state.busy, state.most_busy)
        time.sleep(state.delay)
        try:
            self._answer(path, state)
        finally:
            state.busy -= 1

    do_HEAD = do_GET

    def _answer(self, path, state):
        if status := state.statuses.get(path.name):
            self.send_error(status)
        elif path.is_file():
            self._send(path, state)
        elif self.command == "HEAD":
            super().do_HEAD()
        else:
            super().do_GET()

    def _send(self, path, state):
        data = path.read_bytes()
        asked = state.ranges and re.fullmatch(
            "bytes=([0-9]+)-([0-9]+)", self.headers["Range"] or ""
        )
        begin, end = (int(asked[1]), min(int(asked[2]) + 1, len(data))) if asked else (0, len(data))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - begin))
        if state.versions:
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            cut = state.cuts.get(path.name, 0) * (begin in state.cut_within)
            self.wfile.write(data[begin : (begin + end) // 2 if cut else end])
            if cut:  # the connection breaks in the middle
                state.cuts[path.name] = cut - 1
                self.wfile.flush()
                self.close_connection = True

    def log_message(self, *_):
        pass


class State:
    """What a server was asked, and what goes wrong with it."""

    def __init__(self):
        self.log, self.statuses, self.cuts, self.ranges = [], {}, {}, True
        self.cut_within = range(1 << 40)  # where a range begins that is cut
        self.expired = lambda: False  # whether the credentials of a request to S3 have expired
        self.versions = True  # whether answers have an ETag
        self.busy, self.most_busy, self.delay = 0, 0, 0.0  # answers under way; seconds each takes
        self.before = {}  # name: called before the first GET of it is answered

    def asked(self, command, path, ranges):
        self.log.append((command, path.name, ranges))
        if command == "GET" and path.name in self.before:
            self.before.pop(path.name)()

    def hold(self, command, begin, until):
        """Hold the answers to ``command`` of names that begin so, from when ``until()`` is true.

        Returns ``(held, released)``, events: one is set by the first such request, and answers
        go on when the other is.
        """
        held, released, asked = threading.Event(), threading.Event(), self.asked

        def asked_and_held(*request):
            asked(*request)
            if request[0] == command and request[1].name.startswith(begin) and until():
                held.set()
                released.wait(120)

        self.asked = asked_and_held
        return held, released

    def fetched(self, name):
        """Bytes of a file that were asked for."""
        parts = [r for command, one, r in self.log if command == "GET" and one == name and r]
        return sum(int(b) - int(a) + 1 for a, b in (part[6:].split("-") for part in parts))


@contextmanager
def web(folder):
    """`(URL, State)` of a server of `folder`."""
    with serving(functools.partial(Handler, directory=str(folder))) as served:
        yield served


@contextmanager
def serving(handler, **facts):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.state = True, State()
    vars(server).update(facts)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes everything on to another server, but for what `server.state` says goes wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what follows the headers waits 40 ms

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name, state = self.path.partition("?")[0].rpartition("/")[2], self.server.state
        state.asked(self.command, Path(name), None)
        if state.expired():  # S3 answers so, and HEAD without a body
            self._answer(400, {}, b"" if self.command == "HEAD" else EXPIRED)
            return
        if self.command == "PUT" and (status := state.statuses.get(name)):
            self._answer(status, {}, b"")
            return
        behind = http.client.HTTPConnection(self.server.behind.partition("//")[2])
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            behind.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status, headers, data):
        self.send_response(status)
        skipped = {"transfer-encoding", "connection", "date", "server"}
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            if name.lower() not in skipped:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def proxy(address):
    """`(URL, State)` of a server before that of `address`."""
    with serving(Proxy, behind=address) as served:
        yield served
