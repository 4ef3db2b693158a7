"""A real store behind a line that breaks: answers that are lost or cut short must change nothing."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from batchpipe.errors import OutputError
from batchpipe.storage import Store, open_store
from tests.s3_proxy import open_proxy
from tests.s3_server import S3Server

IN_THE_ANSWER = 30
"""Behind the 25 bytes of an interim answer (100 Continue), before the end of any final one."""

DATA = bytes(range(256)) * 4096 * 6


class Line(socketserver.ThreadingTCPServer):
    """Hands everything through to the store; where it is told so, cuts an answer after some bytes of it."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.store = ("127.0.0.1", port)
        self.bytes_until_cut: list[int] = []
        self.cuts = 0

    def cut_next_answer_after(self, count: int, times: int = 1) -> None:
        self.bytes_until_cut = [count] * times


class Relay(socketserver.BaseRequestHandler):
    server: Line

    def handle(self) -> None:
        with socket.create_connection(self.server.store) as upstream:
            threading.Thread(target=self.send_on, args=[upstream], daemon=True).start()
            while data := upstream.recv(1 << 16):
                if self.server.bytes_until_cut and len(data) >= self.server.bytes_until_cut[0]:
                    self.request.sendall(data[: self.server.bytes_until_cut.pop(0)])
                    self.server.cuts += 1
                    return
                if self.server.bytes_until_cut:
                    self.server.bytes_until_cut[0] -= len(data)
                self.request.sendall(data)

    def send_on(self, upstream: socket.socket) -> None:
        try:
            while data := self.request.recv(1 << 16):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the line was cut


@pytest.fixture
def line(s3_server: S3Server) -> Iterator[Line]:
    with Line(int(s3_server.endpoint.rpartition(":")[2])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def options(s3_server: S3Server, line: Line) -> dict[str, Any]:
    client_kwargs = {"endpoint_url": f"http://127.0.0.1:{line.server_address[1]}", "region_name": "us-east-1"}
    return s3_server.storage_options | {"client_kwargs": client_kwargs}


@pytest.fixture
def store(options: dict[str, Any], bucket: str) -> Store:
    store = open_store("s3://", {"s3": options})
    store.put(f"s3://{bucket}/warm", b"")
    return store


def test_a_create_whose_answer_was_lost_has_happened(store: Store, line: Line, bucket: str):
    line.cut_next_answer_after(IN_THE_ANSWER)
    version = store.create(f"s3://{bucket}/x", b"once")
    assert (line.cuts, store.read_with_version(f"s3://{bucket}/x")) == (1, (b"once", version))


def test_a_replace_whose_answer_was_lost_has_happened(store: Store, line: Line, bucket: str):
    first = store.create(f"s3://{bucket}/x", b"1")
    line.cut_next_answer_after(IN_THE_ANSWER)
    version = store.replace(f"s3://{bucket}/x", b"2", first)
    assert (line.cuts, store.read_with_version(f"s3://{bucket}/x")) == (1, (b"2", version))


def test_a_publish_whose_answer_was_lost_has_happened(store: Store, line: Line, bucket: str):
    with store.open_pending(f"s3://{bucket}/p", staging="", attempt="a") as piece:
        piece.write(DATA)
        pending = piece.finish()
    line.cut_next_answer_after(IN_THE_ANSWER)
    assert store.publish(pending) == store.stat(pending.uri).version
    assert line.cuts == 1


def test_a_lock_whose_answers_were_lost_is_held(store: Store, line: Line, bucket: str):
    line.cut_next_answer_after(IN_THE_ANSWER)
    with store.lock(f"s3://{bucket}/lock", {"run": "r"}, ttl_s=3600) as lock:
        line.cut_next_answer_after(IN_THE_ANSWER)
        lock.renew()
        lock.renew()
    assert (line.cuts, store.exists(f"s3://{bucket}/lock")) == (2, False)


def test_parts_whose_answers_were_lost_are_written_again(store: Store, line: Line, bucket: str):
    line.cut_next_answer_after(IN_THE_ANSWER, times=2)
    with store.open_pending(f"s3://{bucket}/p", staging="", attempt="a") as piece:
        piece.write(DATA)
        store.publish(piece.finish())
    assert (line.cuts, store.read(f"s3://{bucket}/p") == DATA) == (2, True)


@pytest.mark.parametrize("count", [100, 300_000, 3_000_000])
def test_a_body_that_breaks_off_is_read_again(store: Store, line: Line, bucket: str, count: int):
    version = store.put(f"s3://{bucket}/x", DATA)
    line.cut_next_answer_after(count, times=2)
    with store.open(f"s3://{bucket}/x", size=len(DATA), version=version) as file:
        assert file.read() == DATA
    assert line.cuts == 2


def test_only_one_layer_repeats_what_failed(options: dict[str, Any], line: Line):
    store = open_store("s3://", {"s3": options | {"config_kwargs": {"retries": {"total_max_attempts": 2}}}})
    line.cut_next_answer_after(0, times=100)
    with pytest.raises(
        OutputError, match=r"cannot write 's3://bucket/x': no answer from http://127.0.0.1:\d+/bucket/x"
    ):
        store.open_pending("s3://bucket/x", staging="", attempt="a").finish()
    assert line.cuts == 2  # a POST: aiohttp repeats a GET or a PUT once more by itself


@pytest.mark.parametrize("size", [10, len(DATA)])
def test_a_write_that_nobody_answers_is_sent_again(s3_server: S3Server, bucket: str, size: int):
    with open_proxy(s3_server.endpoint) as proxy:
        options = s3_server.storage_options | {"config_kwargs": {"read_timeout": 1}}
        options["client_kwargs"] = {"endpoint_url": proxy.endpoint, "region_name": "us-east-1"}
        store = open_store("s3://", {"s3": options})
        store.put(f"s3://{bucket}/warm", b"")
        stalled = proxy.disturb("stall", 1)
        store.put(f"s3://{bucket}/x", DATA[:size])

    assert stalled.is_over
    assert s3_server.client.get_object(Bucket=bucket, Key="x")["Body"].read() == DATA[:size]
