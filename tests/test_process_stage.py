"""Process stages: the contract, and what only processes have."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchpipe.errors import StageStartError
from batchpipe.specs.spec import MB
from batchpipe.stages import CannotStart
from batchpipe.stages.contract import Advice
from batchpipe.stages.ports import BLOCK, take_ports
from batchpipe.stages.process import open_process
from batchpipe.stages.watcher import open_watcher
from tests.opened_stage import SERVER, Opened, opened
from tests.stage_contract import Open, StageContract, state_of

BLOCK_KEYS = ("environment", "model_data", "startup_timeout_s")


@pytest.fixture
def open_server(tmp_path: Path) -> Iterator[Open]:
    """Open a process stage; what is no key of the stage goes to `open_process`."""
    with ExitStack() as stack:

        def open_it(command: list[str] = SERVER, batch: dict[str, Any] | None = None, **keys: Any) -> Opened:
            context = {name: keys.pop(name) for name in ("copy", "advice") if name in keys}
            block = {name: keys.pop(name) for name in BLOCK_KEYS if name in keys}
            given = {name: keys.pop(name) for name in ("cancelled", "watcher") if name in keys}
            stage = {"process": {"command": command, **block}, **keys}
            open_it = partial(open_process, **given)
            return stack.enter_context(opened(tmp_path, stage, batch=batch or {}, open_it=open_it, **context))

        yield open_it


@pytest.fixture
def left() -> Callable[[], list[str]]:
    """Servers and watchers among our descendants."""

    def running() -> list[str]:
        lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
        return [line for line in lines if "stage_server" in line or "watcher_process" in line]

    return running


@pytest.fixture
def log_on_disk(tmp_path: Path) -> Callable[[], int]:
    """Bytes of the log's files in the worker's folder."""
    return lambda: sum(file.stat().st_size for file in (tmp_path / "scratch").glob("stage.log*"))


class TestProcessContract(StageContract):
    """The contract all servers share."""


def test_command_runs_as_written_in_the_job_files_folder(open_server: Open, tmp_path: Path):
    state = state_of(open_server(command=[*SERVER, "--flag", "a b"]))

    assert (state["argv"], state["cwd"]) == (["--flag", "a b"], str(tmp_path))


def test_python_is_the_one_that_runs_batchpipe_and_finds_the_jobs_code(
    open_server: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PATH")
    (tmp_path / "post_server.py").write_text("from tests.stage_server import start; start()")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))

    stage = open_server(command=["python", "-m", "post_server"])

    assert stage.csv("!environment PYTHONPATH") == [os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])]


@pytest.mark.parametrize(
    "trouble",
    [
        {"STAGE_PARAMETERS_S": "2.5"},
        {"STAGE_PARAMETERS_BUSY": "6"},
        {"STAGE_PARAMETERS_BUSY": "2", "STAGE_PARAMETERS_STATUS": "502"},
    ],
)
def test_advice_that_comes_late_is_waited_for(open_server: Open, trouble: dict[str, str]):
    parameters = {"STAGE_PARAMETERS": '{"MaxPayloadInMB": 2, "MaxConcurrentTransforms": 1000000000}'}

    stage = open_server(environment=parameters | trouble).stage

    assert stage.max_payload_bytes == 2 * MB
    assert stage.concurrency == 1_000


@pytest.mark.parametrize("status", ["404", "500"])
def test_server_that_fails_to_say_what_it_advises_advises_nothing(open_server: Open, status: str):
    trouble = {"STAGE_PARAMETERS": "{}", "STAGE_PARAMETERS_BUSY": "9999", "STAGE_PARAMETERS_STATUS": status}

    assert open_server(environment=trouble).stage.advice == Advice()


def test_server_that_is_asked_what_it_advises_is_not_waited_for_once_another_stage_has_failed(open_server: Open):
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()

    with pytest.raises(StageStartError, match="was not waited for: another stage did not start"):
        open_server(environment={"STAGE_PARAMETERS": "{}", "STAGE_PARAMETERS_S": "300"}, cancelled=cancelled)


def test_ping_that_never_ends_is_no_answer(open_server: Open):
    with pytest.raises(StageStartError, match=r"no 200 from /ping within 1 s .* at last TimeoutError: no complete"):
        open_server(environment={"STAGE_DRIP": "1"}, startup_timeout_s=1)


def test_contract_wins_over_what_the_worker_inherited(open_server: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAGEMAKER_BATCH", "inherited")

    assert open_server().csv("!environment SAGEMAKER_BATCH") == ["true"]


def test_command_that_does_not_exist_says_so(open_server: Open, left: Callable[[], list[str]], tmp_path: Path):
    with pytest.raises(StageStartError, match=r"^stage 'stage' did not start: its command 'no-such' was not ") as error:
        open_server(command=["no-such"])

    place = f"a name is looked for in PATH, a path from {tmp_path}"
    assert error.value.next == f"install it where the workers run, or correct stages.stage.process.command: {place}"
    assert not left()


def test_command_that_cannot_be_run_says_why(open_server: Open, tmp_path: Path):
    (tmp_path / "server").write_text("#!/bin/sh\n")

    with pytest.raises(StageStartError, match=r"its command './server' cannot be run: Permission denied") as error:
        open_server(command=["./server"])

    advice = "make it a program that can be run (chmod +x), or correct stages.stage.process.command"
    assert error.value.next == advice


def test_server_that_does_not_start_is_told_with_its_command_by_hand_and_no_secret(open_server: Open, tmp_path: Path):
    with pytest.raises(StageStartError) as error:
        open_server(
            command=[*SERVER, "--key", "s3cr3t-token"], environment={"STAGE_EXIT": "3", "TOKEN": "s3cr3t-token"}
        )

    by_hand = f"cd {tmp_path} && SAGEMAKER_BIND_TO_PORT=8080 {' '.join(SERVER)} --key ***"
    assert error.value.next == f"see its log, or start it by hand: {by_hand}"


def test_server_that_was_killed_names_the_signal(open_server: Open):
    stage = open_server()
    psutil.Process(state_of(stage)["pid"]).kill()

    assert stage.failure("1").message.startswith("its process was killed by signal 9 after ")


def test_server_that_does_not_start_again_is_gone_for_good(open_server: Open, tmp_path: Path):
    stage = open_server(environment={"STAGE_ONCE": str(tmp_path / "once")})
    stage.failure("!exit 5")

    with pytest.raises(StageStartError, match=r"^stage 'stage' did not start: its process exited with code 1 after"):
        stage.csv("1")


def test_stages_of_a_worker_share_its_watcher(open_server: Open, left: Callable[[], list[str]]):
    with open_watcher() as watcher:
        for _ in range(2):
            open_server(watcher=watcher)

        assert len([line for line in left() if "watcher" in line]) == 1


def test_G5_worker_that_closes_its_watcher_stops_the_stage(open_server: Open, left: Callable[[], list[str]]):
    with open_watcher() as watcher:
        open_server(watcher=watcher)

    assert not left()


@pytest.mark.parametrize(("copy", "devices"), [(0, "0,1"), (3, "6,7")])
def test_copy_has_its_devices(open_server: Open, copy: int, devices: str):
    assert open_server(gpus=2, copy=copy).csv("!environment CUDA_VISIBLE_DEVICES") == [f'"{devices}"']


def test_log_of_another_copy_has_its_number(open_server: Open, tmp_path: Path):
    open_server(copy=3).stage.close()

    assert (tmp_path / "logs" / "stage.3.log").read_text().startswith("serving on ")


def test_ports_of_stages_are_apart(monkeypatch: pytest.MonkeyPatch):
    blocks = [take_ports() for _ in range(40)]
    for block in blocks:
        block.close()

    ports = sorted(block.port for block in blocks)
    assert all(later - earlier >= BLOCK for earlier, later in pairwise(ports))


def test_no_free_ports_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchpipe.stages.ports._FIRST", 20_000)
    monkeypatch.setattr("batchpipe.stages.ports._LAST", 20_000)

    with pytest.raises(CannotStart, match="no 16 consecutive ports are free between 20000 and 20000") as error:
        take_ports()

    advice = "`ss -ltn` lists who holds them; end what is not needed, or run fewer workers here"
    assert error.value.next == advice
