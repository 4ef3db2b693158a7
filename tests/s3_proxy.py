"""A line to the S3 store on which a test sees each request before the store does, and may keep it back or hang up."""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


class Proxy(socketserver.ThreadingTCPServer):
    """Hands everything through. `may_pass` is asked with the first line of each request; False hangs up instead."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.store = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.may_pass: Callable[[bytes], bool] = lambda _: True
        self.answered: Callable[[bytes], None] = lambda _: None

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
        with suppress(OSError), socket.create_connection(self.server.store) as upstream:
            threading.Thread(target=self.hand_back, args=[upstream], daemon=True).start()
            while data := self.request.recv(1 << 16):
                if data.startswith(METHODS):
                    self.line = data.partition(b"\r\n")[0]
                    if not self.server.may_pass(self.line):
                        return
                upstream.sendall(data)

    def hand_back(self, upstream: socket.socket) -> None:
        with suppress(OSError):
            while data := upstream.recv(1 << 16):
                self.request.sendall(data)
                if data.startswith(b"HTTP/1.1 2"):
                    self.server.answered(self.line)


def is_completion(line: bytes) -> bool:
    """Whether a request completes a multipart upload."""
    return line.startswith(b"POST ") and b"uploadId=" in line


@contextmanager
def open_proxy(endpoint: str) -> Iterator[Proxy]:
    """A line to the store, open until the block ends."""
    with Proxy(endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True).start()
        yield proxy
        proxy.shutdown()
