"""HTTP/1.1 requests over kept-alive connections, for `http`: bytes in, status, headers and bytes out.

A small client of its own over a well-kept parser, because single-record stages need it: aiohttp sends a third as
many small requests a second from one process (docs/performance.md). It follows no redirects and keeps no cookies.
"""

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urlsplit

import httptools

from batchpipe.redact import basic_credentials

Body: TypeAlias = bytes | bytearray | memoryview
JOINED_BYTES = 1 << 16
"""A body up to this size is copied behind its head, which saves a system call; a larger one is sent as it lies."""

CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete answer; header names are lower case, a repeated header's last value stands."""

    status: int
    headers: dict[str, str]
    body: bytes


class ConnectionBroken(ConnectionError):
    """The connection ended, or made no sense, before the answer was complete."""


class Connections:
    """Connections to one URL, as many as there are requests at once, each used again while its server keeps it.

    Belongs to the event loop that first posts, and is closed from another thread.
    """

    def __init__(self, url: str, headers: Mapping[str, str], method: str = "POST") -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        userinfo, at, host = parts.netloc.rpartition("@")
        lines = {"Host": host, "Accept-Encoding": "identity", "User-Agent": "batchpipe"}
        if at:
            lines["Authorization"] = f"Basic {basic_credentials(userinfo)}"
        self._head = f"{method} {target} HTTP/1.1\r\n{_lines({**lines, **headers})}".encode()
        self._idle: list[_Connection] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def post(self, body: Body, headers: Mapping[str, str], timeout_s: float) -> HttpAnswer:
        """Send one body and return the whole answer.

        Raises TimeoutError after ``timeout_s`` and OSError for anything that is wrong with the connection.
        """
        head = b"%sContent-Length: %d\r\n%s\r\n" % (self._head, len(body), _lines(headers).encode())
        async with asyncio.timeout(timeout_s):
            while self._idle:
                connection = self._idle.pop()
                if connection.closed:
                    continue
                # A server may close an idle connection at the very moment it is used again: that tells nothing. Some
                # say 408 before: it is about the request that they waited for, and not about this one.
                try:
                    answer = await self._exchange(connection, head, body)
                except ConnectionBroken:
                    if connection.has_answered:
                        raise
                else:
                    if answer.status != 408 or connection.can_be_kept:
                        return answer
            return await self._exchange(await self._connect(), head, body)

    def close(self) -> None:
        """Close every idle connection; one that is in use closes when its answer is there. Not from the loop itself."""
        self._closed = True
        if self._loop and self._loop.is_running():
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self.close_idle(), self._loop).result(CLOSE_S)

    async def _connect(self) -> "_Connection":
        self._loop = asyncio.get_running_loop()
        _, connection = await self._loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return connection

    async def _exchange(self, connection: "_Connection", head: bytes, body: Body) -> HttpAnswer:
        try:
            answer = await connection.exchange(head, body)
        except BaseException:
            connection.transport.abort()
            raise
        if connection.can_be_kept and not self._closed:
            self._idle.append(connection)
        else:
            connection.transport.close()
        return answer

    async def close_idle(self) -> None:
        """Close every idle connection, from the loop itself."""
        closing, self._idle = self._idle, []
        for connection in closing:
            connection.transport.abort()
        while not all(connection.closed for connection in closing):
            await asyncio.sleep(0)


def _lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.has_answered = False
        self._waiter: asyncio.Future[HttpAnswer] | None = None

    @property
    def can_be_kept(self) -> bool:
        # A server that answers before it has read the whole request will not find the next one's beginning.
        return self._keep_alive and not self.closed and not self.transport.get_write_buffer_size()

    async def exchange(self, head: bytes, body: Body) -> HttpAnswer:
        self._waiter = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._keep_alive = self.has_answered = False
        if len(body) <= JOINED_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return await self._waiter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.has_answered = True
        if not self._waiter or self._waiter.done():
            self.closed = True  # more than it was asked for
            self.transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(f"the answer is not HTTP/1.1: {exc}")
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._waiter and not self._waiter.done():
            if self._ends_with_connection and exc is None:
                self.on_message_complete()
            elif self.has_answered:
                self._fail("the connection broke in the middle of the answer")
            else:
                self._fail(f"the connection broke without an answer{f': {exc}' if exc else ''}")

    def _fail(self, message: str) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(ConnectionBroken(message))

    # What the parser calls.

    _ends_with_connection = False

    def on_message_begin(self) -> None:
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._ends_with_connection = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        sized = "content-length" in self._headers or "chunked" in self._headers.get("transfer-encoding", "").lower()
        is_final = self._parser.get_status_code() >= 200  # behind 100 Continue and its like another one must follow
        self._ends_with_connection = is_final and not sized

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or not self._waiter or self._waiter.done():  # 100 Continue, 103 Early Hints
            return
        self._keep_alive = not self._ends_with_connection and self._parser.should_keep_alive()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._waiter.set_result(HttpAnswer(status, self._headers, body))
