"""`python -m benchmarks.stage_server DELAY_S`: a stage that does nothing but read a request and answer it.

Every line of a request is answered by one line, after so many seconds. It prints its port and serves until killed.
"""

import asyncio
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httptools

ANSWER = b"1\n"


class Stage(asyncio.Protocol):
    """One connection; bodies are counted as they come and never kept."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.lines = 0

    def on_body(self, body: bytes) -> None:
        self.lines += body.count(b"\n")

    def on_message_complete(self) -> None:
        answer = ANSWER * self.lines
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nContent-Length: %d\r\n\r\n" % len(answer)
        if self.delay_s:
            asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, head + answer)
        else:
            self.transport.write(head + answer)


@contextmanager
def open_server(delay_s: float = 0.0) -> Iterator[str]:
    """Start one in a process of its own; yield its URL, and end it."""
    command = [sys.executable, "-m", "benchmarks.stage_server", str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/invocations"
        finally:
            process.kill()


async def _serve(delay_s: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Stage(delay_s), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _to_the_microsecond() -> asyncio.AbstractEventLoop:
    """A loop whose timers end when they are due: epoll takes milliseconds, and adds half of one to each delay."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    delay_s = float(sys.argv[1])
    with asyncio.Runner(loop_factory=_to_the_microsecond if delay_s else None) as runner:
        runner.run(_serve(delay_s))
