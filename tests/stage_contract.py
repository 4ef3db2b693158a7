"""What every stage whose server we start must do, be it a process or a container: each kind's tests derive from it."""

import json
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import StageStartError
from batchpipe.stages import Answer, InvocationFailed, Remedy
from batchpipe.stages.served import Served
from tests.opened_stage import Opened, csv_records

Open = Callable[..., Opened]
"""``open_server(environment={...}, model_data=..., batch={...}, **keys of the stage)``."""


LOG_BYTES = 17 << 20
"""Of one server's log, at most: two files of 8 MB, and some."""


class StageContract:
    """Derived classes have fixtures: ``open_server``; ``left``, what the stages started that is still there; and
    ``log_on_disk``, the bytes that are kept of a log while its server runs.
    """

    def test_server_that_pings_is_invoked(self, open_server: Open):
        assert open_server().csv("1,2", "3,4") == ["1,2", "3,4"]

    def test_G5_nothing_is_left_after_close(self, open_server: Open, left: Callable[[], list[str]]):
        stage = open_server()
        assert left()

        stage.stage.close()
        stage.stage.close()

        assert not left()

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({}, ["true", "MULTI_RECORD", "", ""]),
            ({"batch": {"max_records": 1, "max_payload_mb": 2.5}}, ["true", "SINGLE_RECORD", "3", ""]),
            ({"max_payload_mb": 6, "max_concurrent_transforms": 2}, ["true", "MULTI_RECORD", "6", "2"]),
        ],
    )
    def test_server_is_told_what_the_job_states(self, open_server: Open, keys: dict[str, Any], expected: list[str]):
        names = ["BATCH", "BATCH_STRATEGY", "MAX_PAYLOAD_IN_MB", "MAX_CONCURRENT_TRANSFORMS"]

        answer = open_server(**keys).csv("!environment " + " ".join(f"SAGEMAKER_{name}" for name in names))

        assert answer == [",".join(expected)]

    def test_server_has_ports_to_spare_and_the_users_environment(self, open_server: Open):
        stage = open_server(environment={"LANG_OF_MODEL": "de"})

        port, spare, lang = stage.csv("!environment SAGEMAKER_BIND_TO_PORT SAGEMAKER_SAFE_PORT_RANGE LANG_OF_MODEL")[
            0
        ].split(",")

        first, last = map(int, spare.split("-"))
        assert last - first >= 10
        assert not first <= int(port) <= last
        assert lang == "de"

    @pytest.mark.parametrize(
        ("keys", "concurrency", "payload"),
        [
            ({}, 3, 5 << 20),
            ({"max_concurrent_transforms": 7, "max_payload_mb": 2}, 7, 2 << 20),
            ({"batch": {"max_concurrent_transforms": 8, "max_payload_mb": 1}}, 8, 1 << 20),
        ],
    )
    def test_advice_stands_where_the_job_states_nothing(
        self, open_server: Open, keys: dict[str, Any], concurrency: int, payload: int
    ):
        advice = {
            "MaxConcurrentTransforms": 3,
            "MaxPayloadInMB": 5,
            "BatchStrategy": "SINGLE_RECORD",
            "TableContentType": "application/json",
        }

        stage = open_server(environment={"STAGE_PARAMETERS": json.dumps(advice)}, **keys).stage

        assert (stage.concurrency, stage.max_payload_bytes) == (concurrency, payload)
        assert stage.advice.as_document() == advice
        assert stage.exchange.single_record
        assert stage.exchange.table_type == "application/json"

    def test_without_advice_a_stage_has_the_defaults(self, open_server: Open):
        stage = open_server().stage

        assert (stage.concurrency, stage.max_payload_bytes) == (os.cpu_count(), 6 << 20)
        assert not stage.exchange.single_record

    def test_job_decides_how_many_records_a_request_has_whatever_is_advised(self, open_server: Open):
        environment = {"STAGE_PARAMETERS": '{"BATCH_STRATEGY": "SINGLE_RECORD", "MAX_PAYLOAD_IN_MB": "2"}'}

        stage = open_server(environment=environment, batch={"max_records": 9}).stage

        assert not stage.exchange.single_record
        assert stage.max_payload_bytes == 2 << 20

    def test_model_is_there_to_be_read(self, open_server: Open, tmp_path: Path):
        (tmp_path / "weights").write_text("w")
        with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "weights", "weights")

        stage = open_server(model_data=str(tmp_path / "model.tar.gz"))

        assert state_of(stage)["files"] == ["weights"]

    def test_requests_are_in_flight_together(self, open_server: Open):
        stage = open_server(max_concurrent_transforms=8)

        answers = stage.all_at_once(*[csv_records("!together 8") for _ in range(8)])

        assert all(isinstance(answer, Answer) for answer in answers)

    def test_server_that_exits_before_its_ping_fails_at_once_with_its_log(
        self, open_server: Open, left: Callable[[], list[str]]
    ):
        started = time.monotonic()

        with pytest.raises(
            StageStartError, match=r"^stage 'stage' did not start: .* exited with code 3 after"
        ) as error:
            open_server(environment={"STAGE_EXIT": "3"})

        assert time.monotonic() - started < 10
        assert "log:   no model for None\n         (last 1 of 1 lines; all in out/logs/stage.log)" in str(error.value)
        assert error.value.next.startswith("see its log, or start it by hand: ")
        assert not left()

    def test_server_that_never_pings_is_given_up(self, open_server: Open, left: Callable[[], list[str]]):
        text = r"did not start: no 200 from /ping within 5 s \(startup_timeout_s\), at last HTTP 503"

        with pytest.raises(StageStartError, match=text) as error:
            open_server(environment={"STAGE_PING": "503"}, startup_timeout_s=5)

        advice = (
            r"if it needs longer, --set stages\.stage\.\w+\.startup_timeout_s=10; else see its log, or start it by "
        )
        assert re.match(advice, error.value.next)
        assert not left()

    def test_waiting_ends_when_another_stage_did_not_start(self, open_server: Open, left: Callable[[], list[str]]):
        cancelled = threading.Event()
        threading.Timer(0.3, cancelled.set).start()

        with pytest.raises(StageStartError, match="stage 'stage' was not waited for: another stage did not start"):
            open_server(environment={"STAGE_PING": "503"}, cancelled=cancelled)

        assert not left()

    def test_server_that_died_is_told_and_started_again(self, open_server: Open, tmp_path: Path):
        stage = open_server()

        failure = stage.failure("!exit 5")

        assert (failure.reason, failure.remedy) == ("ServerDied", Remedy.DIED)
        assert " exited with code 5 after " in failure.message
        assert "serving on " in failure.traceback
        assert stage.csv("1") == ["1"]
        stage.stage.close()
        assert (tmp_path / "logs" / "stage.log").read_text().count("serving on ") == 2

    def test_requests_beside_one_that_kills_the_server_are_not_at_fault(self, open_server: Open):
        stage = open_server(max_concurrent_transforms=4, batch={"max_records": 1})

        outcome = stage.outcome(csv_records("1", "!slow 0.2", "!exit 5", "4", "5", "6"))

        assert [(failed.place, failed.why.reason) for failed in outcome.failed] == [(2, "ServerDied")]
        assert outcome.places.tolist() == [0, 1, 3, 4, 5]

    def test_server_that_answers_no_ping_after_a_timeout_is_started_again(
        self, open_server: Open, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("batchpipe.stages.served.UNANSWERED_S", 0.5)
        stage = open_server(invocations_timeout_s=0.5)

        failure = stage.failure("!freeze")

        assert (failure.reason, failure.remedy) == ("ServerDied", Remedy.DIED)
        assert failure.message.startswith("no answer within 0.5 s (invocations_timeout_s), and its ping is not")
        assert stage.csv("1") == ["1"]

    def test_requests_that_time_out_together_ask_once_whether_the_server_is_stuck(
        self, open_server: Open, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("batchpipe.stages.served.UNANSWERED_S", 0.5)
        asked, is_stuck = list[Served](), Served.is_stuck

        def ask(served: Served) -> bool:
            asked.append(served)
            return is_stuck(served)

        monkeypatch.setattr(Served, "is_stuck", ask)
        stage = open_server(invocations_timeout_s=0.5, max_concurrent_transforms=16, batch={"max_records": 1})

        answers = stage.all_at_once(*[csv_records("!freeze")] * 16)

        assert {answer.reason for answer in answers if isinstance(answer, InvocationFailed)} == {"ServerDied"}
        assert len(asked) == 1
        assert stage.csv("1") == ["1"]

    def test_server_that_drops_a_connection_is_not_taken_for_gone(self, open_server: Open):
        stage = open_server()

        assert stage.failure("!drop").reason == "ConnectionBroken"
        assert stage.csv("1") == ["1"]

    def test_G5_server_that_ignores_sigterm_is_stopped(self, open_server: Open, left: Callable[[], list[str]]):
        stage = open_server(environment={"STAGE_IGNORE_TERM": "1"})
        started = time.monotonic()

        stage.stage.close()

        assert not left()
        assert time.monotonic() - started < 10

    def test_G7_log_is_kept_with_secrets_masked(self, open_server: Open, tmp_path: Path):
        stage = open_server(environment={"TOKEN": "s3cr3t-token"})
        stage.csv("!log the token is s3cr3t-token")

        stage.stage.close()

        assert "the token is ***\n" in (tmp_path / "logs" / "stage.log").read_text()
        assert "s3cr3t" not in (tmp_path / "logs" / "stage.log").read_text()

    def test_G7_log_in_an_error_is_masked(self, open_server: Open):
        with pytest.raises(StageStartError, match=r"log:   no model for \*\*\*\n") as error:
            open_server(environment={"STAGE_EXIT": "1", "TOKEN": "s3cr3t-token"})

        assert "s3cr3t" not in str(error.value)

    def test_gigabyte_of_logs_is_bounded_in_memory_and_on_disk_and_its_end_kept(
        self, open_server: Open, tmp_path: Path, log_on_disk: Callable[[], int]
    ):
        stage = open_server()
        before = start_peak()

        stage.csv("!flood 1024")
        on_disk = log_on_disk()
        stage.stage.close()

        assert 1 << 20 < on_disk <= LOG_BYTES
        assert peak() - before <= 8 * LOG_BYTES  # as bytes, as text, masked, and as bytes again
        log = tmp_path / "logs" / "stage.log"
        assert log.stat().st_size <= LOG_BYTES
        assert log.read_text().endswith("end of the flood\n")


def start_peak() -> int:
    """Forget the most memory that this process ever had; what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most memory that this process had since `start_peak`, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) << 10


def state_of(stage: Opened) -> dict[str, Any]:
    """What the server sees of itself."""
    state: dict[str, Any] = json.loads(stage.csv("!state")[0].strip('"').replace('""', '"'))
    return state
