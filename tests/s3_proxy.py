"""A line to the S3 store on which a test sees each request before the store does, and may keep it back or hang up.

It may also be disturbed: requests of a kind are reset, told to slow down, never answered, or their answers are lost.
"""

import re
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
TRICKLED_BYTES, TRICKLED_S = 512, 0.01

Act = Literal["reset", "slow down", "stall", "lose the answer", "trickle"]
"""What becomes of a request: the connection breaks before the store has seen it; 503 SlowDown; nobody answers until the
client hangs up; the store has done it and the client is not told; the answer comes a little at a time."""


@dataclass
class Trouble:
    """What is done to the next `left` requests whose first line is `of` the kind."""

    act: Act
    left: int
    of: Callable[[bytes], bool]
    _met: set[bytes] = field(default_factory=set)
    _taking: threading.Lock = field(default_factory=threading.Lock)

    def takes(self, line: bytes) -> bool:
        with self._taking:
            taken = self.left > 0 and self.of(line)
            self.left -= taken
            if taken:
                self._met.add(line)
        return taken

    def make_good(self, line: bytes) -> None:
        with self._taking:
            self._met.discard(line)

    def end(self) -> None:
        with self._taking:
            self.left = 0

    @property
    def is_over(self) -> bool:
        """Whether it is spent, and every request that met it was asked again and answered."""
        return self.left == 0 and not self._met


class Proxy(socketserver.ThreadingTCPServer):
    """Hands everything through. `may_pass` is asked with the first line of each request; False hangs up instead."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.store = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.may_pass: Callable[[bytes], bool] = lambda _: True
        self.answered: Callable[[bytes], None] = lambda _: None
        self.troubles: list[Trouble] = []

    def disturb(self, act: Act, times: int, of: Callable[[bytes], bool] = lambda _: True) -> Trouble:
        """From here on, do this to so many requests; what is returned says when that is done."""
        self.troubles.append(Trouble(act, times, of))
        return self.troubles[-1]

    def act_on(self, line: bytes) -> Act | None:
        return next((trouble.act for trouble in self.troubles if trouble.takes(line)), None)

    def after_completions(self, count: int, act: Callable[[], bool]) -> None:
        """When so many uploads have been completed, act before another is; `act` says whether the others may be."""
        taking, answers = threading.Lock(), threading.Semaphore(0)
        seen: list[bool] = []

        def may_pass(line: bytes) -> bool:
            if not is_completion(line):
                return True
            with taking:
                if len(seen) == count:
                    for _ in range(count):
                        answers.acquire(timeout=30)
                    seen.append(act())
                elif len(seen) < count:
                    seen.append(True)
                return seen[-1]

        self.may_pass = may_pass
        self.answered = lambda line: answers.release() if is_completion(line) else None


class Relay(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        self.line = b""
        self.act: Act | None = None
        with suppress(OSError), socket.create_connection(self.server.store) as upstream:
            threading.Thread(target=self.hand_back, args=[upstream], daemon=True).start()
            while data := self.request.recv(1 << 16):
                if data.startswith(METHODS):
                    self.line = data.partition(b"\r\n")[0]
                    if not self.server.may_pass(self.line):
                        return
                    self.act = self.server.act_on(self.line)
                    if self.act in ("reset", "slow down", "stall"):
                        self.keep_from_the_store(data)
                        return
                upstream.sendall(data)

    def keep_from_the_store(self, data: bytes) -> None:
        if self.act == "reset":
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
        if self.act == "slow down":
            self.read_body(data)
            head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n"
            self.request.sendall(head.encode() + b"Connection: close\r\n\r\n" + SLOW_DOWN)
        if self.act == "stall":
            while self.request.recv(1 << 16):
                pass

    def read_body(self, data: bytes) -> None:
        """Read the rest of a request, unless its client waits to be told to go on."""
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        left = int(length[1]) - len(body) if length and b"100-continue" not in head else 0
        while left > 0 and (more := self.request.recv(1 << 16)):
            left -= len(more)

    def hand_back(self, upstream: socket.socket) -> None:
        with suppress(OSError):
            while data := upstream.recv(1 << 16):
                line, act = self.line, self.act  # once the client has its answer it may ask for the next thing
                if act == "lose the answer" and not data.startswith(b"HTTP/1.1 100"):
                    break
                if act == "trickle":
                    self.trickle(data)
                else:
                    self.request.sendall(data)
                if act in (None, "trickle") and re.match(rb"HTTP/1.1 [234]", data):
                    for trouble in self.server.troubles:
                        trouble.make_good(line)
                if data.startswith(b"HTTP/1.1 2"):
                    self.server.answered(line)
        # The store closes what was idle for some seconds. Who does not see that asks on it, and waits for a minute.
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)

    def trickle(self, data: bytes) -> None:
        for start in range(0, len(data), TRICKLED_BYTES):
            self.request.sendall(data[start : start + TRICKLED_BYTES])
            threading.Event().wait(TRICKLED_S)


def is_completion(line: bytes) -> bool:
    """Whether a request completes the multipart upload of data, be it a part; what a run keeps of its own is none."""
    return line.startswith(b"POST ") and b"uploadId=" in line and b"/_batchpipe/" not in line


@contextmanager
def open_proxy(endpoint: str) -> Iterator[Proxy]:
    """A line to the store, open until the block ends."""
    with Proxy(endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True).start()
        yield proxy
        proxy.shutdown()
