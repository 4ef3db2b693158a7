"""Container stages against a real engine: the contract, what is taken away from an image, and what is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchpipe.errors import StageStartError
from batchpipe.job import StageSpec
from batchpipe.stages.container import open_container, run_arguments
from batchpipe.stages.engine import Engine, EngineError, find_engine
from batchpipe.stages.leftovers import Started, find_started, remove_started
from tests import images
from tests.jobs import running, until
from tests.opened_stage import Opened, opened
from tests.stage_contract import Open, StageContract, state_of

START_S = 60
"""Less than a test may take, so that one that cannot be reached says what its last ping got."""
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

        def open_it(*, batch: dict[str, Any] | None = None, **keys: Any) -> Opened:
            context = {name: keys.pop(name) for name in ("copy", "advice") if name in keys}
            block = {
                "image": image,
                "startup_timeout_s": START_S,
                **{name: keys.pop(name) for name in BLOCK_KEYS if name in keys},
            }
            given = {name: keys.pop(name) for name in ("cancelled", "watcher") if name in keys}
            stage = {"container": block, **keys}
            open_it = partial(open_container, **given)
            one = opened(tmp_path, stage, batch=batch or {}, open_it=open_it, run_id=run_id, **context)
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


@pytest.fixture
def log_on_disk(engine: str, left: Callable[[], list[str]]) -> Callable[[], int]:
    """Bytes of the files in which the engine keeps a log; where we may not look there, of what it tells of it."""

    def size() -> int:
        [container] = left()
        [found] = json.loads(images.run(engine, "container", "inspect", container))
        log = Path(found.get("LogPath") or found["HostConfig"]["LogConfig"]["Path"])
        if os.access(log.parent, os.R_OK):
            return sum(file.stat().st_size for file in log.parent.glob(f"{log.name}*"))
        return len(images.run(engine, "logs", container))

    return size


def engine_in_front(folder: Path, engine: str, script: str) -> Path:
    """A command of the engine's name that runs a script, and then the engine."""
    command = folder / "bin" / engine
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n{script}\nexec {find_engine().path} "$@"\n')
    command.chmod(0o755)
    return command


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


@pytest.mark.parametrize("name", ["model", 'of "may", june'])
def test_model_cannot_be_written(open_server: Open, tmp_path: Path, name: str):
    (tmp_path / name).mkdir()

    stage = open_server(model_data=str(tmp_path / name))

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


def test_each_restriction_is_loosened_by_its_name():
    loose = spec(new_privileges=True, init=False, cap_add=["NET_RAW"])
    arguments = run_arguments(loose, "docker", copy=0, model=None)

    assert "--cap-add=NET_RAW" in arguments
    assert not {"--init", "--security-opt=no-new-privileges"} & set(arguments)


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


def test_engine_holds_a_container_to_the_jobs_limits(open_server: Open, engine: str, left: Callable[[], list[str]]):
    open_server(pids=50, cpus=0.5, memory_mb=64, shm_mb=32)

    limits = "{{.PidsLimit}} {{.NanoCpus}} {{.Memory}} {{.MemorySwap}} {{.ShmSize}} {{.Privileged}}"
    format_ = "--format={{with .HostConfig}}" + limits + "{{end}}"
    held = [50, 500_000_000, 64 << 20, 64 << 20, 32 << 20]
    assert images.run(engine, "inspect", format_, *left()).split() == [*map(str, held), "false"]


def test_port_is_published_on_loopback_only(open_server: Open, engine: str, left: Callable[[], list[str]]):
    open_server()

    assert images.run(engine, "port", *left()).strip().startswith("8080/tcp -> 127.0.0.1:")


def test_port_of_the_users_environment_is_the_one_published(open_server: Open):
    stage = open_server(environment={"SAGEMAKER_BIND_TO_PORT": "9090"})

    assert stage.csv("!environment SAGEMAKER_BIND_TO_PORT") == ["9090"]


def test_values_with_newlines_and_spaces_arrive(open_server: Open):
    environment = {"A": 'x = "1" # y ', "KEY": "line 1\nline 2", "END": "x\r", "LONG": "x" * 70_000}
    stage = open_server(environment=environment, batch={"max_records": 1})

    assert stage.csv("!environment A KEY") == ['"x = ""1"" # y ","line 1\nline 2"']
    assert stage.csv("!environment END LONG") == [f'"x\r",{"x" * 70_000}']


def test_G7_secrets_are_not_among_the_arguments_of_a_command(
    open_server: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
):
    spy = engine_in_front(tmp_path, engine, f'echo "$@" >> {tmp_path}/commands')
    monkeypatch.setenv("PATH", str(spy.parent), prepend=":")

    open_server(environment={"TOKEN": "s3cr3t-token"}).stage.close()

    assert "serve" in (tmp_path / "commands").read_text()
    assert "s3cr3t" not in (tmp_path / "commands").read_text()
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.name.startswith("environment")]


def test_network_none_is_reached_but_reaches_nothing(open_server: Open, engine: str, left: Callable[[], list[str]]):
    other = open_server()
    address = images.run(engine, "inspect", "--format={{.NetworkSettings.IPAddress}}", *left()).strip()
    plain, stage = open_server(), open_server(network="none")

    assert plain.csv(f"!connect {address} 8080") == ["connected"]
    assert stage.csv(f"!connect {address} 8080") in (["TimeoutError"], ["OSError"])  # dropped, or no way there at all
    assert stage.csv("!connect 192.0.2.1 53") != ["connected"]
    assert stage.csv("1,2") == ["1,2"]
    for one in (other, plain, stage):
        one.stage.close()
    assert not left()


def test_network_is_chosen_by_name(open_server: Open, engine: str, left: Callable[[], list[str]], run_id: str):
    images.run(engine, "network", "create", f"batchpipe-{run_id}")
    try:
        stage = open_server(network=f"batchpipe-{run_id}")

        assert stage.csv("1,2") == ["1,2"]
        networks = "--format={{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}"
        assert images.run(engine, "inspect", networks, *left()).split() == [f"batchpipe-{run_id}"]
        assert images.run(engine, "port", *left()).strip().startswith("8080/tcp -> 127.0.0.1:")
        stage.stage.close()
    finally:
        images.run(engine, "network", "rm", f"batchpipe-{run_id}")


@pytest.mark.parametrize(
    ("missing", "needed", "advice"),
    [
        ("is_local", "an engine that runs on this very Linux", "leave network out, or run the stage where the engine"),
        ("has_reachable_networks", "podman's netavark: ", "install netavark and state network_backend"),
    ],
)
def test_network_none_is_refused_where_the_container_could_not_be_reached(
    image: str, open_server: Open, monkeypatch: pytest.MonkeyPatch, missing: str, needed: str, advice: str
):
    monkeypatch.setattr(f"batchpipe.stages.engine.Engine.{missing}", False)

    with pytest.raises(StageStartError, match=f"did not start: network: none needs {needed}") as error:
        open_server(network="none")

    assert error.value.exit_code == 4
    assert error.value.next.startswith(advice)


def test_network_that_does_not_exist_says_so(open_server: Open, left: Callable[[], list[str]]):
    with pytest.raises(StageStartError, match=r"image '.*': .*no-such-network.* not found") as error:
        open_server(network="no-such-network")

    advice = "correct the stage's container block, or try the image by hand: "
    assert error.value.next.startswith(advice)
    assert not left()


def test_network_host_is_given_by_name(open_server: Open):
    stage = open_server(network="host")

    assert 20_000 < int(stage.csv("!environment SAGEMAKER_BIND_TO_PORT")[0]) < 32_100


def test_container_that_runs_out_of_memory_before_its_ping_says_so(open_server: Open, left: Callable[[], list[str]]):
    how = r"did not start: container .* exited with code 137 \(out of memory, limit 64 MB\) after"

    with pytest.raises(StageStartError, match=how) as error:
        open_server(memory_mb=64, environment={"STAGE_EAT": "200"})

    assert error.value.next == "set stages.stage.container.memory_mb=128"
    assert not left()


def test_container_that_runs_out_of_memory_says_so(open_server: Open):
    stage = open_server(memory_mb=64)

    message = stage.failure("!eat 500").message

    assert message.startswith("container batchpipe-test-stage:")
    assert "exited with code 137 (out of memory, limit 64 MB) after" in message
    assert message.endswith("; set stages.stage.container.memory_mb=128")


def test_image_that_does_not_exist_says_so(open_server: Open, engine: str, left: Callable[[], list[str]]):
    name = "127.0.0.1:9/no/such:1"
    text = f"^stage 'stage' did not start: image '{name}' is not on this machine and cannot be pulled: .*refused"

    with pytest.raises(StageStartError, match=text) as error:
        open_server(image=name)

    advice = f"make it here: {engine} build -t {name} FOLDER; or see why it cannot be had: {engine} pull {name}"
    assert error.value.next == advice
    assert not left()


def test_container_that_does_not_start_is_told_with_its_command_by_hand(open_server: Open, engine: str, image: str):
    with pytest.raises(StageStartError) as error:
        open_server(environment={"STAGE_EXIT": "3"})

    by_hand = f"{engine} run --rm -it -p 127.0.0.1:8080:8080 {image} serve"
    assert error.value.next == f"see its log, or start it by hand: {by_hand}"


def test_fetching_an_image_ends_when_another_stage_did_not_start(
    open_server: Open, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun = tmp_path / "begun"
    slow = engine_in_front(tmp_path, engine, f'[ "$1" = pull ] && touch {begun} && exec sleep 60')
    monkeypatch.setenv("PATH", str(slow.parent), prepend=":")
    cancelled = threading.Event()

    def cancel() -> None:
        until(begun.exists, 30)
        cancelled.set()

    threading.Thread(target=cancel).start()

    with pytest.raises(StageStartError, match=r"cannot be pulled: was not waited for: another stage did not start"):
        open_server(image="no-such", cancelled=cancelled)


def test_image_whose_entry_point_is_missing_leaves_nothing(
    open_server: Open, engine: str, left: Callable[[], list[str]], tmp_path: Path
):
    (tmp_path / "Dockerfile").write_text(f'FROM {images.base_image(engine)}\nENTRYPOINT ["/no-such"]\n')
    images.build(engine, "batchpipe-test-broken", tmp_path)

    with pytest.raises(StageStartError, match=r"(?si)did not start: .*no such file or directory"):
        open_server(image="batchpipe-test-broken")

    assert not left()


def test_no_engine_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docker").write_text("#!/bin/sh\necho 'Error: cannot connect to the daemon' >&2; exit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    text = (
        r"no container engine answers: docker does not answer \(Error: cannot connect to the daemon\); podman is not "
    )
    with pytest.raises(EngineError, match=text) as error:
        find_engine()
    assert error.value.next.startswith("start one, `docker info` or `podman info` must answer; DOCKER_HOST says where ")


def test_networks_are_listed_as_podman_describes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = '[{"name": "batchpipe-1", "driver": "bridge", "labels": {"batchpipe.run": "r1", "batchpipe.stage": "s"}}]'
    answers = f"case $1$2 in networkls) echo n1;; networkinspect) echo '{network}';; esac"
    (tmp_path / "podman").write_text(f"#!/bin/sh\n{answers}\n")
    (tmp_path / "podman").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    (found,) = find_started(find_engine())

    assert (found.kind, found.name, found.run_id, found.stage) == ("network", "batchpipe-1", "r1", "s")


def test_podman_that_is_installed_as_docker_is_podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "docker").write_text('#!/bin/sh\necho \'{"Client": {"Version": "5.4.2", "OsArch": "linux/amd64"}}\'\n')
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert find_engine() == Engine("podman", str(tmp_path / "docker"))


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
    with running(command, stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdout
        yield worker, int(worker.stdout.readline())


def test_G5_killed_worker_leaves_no_container(
    worker: tuple[subprocess.Popen[bytes], int], left: Callable[[], list[str]]
):
    assert len(left()) == 3

    worker[0].kill()

    deadline = time.monotonic() + 10
    while left():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_G5_watcher_of_a_killed_worker_waits_for_the_container_that_the_engine_is_asked_for(
    image: str, engine: str, run_id: str, tmp_path: Path, left: Callable[[], list[str]]
):
    asked, done = tmp_path / "asked", tmp_path / "done"
    # An engine that takes its time, and finishes also for a caller that was killed: the test does it.
    slow = engine_in_front(
        tmp_path,
        engine,
        f'if [ "$1" = run ]; then for each in "$@"; do echo "$each"; done >{asked}.new; mv {asked}.new {asked};'
        f" until [ -e {done} ]; do sleep 0.05; done; exit; fi",
    )
    environment = {**os.environ, "PATH": f"{slow.parent}:{os.environ['PATH']}", "PYTHONPATH": str(images.ROOT)}
    with running([sys.executable, "-c", WORKER, str(tmp_path), image, run_id], env=environment) as worker:
        until(asked.exists, 30)
        [watcher] = psutil.Process(worker.pid).children()

    with pytest.raises(psutil.TimeoutExpired):
        watcher.wait(3)
    # Of `run` the half that makes it: the other may find that the watcher was faster.
    assert asked.read_text().splitlines()[:2] == ["run", "--detach"]
    images.run(engine, "create", *asked.read_text().splitlines()[2:])
    done.touch()
    watcher.wait(10)

    assert not left()


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
