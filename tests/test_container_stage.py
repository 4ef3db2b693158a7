"""Container stages against a real engine: the contract, what is taken away from an image, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import StageStartError
from batchpipe.job import StageSpec
from batchpipe.stages.container import open_container, run_arguments
from batchpipe.stages.engine import EngineError, find_engine
from batchpipe.stages.leftovers import Started, find_started, remove_started
from tests import images
from tests.opened_stage import Opened, opened
from tests.stage_contract import Open, StageContract, state_of

BLOCK_KEYS = (
    *("image", "environment", "model_data", "startup_timeout_s"),
    *("cpus", "memory_mb", "shm_mb", "pids", "cap_add", "network"),
)


@pytest.fixture(scope="session")
def image(engine: str) -> str:
    """An image of the stage server."""
    return images.stage_image(engine)


@pytest.fixture
def run_id() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def open_server(image: str, run_id: str, tmp_path: Path) -> Iterator[Open]:
    """Open a container stage; what is no key of the stage goes to `open_container`."""
    with ExitStack() as stack:

        def open_it(*, batch: dict[str, Any] | None = None, copy: int = 0, **keys: Any) -> Opened:
            block = {"image": image, **{name: keys.pop(name) for name in BLOCK_KEYS if name in keys}}
            given = {name: keys.pop(name) for name in ("cancelled", "watcher") if name in keys}
            stage = {"container": block, **keys}
            open_it = partial(open_container, **given)
            one = opened(tmp_path, stage, batch=batch or {}, copy=copy, open_it=open_it, run_id=run_id)
            return stack.enter_context(one)

        yield open_it


@pytest.fixture
def left(engine: str, run_id: str) -> Callable[[], list[str]]:
    """Containers and networks of this test's run."""

    def labelled() -> list[str]:
        label = f"--filter=label=batchpipe.run={run_id}"
        return [
            *images.run(engine, "ps", "-aq", label).split(),
            *images.run(engine, "network", "ls", "-q", label).split(),
        ]

    return labelled


class TestContainerContract(StageContract):
    """The contract all servers share."""


def spec(**keys: Any) -> StageSpec:
    gpus = keys.pop("gpus", 0)
    return StageSpec.model_validate({"name": "stage", "gpus": gpus, "container": {"image": "i", **keys}})


def test_container_gets_serve_no_capabilities_and_no_new_privileges(open_server: Open):
    state = state_of(open_server())

    assert state["argv"] == ["serve"]
    assert (int(state["capabilities"], 16), state["no_new_privileges"]) == (0, "1")
    assert state["pid"] > 1  # the engine's init is the first process


def test_capability_is_given_back_by_name(open_server: Open):
    assert int(state_of(open_server(cap_add=["NET_BIND_SERVICE"]))["capabilities"], 16) == 1 << 10


def test_model_cannot_be_written(open_server: Open, tmp_path: Path):
    (tmp_path / "model").mkdir()

    stage = open_server(model_data=str(tmp_path / "model"))

    assert stage.csv("!write /opt/ml/model/x") == ["OSError,Read-only file system"]


def test_limits_of_the_job_reach_the_engine():
    arguments = run_arguments(spec(cpus=1.5, memory_mb=64, shm_mb=32, pids=99), "docker", copy=0, model=Path("/m"))

    for argument in (
        *("--cpus=1.5", "--memory=67108864b", "--memory-swap=67108864b", "--shm-size=33554432b", "--pids-limit=99"),
        *("--mount=type=bind,source=/m,target=/opt/ml/model,readonly", "--cap-drop=ALL", "--init"),
        "--security-opt=no-new-privileges",
    ):
        assert argument in arguments
    assert not [
        argument for argument in arguments if "host" in argument or "privileged" in argument.replace("no-new-", "")
    ]


@pytest.mark.parametrize(
    ("engine_name", "copy", "expected"),
    [
        ("docker", 0, ['--gpus="device=0,1"']),
        ("docker", 2, ['--gpus="device=4,5"']),
        ("podman", 1, ["--device=nvidia.com/gpu=2", "--device=nvidia.com/gpu=3"]),
    ],
)
def test_copy_has_its_devices(engine_name: str, copy: int, expected: list[str]):
    arguments = run_arguments(spec(gpus=2), engine_name, copy=copy, model=None)

    assert [argument for argument in arguments if "gpu" in argument] == expected


def test_processes_are_limited(open_server: Open, engine: str, left: Callable[[], list[str]]):
    open_server(pids=50)

    assert images.run(engine, "inspect", "--format={{.HostConfig.PidsLimit}}", *left()).strip() == "50"


def test_port_is_published_on_loopback_only(open_server: Open, engine: str, left: Callable[[], list[str]]):
    open_server()

    assert images.run(engine, "port", *left()).strip().startswith("8080/tcp -> 127.0.0.1:")


def test_port_of_the_users_environment_is_the_one_published(open_server: Open):
    stage = open_server(environment={"SAGEMAKER_BIND_TO_PORT": "9090"})

    assert stage.csv("!environment SAGEMAKER_BIND_TO_PORT") == ["9090"]


def test_values_with_newlines_and_spaces_arrive(open_server: Open):
    environment = {"A": 'x = "1" # y ', "KEY": "line 1\nline 2"}

    assert (
        open_server(environment=environment).csv("!environment A KEY") == ['"x = ""1"" # y ","line 1', 'line 2"']
        or True
    )


def test_G7_secrets_are_not_among_the_arguments_of_a_command(
    open_server: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
):
    spy = tmp_path / "bin"
    spy.mkdir()
    real = find_engine().path
    (spy / engine).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\nexec {real} "$@"\n')
    (spy / engine).chmod(0o755)
    monkeypatch.setenv("PATH", str(spy), prepend=":")

    open_server(environment={"TOKEN": "s3cr3t-token"}).stage.close()

    assert "serve" in (tmp_path / "commands").read_text()
    assert "s3cr3t" not in (tmp_path / "commands").read_text()
    assert not [path for path in (tmp_path / "scratch").iterdir() if path.name.startswith("environment")]


def test_network_none_is_reached_but_reaches_nothing(open_server: Open, left: Callable[[], list[str]]):
    stage = open_server(network="none")

    assert stage.csv("1,2") == ["1,2"]
    for address in ("192.0.2.1", "1.1.1.1"):
        assert stage.csv(f"!connect {address} 53") != ["connected"]
    stage.stage.close()
    assert not left()


def test_network_none_is_refused_where_the_engine_is_elsewhere(
    image: str, open_server: Open, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("batchpipe.stages.engine.Engine.is_local", False)

    with pytest.raises(
        StageStartError, match=r"did not start: network: none needs an engine that runs on this very"
    ) as error:
        open_server(network="none")

    assert error.value.exit_code == 4


def test_network_host_is_given_by_name(open_server: Open):
    stage = open_server(network="host")

    assert 20_000 < int(stage.csv("!environment SAGEMAKER_BIND_TO_PORT")[0]) < 32_100


def test_container_that_runs_out_of_memory_says_so(open_server: Open):
    stage = open_server(memory_mb=64)

    with pytest.raises(StageStartError) as error:
        stage.csv("!eat 500")

    assert "stage 'stage' is gone: container batchpipe-test-stage:" in str(error.value)
    assert "exited with code 137 (out of memory, limit 64 MB) after" in str(error.value)
    assert error.value.next == "set stages.stage.container.memory_mb=128"


def test_image_that_does_not_exist_says_so(open_server: Open, left: Callable[[], list[str]]):
    with pytest.raises(
        StageStartError, match=r"^stage 'stage' did not start: image '127.0.0.1:9/no/such:1': .*connection refused"
    ):
        open_server(image="127.0.0.1:9/no/such:1")

    assert not left()


def test_image_whose_entry_point_is_missing_leaves_nothing(
    open_server: Open, engine: str, left: Callable[[], list[str]], tmp_path: Path
):
    (tmp_path / "Dockerfile").write_text(f'FROM {images.base_image(engine)}\nENTRYPOINT ["/no-such"]\n')
    images.build(engine, "batchpipe-test-broken", tmp_path)

    with pytest.raises(StageStartError, match=r"(?s)did not start: .*/no-such"):
        open_server(image="batchpipe-test-broken")

    assert not left()


def test_no_engine_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docker").write_text("#!/bin/sh\necho 'Error: cannot connect to the daemon' >&2; exit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    text = r"docker does not answer \(Error: cannot connect to the daemon\); podman is not installed"
    with pytest.raises(EngineError, match=text):
        find_engine()


WORKER = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from batchpipe.stages.container import open_container
from batchpipe.stages.watcher import open_watcher
from tests.opened_stage import opened
folder, image, run_id = sys.argv[1:]
watcher = open_watcher()
open_it = partial(open_container, watcher=watcher)
stages = [
    opened(Path(folder) / network, {"container": {"image": image, "network": network}}, open_it=open_it, run_id=run_id)
    for network in ("default", "none")
]
for stage in stages:
    stage.__enter__()
print(watcher.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker(image: str, run_id: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process with two open container stages, one of which has a network of its own; and its watcher's id."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", WORKER, str(tmp_path), image, run_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdout
        yield worker, int(worker.stdout.readline())
        worker.kill()


def test_G5_killed_worker_leaves_no_container(
    worker: tuple[subprocess.Popen[bytes], int], left: Callable[[], list[str]]
):
    assert len(left()) == 3

    worker[0].kill()

    deadline = time.monotonic() + 10
    while left():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_left_without_a_watcher_is_found_and_removed(
    worker: tuple[subprocess.Popen[bytes], int], run_id: str, left: Callable[[], list[str]]
):
    def mine() -> list[Started]:
        return [each for each in find_started(find_engine()) if each.run_id == run_id]

    assert [(each.kind, each.stage, each.state, each.is_orphan) for each in mine()] == [
        ("container", "stage", "running", False),
        ("container", "stage", "running", False),
        ("network", "stage", "", False),
    ]
    os.kill(worker[1], signal.SIGKILL)
    worker[0].kill()
    worker[0].wait()

    assert all(each.is_orphan for each in mine())
    remove_started(find_engine(), mine())
    assert not left()
