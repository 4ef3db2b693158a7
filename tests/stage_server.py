"""A small real server of the stage contract that misbehaves when told to. Standard library only: it runs in images too.

The first record of a request may be an order: ``!status 429 retry-after=2``, ``!drop``, ``!slow 5``, ``!few`` ...
Anything else is echoed, with STAGE_HEADER less its first line. Other variables of the environment make it misbehave
at its start: see `start`.
"""
# ruff: noqa: T201 - a server talks to its log

import csv
import hashlib
import io
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

barriers: dict[str, threading.Barrier] = {}
seen: dict[str, int] = {}
lock = threading.Lock()


class Stage(BaseHTTPRequestHandler):
    """One connection; `do_POST` answers the records or carries out the order in front of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/ping" and "STAGE_DRIP" in os.environ:
            self.drip()
        elif self.path == "/ping":
            self.answer(b"", "", int(os.environ.get("STAGE_PING", "200")))
        elif self.path == "/execution-parameters" and "STAGE_PARAMETERS" in os.environ:
            self.answer_parameters()
        else:
            self.answer(b"not found", "text/plain", 404)

    def answer_parameters(self) -> None:
        """Say STAGE_PARAMETERS, after STAGE_PARAMETERS_S; in the STAGE_PARAMETERS_FOLDER one server does, once asked.

        STAGE_PARAMETERS_BUSY requests are answered STAGE_PARAMETERS_STATUS (503) first.
        """
        with lock:
            seen["parameters"] = seen.get("parameters", 0) + 1
        time.sleep(float(os.environ.get("STAGE_PARAMETERS_S", "0")))
        if folder := os.environ.get("STAGE_PARAMETERS_FOLDER"):
            try:
                Path(folder, "told").touch(exist_ok=False)
            except FileExistsError:
                self.answer(b"not found", "text/plain", 404)
                return
        busy = seen["parameters"] <= int(os.environ.get("STAGE_PARAMETERS_BUSY", "0"))
        status = int(os.environ.get("STAGE_PARAMETERS_STATUS", "503")) if busy else 200
        self.answer(os.environ["STAGE_PARAMETERS"].encode(), "application/json", status)

    def drip(self) -> None:
        """Send one byte after the other of an answer that never ends."""
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            while True:
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            self.close_connection = True

    def do_POST(self) -> None:
        content_type = self.headers["Content-Type"]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "STAGE_HEADER" in os.environ:
            header, _, body = body.partition(b"\n")
            print(f"{header.decode()} before {len(body)} bytes", flush=True)
        order, *values = order_in(body)
        if order:
            getattr(self, f"do_{order}")(body, content_type, *values)
        else:
            self.answer(body, content_type)

    def answer(self, body: bytes, content_type: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if content_type:
            self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_status(self, body: bytes, content_type: str, status: str, retry_after: str = "") -> None:
        headers = {"Retry_After": retry_after} if retry_after else {}
        self.answer(b"" if status == "204" else b"reason: " + status.encode(), "text/plain", int(status), **headers)

    def do_say(self, body: bytes, content_type: str, *words: str) -> None:
        """Answer 500 with these words."""
        self.answer(" ".join(words).encode(), "text/plain", 500)

    def do_limit(self, body: bytes, content_type: str, limit: str) -> None:
        """Answer 413 to a body over so many bytes, and an echo else."""
        self.answer(body, content_type, 413 if len(body) > int(limit) else 200)

    def do_drop(self, body: bytes, content_type: str) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_reset(self, body: bytes, content_type: str) -> None:
        """Break off in the middle of the answer."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nContent-Length: 100\r\n\r\n1,2\n")
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        os.close(self.connection.detach())

    def do_short(self, body: bytes, content_type: str) -> None:
        """End in the middle of the answer, in good order."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nContent-Length: 100\r\n\r\n1,2\n")
        self.close_connection = True

    def do_nonsense(self, body: bytes, content_type: str) -> None:
        self.wfile.write(b"220 mail.example.org ESMTP\r\n")
        self.close_connection = True

    def do_slow(self, body: bytes, content_type: str, seconds: str, *_: str) -> None:
        time.sleep(float(seconds))
        self.answer(body, content_type)

    def do_few(self, body: bytes, content_type: str) -> None:
        self.answer(b"".join(body.splitlines(keepends=True)[1:]), content_type)

    def do_many(self, body: bytes, content_type: str) -> None:
        self.answer(body + b"one more\n", content_type)

    def do_as(self, body: bytes, content_type: str, answer_type: str, *text: str) -> None:
        """Answer this text as that content type; an empty one leaves the header out."""
        answer = " ".join(text).encode().decode("unicode_escape").encode("latin-1")
        self.answer(answer, "" if answer_type == "none" else answer_type)

    def do_chunked(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(0, len(body), 7):
            part = body[i : i + 7]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def do_cut(self, body: bytes, content_type: str) -> None:
        """Break off in the middle of a chunked answer, whose header is spelled as some proxies do."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nTransfer-Encoding: Chunked\r\n\r\n"
        self.wfile.write(head + b"4\r\n1,2\n\r\n")
        self.close_connection = True

    def do_until_closed(self, body: bytes, content_type: str) -> None:
        """Answer without a length, as HTTP/1.0 servers do."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\n\r\n" + body)
        self.close_connection = True

    def do_leave(self, body: bytes, content_type: str) -> None:
        """Answer, and close the connection without having said so."""
        self.answer(body, content_type)
        self.close_connection = True

    def do_idle(self, body: bytes, content_type: str) -> None:
        """Answer, and to whatever comes next say that nothing came in time."""
        self.answer(body, content_type)
        self.connection.recv(1, socket.MSG_PEEK)
        self.wfile.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.close_connection = True

    def do_continue(self, body: bytes, content_type: str) -> None:
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.answer(body, content_type)

    def do_promise(self, body: bytes, content_type: str) -> None:
        """Say that an answer will follow, and close."""
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.close_connection = True

    def do_together(self, body: bytes, content_type: str, count: str) -> None:
        """Answer when so many requests are here at once."""
        with lock:
            barrier = barriers.setdefault(count, threading.Barrier(int(count)))
        barrier.wait(timeout=10)
        self.answer(body, content_type)

    def do_flaky(self, body: bytes, content_type: str, name: str, failures: str) -> None:
        """Fail so many times under this name, then answer."""
        with lock:
            seen[name] = seen.get(name, 0) + 1
        print(f"{name} asked with {hashlib.sha256(body).hexdigest()}", flush=True)
        self.answer(body, content_type, 503 if seen[name] <= int(failures) else 200)

    def do_connection(self, body: bytes, content_type: str) -> None:
        """Answer with the client's port, which tells connections apart."""
        self.answer(b"%d\n" % self.client_address[1], content_type)

    def do_headers(self, body: bytes, content_type: str) -> None:
        self.row([self.path, *(f"{name.lower()}={value}" for name, value in sorted(self.headers.items()))])

    def do_environment(self, body: bytes, content_type: str, *names: str) -> None:
        self.row([os.environ.get(name, "") for name in names])

    def do_state(self, body: bytes, content_type: str) -> None:
        """Answer what an image would look at: arguments, folder, user, capabilities, the model's files."""
        status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
        model = Path(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))
        files = sorted(path.name for path in model.iterdir()) if model.is_dir() else []
        state = {"argv": sys.argv[1:], "cwd": str(Path.cwd()), "uid": os.getuid(), "files": files, "pid": os.getpid()}
        state |= {"capabilities": status["CapEff"], "no_new_privileges": status["NoNewPrivs"]}
        self.row([json.dumps(state)])

    def do_write(self, body: bytes, content_type: str, path: str) -> None:
        try:
            Path(path).touch()
            self.row(["written"])
        except OSError as error:
            self.row([type(error).__name__, os.strerror(error.errno or 0)])

    def do_connect(self, body: bytes, content_type: str, host: str, port: str) -> None:
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
            self.row(["connected"])
        except OSError as error:
            self.row([type(error).__name__])

    def do_log(self, body: bytes, content_type: str, *words: str) -> None:
        print(" ".join(words), flush=True)
        self.answer(body, content_type)

    def do_flood(self, body: bytes, content_type: str, megabytes: str) -> None:
        flood(int(megabytes))
        self.answer(body, content_type)

    def do_exit(self, body: bytes, content_type: str, code: str) -> None:
        os._exit(int(code))

    def do_freeze(self, body: bytes, content_type: str) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def do_eat(self, body: bytes, content_type: str, megabytes: str) -> None:
        """Use so much memory."""
        self.row([str(eat(int(megabytes)))])

    def row(self, fields: list[str]) -> None:
        text = io.StringIO()
        csv.writer(text).writerow(fields)
        self.answer(text.getvalue().encode(), "text/csv; charset=utf-8")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """One thread a connection; broken connections are part of the game and not printed."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def order_in(body: bytes) -> list[str]:
    """The words of an order in front of the records, ``[""]`` if there is none."""
    if not body[:40].lstrip(b'[{"').startswith(b"!"):
        return [""]
    line = body.split(b"\n", 1)[0].decode().strip('[]{}"\r')
    return line[1:].split(" ")


def eat(megabytes: int) -> int:
    return len([bytearray(os.urandom(1 << 20)) for _ in range(megabytes)])


def flood(megabytes: int) -> None:
    """Write so much to the log."""
    sys.stdout.flush()
    lines = (b"x" * 8191 + b"\n") * 8
    for _ in range(megabytes * 16):
        sys.stdout.buffer.write(lines)
    print("end of the flood", flush=True)


def start() -> None:
    """Serve on the contract's port; STAGE_LINES, _EXIT, _EAT (MB), _IGNORE_TERM and _ONCE (a file) come before it."""
    if "STAGE_IGNORE_TERM" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number in range(int(os.environ.get("STAGE_LINES", "0"))):
        print("line", number, flush=True)
    if "STAGE_EXIT" in os.environ:
        print("no model for", os.environ.get("TOKEN"), flush=True)
        sys.exit(int(os.environ["STAGE_EXIT"]))
    eat(int(os.environ.get("STAGE_EAT", "0")))
    if once := os.environ.get("STAGE_ONCE"):
        Path(once).touch(exist_ok=False)
    server = Server(("0.0.0.0", int(os.environ.get("SAGEMAKER_BIND_TO_PORT", "8080"))), Stage)
    print(f"serving on {server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    start()
