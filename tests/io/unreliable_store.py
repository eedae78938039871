"""A proxy in front of a store that answers wrongly when told to, and notes what it was asked: `asked`, and how many of
these were lists, `listed`."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_S = 20.0
PLACE = "s3://scans/sets/a b%41"
"""Where the tests put their sets."""


@dataclass(frozen=True)
class Asked:
    """One request: its method, the last part of its path, and its header Range ("" without)."""

    method: str
    name: str
    range: str


class UnreliableStore(ThreadingHTTPServer):
    """Set `fault`: from a request and how often it was asked before, one of the answers of `_Handler`, or None."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.fault: Callable[[Asked, int], str | None] = lambda asked, before: None
        self.asked: list[Asked] = []
        self.listed = 0
        self.lock, self.let_go, self.meeting = threading.Lock(), threading.Event(), threading.Barrier(4)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Who asks hangs up when it has waited long enough: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer, sent in two pieces, waits 40 ms
    server: UnreliableStore

    def do_GET(self) -> None:
        asked = Asked(self.command, self.path.split("?")[0].rpartition("/")[2], self.headers.get("Range", ""))
        with self.server.lock:
            before = self.server.asked.count(asked)
            self.server.asked.append(asked)
            self.server.listed += "list-type" in self.path
        fault = self.server.fault(asked, before)
        if fault == "hang":
            self.server.let_go.wait(HANG_S)
            self.close_connection = True
            return
        if fault in ("403", "500"):
            self._answer(int(fault), {}, b"<Error><Code>Told</Code></Error>")
            return
        if fault == "meet":
            self.server.meeting.wait(10)
        headers = {name: value for name, value in self.headers.items() if not (fault and name.lower() == "if-match")}
        connection = http.client.HTTPConnection(self.server.upstream, timeout=10)
        connection.request(self.command, self.path, headers=headers)
        answer = connection.getresponse()
        body, status = answer.read(), answer.status
        told = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        if fault == "short range":
            start = int(asked.range.removeprefix("bytes=").partition("-")[0])
            body = body[: len(body) // 2]
            total = told["content-range"].partition("/")[2]
            told["content-range"] = f"bytes {start}-{start + len(body) - 1}/{total}"
            told["content-length"] = str(len(body))
        if fault == "short body":
            body = body[: len(body) // 2]
            told["content-length"] = str(len(body))
        if fault == "long body":
            body *= 2
            told["content-length"] = str(len(body))
        if fault == "whole":
            status = 200
            told.pop("content-range", None)
        self._answer(status, told, body, cut=fault in ("cut", "stall"), stall=fault == "stall")

    do_HEAD = do_GET

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False, stall: bool = False
    ) -> None:
        self.send_response_only(status)
        length = {"content-length": headers.get("content-length", str(len(body)))}
        for name, value in (headers | length).items():
            if name not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if stall:
            self.wfile.flush()
            self.server.let_go.wait(HANG_S)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests look at `asked`."""


def fail(name: str, fault: str, *, times: int = 1000) -> Callable[[Asked, int], str | None]:
    """The fault of the first requests of each kind for objects whose name begins so."""
    return lambda asked, before: fault if asked.name.startswith(name) and before < times else None
