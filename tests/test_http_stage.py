"""HTTP stages against a real server that misbehaves: every outcome becomes a reason and a remedy."""

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batchpipe.batch import ByteRecords
from batchpipe.content import ARROW, CSV, JSON, JSON_LINES
from batchpipe.errors import StageStartError
from batchpipe.specs.spec import MB
from batchpipe.stages import Answer, InvocationFailed, Remedy
from batchpipe.stages.contract import Advice
from batchpipe.stages.exchange import Exchange
from batchpipe.stages.http import retry_after_s
from batchpipe.stages.tables import to_table
from tests.jobs import running
from tests.opened_stage import SERVER, Opened, csv_records, make_job, opened

Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A running stage server."""
    environment = {**os.environ, "SAGEMAKER_BIND_TO_PORT": "0"}
    with running(SERVER, stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().split()[-1]}/invocations"


@pytest.fixture
def open_endpoint(url: str, tmp_path: Path) -> Iterator[Open]:
    """Open an endpoint stage with these keys."""
    with ExitStack() as stack:

        def open_it(
            *others: dict[str, Any], headers: dict[str, str] | None = None, url: str = url, **keys: Any
        ) -> Opened:
            blocks = {name: keys.pop(name) for name in ("batch", "input", "output") if name in keys}
            stage = {"endpoint": {"url": url, "headers": headers or {}}, **keys}
            return stack.enter_context(opened(tmp_path, stage, *others, **blocks))

        yield open_it


def test_records_are_answered_in_order(open_endpoint: Open):
    assert open_endpoint().csv("1,2", '"a\nb",4', "5,6") == ["1,2", '"a\nb",4', "5,6"]


def test_answer_keeps_its_media_type_without_parameters(open_endpoint: Open):
    records = open_endpoint().invoke(csv_records("!as text/csv;charset=latin-1 \\xe9\\n")).records

    assert isinstance(records, ByteRecords)
    assert (records.to_list(), records.content_type) == (["é\n".encode()], "text/csv")


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, Remedy.ISOLATE),
        (404, Remedy.ISOLATE),
        (408, Remedy.RETRY),
        (413, Remedy.SMALLER),
        (415, Remedy.ISOLATE),
        (422, Remedy.ISOLATE),
        (429, Remedy.RETRY),
        (500, Remedy.RETRY),
        (503, Remedy.RETRY),
        (302, Remedy.ISOLATE),
    ],
)
def test_G8_status_is_a_failure_with_a_remedy_and_never_data(open_endpoint: Open, status: int, remedy: Remedy):
    failure = open_endpoint().failure(f"!status {status}", "1,2")

    assert (failure.reason, failure.remedy) == (f"HTTP {status}", remedy)
    assert failure.message.endswith(f"reason: {status}")


def test_retry_after_is_passed_on(open_endpoint: Open):
    assert open_endpoint().failure("!status 429 7").retry_after_s == 7.0


@pytest.mark.parametrize(("hours", "low", "high"), [(1, 3500, 3600), (-1, 0, 0)])
def test_retry_after_may_be_a_date(hours: int, low: float, high: float):
    date = format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)
    seconds = retry_after_s(date)

    assert seconds is not None
    assert low <= seconds <= high


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e400", "\u00b2", "9" * 400, "86401"])
def test_retry_after_that_makes_no_sense_was_not_asked_for(value: str):
    assert retry_after_s(value) is None


@pytest.mark.parametrize("order", ["drop", "reset", "short", "nonsense"])
def test_broken_connection_is_retried(open_endpoint: Open, order: str):
    stage = open_endpoint()

    failure = stage.failure(f"!{order}")

    assert (failure.remedy, failure.reason) == (Remedy.RETRY, "ConnectionBroken")
    assert stage.csv("1,2") == ["1,2"]


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ("drop", "the connection broke without an answer"),
        ("reset", "the connection broke in the middle of the answer"),
        ("short", "the connection broke in the middle of the answer"),
        ("cut", "the connection broke in the middle of the answer"),
        ("nonsense", "the answer is not HTTP/1.1: "),
        ("promise", "the connection broke in the middle of the answer"),
    ],
)
def test_broken_connection_says_when_it_broke(open_endpoint: Open, order: str, text: str):
    assert text in open_endpoint().failure(f"!{order}").message


def test_server_that_closed_an_idle_connection_costs_no_attempt(open_endpoint: Open):
    stage = open_endpoint()

    for _ in range(20):
        assert stage.csv("!leave") == ["!leave"]


def test_server_that_gave_an_idle_connection_up_with_408_costs_no_attempt(open_endpoint: Open):
    stage = open_endpoint(invocations_max_retries=0)

    for _ in range(20):
        assert stage.csv("!idle") == ["!idle"]


def test_type_that_a_server_refuses_is_told_with_who_gives_it(open_endpoint: Open):
    failure = open_endpoint(content_type="text/csv").failure("!status 415")

    assert failure.message == "it does not take text/csv, which the input gives: reason: 415"


def test_nobody_listening_is_retried(open_endpoint: Open):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    failure = open_endpoint(url=f"http://127.0.0.1:{port}/").failure("1")

    assert (failure.reason, failure.remedy) == ("ConnectionRefusedError", Remedy.RETRY)


def test_slow_answer_is_a_timeout(open_endpoint: Open):
    failure = open_endpoint(invocations_timeout_s=0.2).failure("!slow 1")

    assert (failure.reason, failure.remedy) == ("Timeout", Remedy.RETRY)
    assert failure.message == "no answer within 0.2 s (invocations_timeout_s)"


def test_late_answer_is_not_taken_for_the_next_one(open_endpoint: Open):
    stage = open_endpoint(invocations_timeout_s=0.2)
    stage.failure("!slow 0.4")

    assert stage.csv("!slow 0.01", "mine") == ["!slow 0.01", "mine"]


@pytest.mark.parametrize(("order", "count"), [("few", 2), ("many", 4)])
def test_G8_wrong_count_is_a_failure(open_endpoint: Open, order: str, count: int):
    failure = open_endpoint().failure(f"!{order}", "1", "2")

    assert (failure.reason, failure.remedy) == ("WrongCount", Remedy.ISOLATE)
    assert failure.message == f"answered {count} records for 3 sent"


def test_G8_empty_answer_is_a_wrong_count(open_endpoint: Open):
    failure = open_endpoint().failure("!status 204", "1")

    assert failure.message == "answered 0 records for 2 sent (HTTP 204 with an empty body)"


def test_empty_answer_to_one_record_alone_is_its_answer(open_endpoint: Open):
    assert open_endpoint(batch={"max_records": 1}).csv("!status 204") == [""]


def test_G8_answer_that_cannot_be_counted_is_a_failure(open_endpoint: Open):
    failure = open_endpoint().failure("!as text/html <p>", "1")

    assert "records of text/html cannot be counted; does `accept` name a type of many records?" in failure.message


def test_answer_without_a_content_type_is_what_was_asked_for(open_endpoint: Open):
    stage = open_endpoint(accept="application/jsonlines")

    records = stage.invoke(csv_records('!as none {"a":1}\\n')).records

    assert isinstance(records, ByteRecords)
    assert records.content_type == "application/jsonlines"


def test_compressed_answer_is_not_taken_for_data(open_endpoint: Open, url: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stage = open_endpoint(url=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"
        with_reply(listener, reply)

        assert "the answer is compressed (gzip)" in stage.failure("1").message


def with_reply(listener: socket.socket, reply: bytes) -> None:
    """Answer the next connection with these bytes."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(reply)

    threading.Thread(target=answer).start()


@pytest.mark.parametrize("order", ["chunked", "until_closed", "continue"])
def test_every_way_of_framing_an_answer_works(open_endpoint: Open, order: str):
    stage = open_endpoint()

    for _ in range(2):
        assert stage.csv(f"!{order}", "some more text", "end") == [f"!{order}", "some more text", "end"]


def test_large_bodies_go_and_come_whole(open_endpoint: Open):
    lines = [f"{i}," + "x" * 1000 for i in range(4000)]

    assert open_endpoint().csv(*lines) == lines


def test_connections_are_kept_and_used_again(open_endpoint: Open):
    stage = open_endpoint()

    assert len({stage.csv("!connection")[0] for _ in range(5)}) == 1


def test_requests_are_in_flight_together(open_endpoint: Open):
    stage = open_endpoint(max_concurrent_transforms=4)

    answers = stage.all_at_once(*[csv_records("!together 4", str(i)) for i in range(4)])

    assert all(isinstance(answer, Answer) for answer in answers)


def test_no_more_requests_are_in_flight_than_allowed(open_endpoint: Open):
    stage = open_endpoint(max_concurrent_transforms=2)

    answers = stage.all_at_once(*[csv_records("!connection") for _ in range(20)])
    ports = {bytes(answer.records[0]) for answer in answers if isinstance(answer, Answer)}

    assert len(ports) == 2


def test_body_over_the_limit_is_not_sent(open_endpoint: Open):
    failure = open_endpoint(max_payload_mb=1 / 1024).failure(*["x" * 99] * 11)

    assert (failure.reason, failure.remedy) == ("PayloadTooLarge", Remedy.SMALLER)
    assert failure.message == "1,100 bytes of 11 records, over the limit of 1,024 (max_payload_mb)"


def test_empty_request_is_never_sent(open_endpoint: Open):
    assert str(open_endpoint().failure()) == "NoRecords: an empty request is never sent"


def test_body_of_exactly_the_limit_is_sent(open_endpoint: Open):
    assert len(open_endpoint(max_payload_mb=1 / 1024).csv(*["x" * 63] * 16)) == 16


def test_request_bears_its_headers_and_the_urls_path(open_endpoint: Open, url: str):
    stage = open_endpoint(
        headers={"X-Key": "k1"},
        url=url.replace("http://", "http://me:pass%40word@") + "?v=1",
        accept="text/csv; charset=utf-8",
    )

    path, *headers = stage.csv("!headers")[0].split(",")

    assert path == "/invocations?v=1"
    assert {"x-key=k1", "accept=text/csv; charset=utf-8", "content-type=text/csv"} < set(headers)
    assert "authorization=Basic bWU6cGFzc0B3b3Jk" in headers


def test_accept_is_the_next_stages_content_type(open_endpoint: Open, url: str):
    stage = open_endpoint({"endpoint": {"url": url}, "content_type": "application/json"})

    assert "accept=application/json" in stage.csv("!headers")[0]


def test_secrets_in_an_error_answer_are_masked(open_endpoint: Open):
    stage = open_endpoint(headers={"Authorization": "Bearer s3cr3t-token"})

    assert stage.failure("!say bad token s3cr3t-token").message == "bad token ***"


def test_secret_with_white_space_in_it_is_masked_before_the_answer_becomes_one_line(open_endpoint: Open):
    stage = open_endpoint(headers={"X-Key": "two  spaces\tand a tab"})

    assert stage.failure("!say bad key two  spaces\tand a tab").message == "bad key ***"


def test_secret_is_masked_before_the_answer_is_cut(open_endpoint: Open):
    secret = "s3cr3t-" * 20
    stage = open_endpoint(headers={"X-Key": secret})

    assert stage.failure(f"!say {' ' * 1950}{secret}").message == "***"


def test_long_error_answer_is_cut_and_on_one_line(open_endpoint: Open):
    assert len(open_endpoint().failure("!say " + "long " * 2000).message) == 500


def test_json_is_wrapped_and_unwrapped(open_endpoint: Open):
    stage = open_endpoint(content_type="application/json", request_key="predictions", answer_key="predictions")

    records = stage.invoke(ByteRecords.of([b'{"a":1}\n', b'{"a":2}\n'], "application/jsonlines")).records

    assert isinstance(records, ByteRecords)
    assert records.to_list() == [b'{"a":1}\n', b'{"a":2}\n']


def test_table_goes_as_arrow_and_comes_back(open_endpoint: Open):
    table = pa.table({"id": [1, 2], "at": pa.array([1, None], pa.timestamp("us"))})

    answer = open_endpoint(content_type="application/vnd.apache.arrow.stream").invoke(table).records

    assert isinstance(answer, pa.Table)
    assert answer.equals(table)


def test_table_goes_as_csv_where_nothing_is_stated(open_endpoint: Open):
    records = open_endpoint().invoke(pa.table({"id": [1, 2], "name": ["a", None]})).records

    assert isinstance(records, ByteRecords)
    assert (records.to_list(), records.content_type) == ([b'1,"a"\n', b"2,\n"], "text/csv")


def test_table_that_came_over_http_goes_on_as_arrow(url: str, tmp_path: Path):
    job = make_job(tmp_path, {"endpoint": {"url": url}}, {"endpoint": {"url": url}})

    assert Exchange.of(job.stages[1], job, Advice()).content_type_of(pa.table({"id": [1]})) == ARROW


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, JSON), ({"content_type": CSV}, CSV), ({"content_type": JSON_LINES}, JSON_LINES)]
)
def test_table_goes_as_the_server_advises_where_the_job_states_nothing(
    url: str, tmp_path: Path, keys: dict[str, str], expected: str
):
    job = make_job(tmp_path, {"endpoint": {"url": url}, **keys})

    exchange = Exchange.of(job.stages[0], job, Advice(table_type=JSON))

    assert exchange.content_type_of(pa.table({"id": [1]})) == expected
    assert exchange.content_type_of(csv_records("1")) == keys.get("content_type", CSV)


def test_header_of_records_is_sent_if_asked_for_and_counts_as_payload(open_endpoint: Open):
    records = replace(csv_records("007,1.50", "2,x"), header=b'id,"a,b"\n')
    stage = open_endpoint(content_type="text/csv;header=present", max_payload_mb=22 / MB)

    assert stage.stage.exchange.encode(records, "text/csv") == b'id,"a,b"\n007,1.50\n2,x\n'
    assert stage.outcome(records).failed == ()
    with pytest.raises(InvocationFailed, match="PayloadTooLarge: 22 bytes of 2 records"):
        open_endpoint(header=True, max_payload_mb=21 / MB).invoke(records)


def test_header_that_a_stage_does_not_answer_ends_the_run(open_endpoint: Open):
    with pytest.raises(StageStartError, match="does not fit: a header is wanted, and the records come without one"):
        open_endpoint(header=True).csv("1,2")


def test_answer_without_the_header_that_the_next_stage_wants_is_wrong_once_one_has_fitted(open_endpoint: Open):
    stage = open_endpoint({"endpoint": {"url": "http://x/"}, "content_type": "text/csv", "header": True})
    stage.invoke(csv_records("!as text/csv;header=present id,name\\n7,b\\n"))

    failure = stage.failure("7,b")

    assert failure.reason == "WrongAnswer"
    assert failure.message == "answered text/csv; the next stage takes text/csv with a header"


@pytest.mark.parametrize("max_records", [1, None])
@pytest.mark.parametrize("mark", ["", "\\xef\\xbb\\xbf"])
def test_csv_answer_with_a_header_knows_its_columns(open_endpoint: Open, max_records: int | None, mark: str):
    order = f"!as text/csv;header=present {mark}id,name\\n7,b\\n"
    records = open_endpoint(batch={"max_records": max_records}).invoke(csv_records(order)).records

    assert isinstance(records, ByteRecords)
    assert (records.to_list(), records.header) == ([b"7,b\n"], b"id,name\n")
    assert to_table(records).to_pylist() == [{"id": 7, "name": "b"}]


def test_whole_file_that_is_answered_to_one_record_keeps_its_header(open_endpoint: Open):
    stage = open_endpoint(batch={"max_records": 1})
    records = stage.invoke(csv_records("!as text/csv;header=present id\\n7\\n8\\n")).records

    assert isinstance(records, ByteRecords)
    assert (records.to_list(), records.header) == ([b"id\n7\n8\n"], b"")


def test_answer_with_a_header_goes_on_as_it_came(open_endpoint: Open):
    named = open_endpoint().invoke(csv_records("!as text/csv;header=present a\\n!headers\\n")).records
    exchange = open_endpoint().stage.exchange

    assert exchange.content_type_of(named) == "text/csv; header=present"
    assert bytes(exchange.encode(named, "text/csv; header=present")) == b"a\n!headers\n"


@pytest.mark.parametrize(
    ("records", "content_type", "body"),
    [
        (replace(csv_records("7,b"), header=b"id,name\n"), JSON, b'[{"id":7,"name":"b"}]'),
        (ByteRecords.of([b'{"id":7,"name":"b"}'], JSON), "text/csv; header=present", b'"id","name"\n7,"b"\n'),
        (ByteRecords.of([b'{"id":7}\n'], JSON_LINES), CSV, b"7\n"),
    ],
)
def test_answers_that_name_their_columns_are_converted_for_the_next_stage(
    open_endpoint: Open, records: ByteRecords, content_type: str, body: bytes
):
    exchange = open_endpoint(content_type=content_type).stage.exchange

    assert exchange.can_send(records, content_type)
    assert bytes(exchange.encode(records, content_type)) == body


def test_object_goes_alone_also_as_a_type_that_holds_many(open_endpoint: Open):
    """Two files in one body would be one file with a header in its middle (the design, section 3)."""
    stage = open_endpoint(content_type="text/csv", input={"uri": "in", "format": "object"})
    files = [b"a\n1\n2\n", b"a\n3\n"]

    records = stage.outcome(ByteRecords.of(files)).records

    assert isinstance(records, ByteRecords)
    assert records.to_list() == files


def test_answer_of_another_type_than_most_is_its_records_failure(open_endpoint: Open):
    rows = [f'{{"n":{n}}}' for n in range(5)]
    rows[0] = "!as text/html <p>sorry</p>"
    stage = open_endpoint(content_type="application/json", batch={"max_records": 1})

    outcome = stage.outcome(ByteRecords.of([row.encode() for row in rows], JSON))

    assert (outcome.places.tolist(), [failed.place for failed in outcome.failed]) == ([1, 2, 3, 4], [0])
    assert outcome.failed[0].why.message == (
        "answered text/html; others of its mini-batch are answered as application/json"
    )


def test_images_of_several_types_are_not_called_by_the_first_ones(open_endpoint: Open):
    stage = open_endpoint(content_type="image/png")

    records = stage.outcome(ByteRecords.of([b"!as image/png 1", b"!as image/jpeg 2"])).records

    assert isinstance(records, ByteRecords)
    assert (records.to_list(), records.content_type) == ([b"1", b"2"], "application/octet-stream")


def test_objects_go_one_a_request_in_order(open_endpoint: Open):
    stage = open_endpoint(content_type="image/png", max_concurrent_transforms=4)
    images = [b"!together 4", b"!slow 0.05", b"\x89PNG", b"!together 4", b"!together 4", b"!together 4"]

    records = stage.outcome(ByteRecords.of(images)).records

    assert isinstance(records, ByteRecords)
    assert records.to_list() == images


def test_failing_object_fails_alone_and_no_other_is_sent_again(open_endpoint: Open):
    stage = open_endpoint(content_type="image/png")

    outcome = stage.outcome(ByteRecords.of([b"!flaky once 1", b"!status 400", b"fine"]))

    assert [(failed.place, str(failed.why)) for failed in outcome.failed] == [
        (0, "HTTP 503: !flaky once 1"),
        (1, "HTTP 400: reason: 400"),
    ]
    assert outcome.places.tolist() == [2]


def test_single_record_json_is_bare(open_endpoint: Open):
    stage = open_endpoint(content_type="application/json", batch={"max_records": 1})

    records = stage.outcome(ByteRecords.of([b'{"a":1}\n', b"[2]\n"], "application/jsonlines")).records

    assert isinstance(records, ByteRecords)
    assert records.to_list() == [b'{"a":1}', b"[2]"]


def test_uncounted_answer_is_kept_whole(open_endpoint: Open):
    stage = open_endpoint(count="none", output={"uri": "out", "format": "raw"})

    records = stage.invoke(csv_records("!as text/plain a\\nb\\nc", "1")).records

    assert isinstance(records, ByteRecords)
    assert records.to_list() == [b"a\nb\nc", b""]


def test_content_type_that_does_not_fit_names_the_stage(open_endpoint: Open):
    with pytest.raises(
        StageStartError, match="stage 'stage' takes application/json, and what the input gives does not fit"
    ):
        open_endpoint(content_type="application/json").csv("1,2")


@pytest.mark.parametrize(
    ("input_format", "keys", "takes_table"),
    [
        ("csv", {}, False),
        ("csv", {"content_type": "text/csv; charset=utf-8"}, False),
        ("csv", {"header": True}, False),
        ("csv", {"content_type": "text/csv; header=present"}, False),
        ("csv", {"content_type": "application/json"}, True),
        ("jsonl", {"content_type": "application/json"}, False),
        ("jsonl", {"content_type": "text/csv"}, True),
        ("lines", {"content_type": "text/csv"}, False),
    ],
)
def test_text_is_parsed_only_for_a_stage_that_cannot_take_it(
    open_endpoint: Open, input_format: str, keys: dict[str, Any], takes_table: bool
):
    stage = open_endpoint(input={"uri": "in", "format": input_format}, **keys).stage

    assert stage.takes_table is takes_table


@pytest.mark.parametrize(
    ("document", "advice"),
    [
        ({"MaxConcurrentTransforms": 3, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 5}, Advice(5, 3, True)),
        ({"MAX_CONCURRENT_TRANSFORMS": "2", "BATCH_STRATEGY": "MultiRecord"}, Advice(None, 2, False)),
        ({"MaxPayloadInMB": 0, "MaxConcurrentTransforms": None, "BatchStrategy": "?"}, Advice()),
        ({"MaxPayloadInMB": "many", "MaxConcurrentTransforms": float("nan")}, Advice()),
        ({"TableContentType": "application/x-ndjson"}, Advice(table_type=JSON_LINES)),
        ({"TABLE_CONTENT_TYPE": "text/csv; header=present"}, Advice(table_type=CSV)),
        ({"TableContentType": "image/png"}, Advice()),
        ({"TableContentType": 5}, Advice()),
        ([1], Advice()),
    ],
)
def test_advice_is_read_in_both_spellings_and_survives_the_journal(document: object, advice: Advice):
    assert Advice.of(document) == advice
    assert Advice.of(json.loads(json.dumps(advice.as_document()))) == advice


def test_close_ends_the_idle_connections(open_endpoint: Open):
    stage = open_endpoint()
    stage.csv("1")
    [connection] = stage.stage._connections._idle

    stage.stage.close()

    assert connection.closed


def test_positions_of_a_large_uncounted_answer_fit_its_records(open_endpoint: Open):
    records = (
        open_endpoint(count="none", output={"uri": "out", "format": "raw"}).invoke(csv_records("1", "2", "3")).records
    )

    assert isinstance(records, ByteRecords)
    assert np.array_equal(records.ends - records.starts, [6, 0, 0])
