"""A served callable, called over real connections: by the stage that a job has, and by others."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from aiohttp import web

from batchpipe.batch import ByteRecords
from batchpipe.content import ARROW, CSV, JSON, JSON_LINES, encode
from batchpipe.convert import from_answer, to_dataframe
from batchpipe.errors import JobError, StageStartError
from batchpipe.serve import make_app, open_for_serving, serve
from batchpipe.stages import Answer, Remedy
from batchpipe.stages.contract import answers_ping, wait_until_ready
from batchpipe.stages.ports import take_ports
from tests import served
from tests.jobs import running
from tests.opened_stage import Opened, csv_records, opened

TABLE = pa.table({"x": [1, 2], "name": ["a", None]})
Serve = Callable[..., str]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The loop that the servers of this module run on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def serve_it(loop: asyncio.AbstractEventLoop) -> Iterator[Serve]:
    """Serve one of `tests.served`; give its address."""
    runners = []

    async def start(app: web.Application) -> str:
        runner = web.AppRunner(app, access_log=None)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"127.0.0.1:{runner.addresses[0][1]}"

    def serve(attribute: str, *columns: str, params: dict[str, Any] | None = None, **limits: Any) -> str:
        stage = open_for_serving(f"tests.served:{attribute}", params or {})
        return asyncio.run_coroutine_threadsafe(start(make_app(stage, columns=columns, **limits)), loop).result(30)

    yield serve
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)


@pytest.fixture
def open_served(serve_it: Serve, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open an endpoint stage on one of `tests.served`."""
    with ExitStack() as stack:

        def open_it(attribute: str, **keys: Any) -> Opened:
            stage = {"endpoint": {"url": f"http://{serve_it(attribute)}/invocations"}, **keys}
            return stack.enter_context(opened(tmp_path, stage))

        yield open_it


def ask(address: str, body: bytes, content_type: str, accept: str = "") -> tuple[int, str, bytes]:
    """Status, content type and body of one invocation."""
    headers = {"Content-Type": content_type, **({"Accept": accept} if accept else {})}
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("POST", "/invocations", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


def get(address: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_ping_and_execution_parameters_are_answered(serve_it: Serve):
    address = serve_it("double")

    assert get(address, "/ping") == (200, b"")
    assert json.loads(get(address, "/execution-parameters")[1]) == {
        "MaxConcurrentTransforms": 2,
        "BatchStrategy": "MULTI_RECORD",
        "MaxPayloadInMB": 6,
        "TableContentType": ARROW,
    }


@pytest.mark.parametrize("served", [["upper"], ["double", "x", "y"]])
def test_who_takes_bytes_or_names_the_fields_of_csv_asks_for_no_tables(serve_it: Serve, served: list[str]):
    assert "TableContentType" not in json.loads(get(serve_it(*served), "/execution-parameters")[1])


def test_served_function_answers_what_it_answers_in_process(open_served: Callable[..., Opened]):
    expected = from_answer(served.double(to_dataframe(TABLE)))

    answer = open_served("double", content_type=ARROW).invoke(TABLE).records

    assert isinstance(answer, pa.Table)
    assert isinstance(expected, pa.Table)
    assert answer.equals(expected)


@pytest.mark.parametrize("content_type", ["text/csv; header=present", JSON, JSON_LINES, ARROW])
def test_table_goes_through_in_every_content_type(open_served: Callable[..., Opened], content_type: str):
    stage = open_served("double", content_type=content_type, accept=ARROW)

    answer = stage.invoke(TABLE).records

    assert isinstance(answer, pa.Table)
    assert answer.to_pylist() == [{"x": 1, "name": "a", "twice": 2}, {"x": 2, "name": None, "twice": 4}]


@pytest.mark.parametrize(
    ("content_type", "body", "answer"),
    [
        ("text/csv; header=present", b"x,y\n1,2\n", b'"x","y","twice"\n1,2,2\n'),
        (JSON_LINES, b'{"x":1}\n{"x":2}\n', b'{"x":1,"twice":2}\n{"x":2,"twice":4}\n'),
        (JSON, b'[{"x":1}]', b'[{"x":1,"twice":2}]'),
        (JSON, b'{"x":1}', b'{"x":1,"twice":2}'),
    ],
)
def test_answer_is_of_the_requests_type_unless_asked_otherwise(
    serve_it: Serve, content_type: str, body: bytes, answer: bytes
):
    assert ask(serve_it("double"), body, content_type) == (200, content_type, answer)


def test_accept_decides_the_answers_type(serve_it: Serve):
    assert ask(serve_it("double"), b'{"x":1}\n', JSON_LINES, CSV) == (200, CSV, b"1,2\n")


@pytest.mark.parametrize(
    ("accept", "answered"),
    [
        ("application/json; charset=utf-16", "application/json; charset=utf-8"),
        ("image/png, application/json;q=0.5", "application/json"),
        ("text/html, */*;q=0.8", "text/csv; header=present"),
        ("application/*", "text/csv; header=present"),
    ],
)
def test_accept_may_be_a_wish_as_browsers_have_it(serve_it: Serve, accept: str, answered: str):
    status, content_type, _ = ask(serve_it("double"), b"x\n1\n", "text/csv; header=present", accept)

    assert (status, content_type) == (200, answered)


def test_mark_of_utf_8_before_a_header_is_no_part_of_a_name(serve_it: Serve):
    assert ask(serve_it("double"), b"\xef\xbb\xbfx\n1\n", "text/csv; header=present", JSON)[0] == 200


def test_endpoint_of_a_served_callable_is_sent_what_it_advises(open_served: Callable[..., Opened]):
    stage = open_served("double")

    assert stage.stage.exchange.content_type_of(TABLE) == ARROW


def test_columns_name_the_fields_of_csv_without_a_header(serve_it: Serve):
    assert ask(serve_it("double", "x", "y"), b"1,2\n3,4\n", CSV) == (200, CSV, b"1,2,2\n3,4,6\n")


def test_parameters_are_the_constructors(serve_it: Serve):
    assert ask(serve_it("Scale", params={"by": 3}), b"1,2\n", CSV)[2] == b"3,6\n"


def test_lines_and_whole_bodies_go_to_functions_of_bytes(serve_it: Serve):
    assert ask(serve_it("upper"), b"a,b\nc\n", CSV) == (200, CSV, b"A,B\nC\n")
    assert ask(serve_it("size"), b"\x89PNG", "image/png") == (200, JSON_LINES, b'{"prediction":4}\n')


def test_bytes_that_a_table_is_answered_with_are_lines(serve_it: Serve):
    assert ask(serve_it("labels"), bytes(encode(TABLE, ARROW)), ARROW) == (200, CSV, b"a\n?\n")


def test_values_without_names_are_predictions(serve_it: Serve):
    assert ask(serve_it("first_column"), b"[[1.5, 2.5]]", JSON)[0] == 200
    assert ask(serve_it("first_column"), b"1.5,2\n2.5,3\n", CSV) == (200, CSV, b"1.5\n2.5\n")


def test_empty_request_is_answered_204(serve_it: Serve):
    assert ask(serve_it("double"), b"", CSV)[0] == 204


def test_exception_is_the_records_failure_and_says_where(open_served: Callable[..., Opened]):
    failure = open_served("fail").failure("1")

    assert (failure.reason, failure.remedy) == ("HTTP 400", Remedy.ISOLATE)
    assert failure.message.startswith("KeyError: 'age' (")
    assert failure.message.endswith("in fail)")


def test_G8_a_callable_that_breaks_its_contract_is_not_made_to_fit_by_sending_it_less(
    open_served: Callable[..., Opened],
):
    failure = open_served("first_only").failure("1", "2")

    assert (failure.reason, failure.remedy) == ("HTTP 400", Remedy.NONE)
    text = "stage 'stage' breaks its contract: WrongAnswer: stage 'first_only' answered 1 records for 2 sent; to drop"
    assert failure.message.startswith(text)


def test_exception_that_asks_for_it_is_retried(open_served: Callable[..., Opened]):
    failure = open_served("busy").failure("1")

    assert (failure.reason, failure.remedy, failure.message[:11]) == ("HTTP 503", Remedy.RETRY, "Busy: later")


@pytest.mark.parametrize(
    ("body", "content_type", "accept", "status", "text"),
    [
        (b"[1", JSON, "", 400, b"not JSON"),
        (b'{"x":1}\n{"x":\n', JSON_LINES, "", 400, b"record 2 "),
        (b'1,2\n"x', CSV, "", 400, b"record 2 "),
        (b'{"x":1}\n', JSON_LINES, "image/png", 406, b"a table cannot be sent as image/png"),
        (b"x" * 2_000_000, CSV, "", 413, b""),
    ],
)
def test_bad_request_is_answered_with_its_status(
    serve_it: Serve, body: bytes, content_type: str, accept: str, status: int, text: bytes
):
    answer = ask(serve_it("double", max_payload_mb=1), body, content_type, accept)

    assert answer[0] == status
    assert text in answer[2]


def test_many_requests_at_once_are_all_answered(open_served: Callable[..., Opened]):
    stage = open_served("upper", max_concurrent_transforms=32)

    answers = stage.all_at_once(*[csv_records(f"a{i}") for i in range(64)])

    records = [answer.records for answer in answers if isinstance(answer, Answer)]
    texts = [bytes(one.body()) for one in records if isinstance(one, ByteRecords)]
    assert texts == [b"A%d\n" % i for i in range(64)]


def test_what_cannot_be_imported_or_constructed_is_told():
    with pytest.raises(JobError, match=r"cannot import 'tests.served:doubel': .* did you mean 'double'"):
        open_for_serving("tests.served:doubel", {})
    with pytest.raises(StageStartError, match="did not start: ValueError: by must not be negative"):
        open_for_serving("tests.served:Scale", {"by": -1})


@pytest.mark.parametrize(
    ("reference", "command"), [("scoring", "scoring:ATTRIBUTE"), (":f", "MODULE:ATTRIBUTE"), ("a:", "a:ATTRIBUTE")]
)
def test_reference_without_an_attribute_is_told_by_the_command_that_has_one(reference: str, command: str):
    with pytest.raises(JobError) as error:
        open_for_serving(reference, {})

    text = f"cannot serve {reference!r}: it must be module:attribute\n  next:  batchpipe serve {command}"
    assert str(error.value) == text


def test_port_that_is_taken_is_told_with_how_to_choose_another(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", str(port))

        with pytest.raises(StageStartError) as error:
            serve("tests.served:double", {})

    assert error.value.message == f"cannot listen on 127.0.0.1:{port}: another program has the port"
    another = f"SAGEMAKER_BIND_TO_PORT={port + 1} batchpipe serve tests.served:double ..."
    assert error.value.next == f"choose another one: {another}"


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [("127.0.0.1", "70000", "port must be 0-65535"), ("192.0.2.1", "8080", "requested address")],
)
def test_address_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch, host: str, port: str, why: str):
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", port)

    with pytest.raises(StageStartError, match=f"^cannot listen on {host}:{port}: .*{why}") as error:
        serve("tests.served:double", {}, host=host)

    assert error.value.next == "choose another address by --host, or another port by SAGEMAKER_BIND_TO_PORT"


@pytest.mark.parametrize(
    ("variable", "default"), [("SAGEMAKER_BIND_TO_PORT", "8080"), ("SAGEMAKER_MAX_PAYLOAD_IN_MB", "100")]
)
@pytest.mark.parametrize("value", ["many", "nan", "inf"])
def test_variable_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch, variable: str, default: str, value: str):
    monkeypatch.setenv(variable, value)

    with pytest.raises(
        JobError, match=f"the environment variable {variable} is '{value}', which is no number"
    ) as error:
        serve("tests.served:double", {})

    assert error.value.next == f"{variable}={default} batchpipe serve ..., or leave it unset for {default}"


def test_parameter_that_is_no_yaml_is_2_and_says_so():
    command = [sys.executable, "-m", "batchpipe", "serve", "tests.served:Scale", "--param", "by=["]

    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ran.returncode == 2
    assert "Error: --param takes a value as in YAML, with quotes around text that is none: " in ran.stderr


def test_server_listens_on_the_contracts_port_and_ends_at_sigterm():
    ports = take_ports()
    code = "from batchpipe.serve import serve; serve('tests.served:double', {})"
    environment = {**os.environ, "SAGEMAKER_BIND_TO_PORT": str(ports.port)}
    folder = Path(__file__).parent.parent

    with running([sys.executable, "-c", code], env=environment, cwd=folder) as server:
        wait_until_ready("127.0.0.1", ports.port, 30, lambda: None)
        answer = ask(f"127.0.0.1:{ports.port}", bytes(encode(TABLE, ARROW)), ARROW)
        server.send_signal(signal.SIGTERM)

        assert server.wait(10) == 0
    ports.close()
    assert answer[:2] == (200, ARROW)


@pytest.mark.parametrize(
    ("arguments", "host"), [([], "127.0.0.1"), (["serve"], "0.0.0.0"), (["--host", "127.0.0.2", "serve"], "127.0.0.2")]
)
def test_G7_only_an_image_that_is_told_to_serve_is_reached_from_elsewhere(arguments: list[str], host: str):
    ports = take_ports()
    command = [sys.executable, "-m", "batchpipe", "serve", "tests.served:double", *arguments]
    environment = {**os.environ, "SAGEMAKER_BIND_TO_PORT": str(ports.port)}
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}

    with running(command, env=environment, cwd=Path(__file__).parent.parent, **options) as server:
        wait_until_ready("127.0.0.1" if host == "0.0.0.0" else host, ports.port, 60, lambda: None)
        listening = {
            found.laddr.ip for found in psutil.Process(server.pid).net_connections() if found.status == "LISTEN"
        }
        server.send_signal(signal.SIGTERM)
        said = server.communicate(timeout=30)[1]

        assert server.returncode == 0
    ports.close()
    assert listening == {host}
    address = f"http://{host}:{ports.port}"
    assert said == f"serving tests.served:double on {address} (another port: SAGEMAKER_BIND_TO_PORT; Ctrl-C ends it)\n"


def test_ping_is_refused_while_a_call_that_nobody_waits_for_holds_the_only_thread(serve_it: Serve):
    """So its caller knows that it is stuck: the records that wait behind such a call are not at fault."""
    address = serve_it("wait")
    host, port = address.split(":")
    connection = http.client.HTTPConnection(address, timeout=0.2)
    connection.request("POST", "/invocations", b"1\n", {"Content-Type": CSV})
    with pytest.raises(TimeoutError):
        connection.getresponse()
    was_ready = answers_ping(host, int(port), 0.5)
    connection.close()

    is_ready = answers_ping(host, int(port), 0.5)

    served.go_on.set()
    assert (was_ready, is_ready) == (True, False)
    assert answers_ping(host, int(port), 10)
