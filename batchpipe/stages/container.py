"""A stage that is an image: started by the engine, safe by default, reached on a port of 127.0.0.1 only.

Labels say whose it is: the watcher removes by them what a killed worker leaves.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchpipe.specs.spec import MB
from batchpipe.specs.stage import PORT
from batchpipe.stages import StageContext
from batchpipe.stages.contract import contract_environment, devices_of
from batchpipe.stages.engine import OWNER_LABEL, RUN_LABEL, STAGE_LABEL, Engine, EngineError, find_engine
from batchpipe.stages.http import Ending, HttpStage
from batchpipe.stages.logs import keep_log, log_name, tail
from batchpipe.stages.ports import take_ports
from batchpipe.stages.served import Running, open_served
from batchpipe.stages.watcher import Watcher
from batchpipe.storage.owner import this_process

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

STOP_S = 3
OOM_FILE = "oom"
"""Podman's monitor makes it in the folder of `podman run` when memory runs out; podman 4 tells it in no other way."""
SERVE_PORT = 8080
SAFE_RANGE = "8081-8999"
MAX_LOG_MB = 8
LONGEST_LINE = 10_000
"""Of a file of variables; docker's reader ends at 64 KiB, the variable's name among them."""
INSPECT_EVERY_S = 0.2


def open_container(
    stage: "StageSpec",
    job: "Job",
    context: StageContext,
    *,
    watcher: Watcher | None = None,
    cancelled: threading.Event | None = None,
) -> HttpStage:
    """Start the image, wait until it answers its ping, and ask what it advises: see `open_served`."""
    spec = stage.container
    assert spec

    def start(watcher: Watcher, model: Path | None, held: ExitStack) -> Running:
        engine = find_engine()
        watcher.containers(watcher.label, engine.path)
        labels = _labels(stage, context, watcher)
        port, safe_range = SERVE_PORT, SAFE_RANGE
        if spec.network == "host":
            ports = take_ports()
            held.callback(ports.close)
            port, safe_range = ports.port, ports.safe_range
        environment = contract_environment(stage, job, port, safe_range) | spec.environment
        network = _network(engine, stage, labels, watcher, context.scratch, held)
        arguments = run_arguments(stage, engine.name, copy=context.copy, model=model)
        container = Container(engine, stage, context)
        held.callback(container.remove)  # what cannot be started may have been created
        try:
            engine.pull(spec.image, watcher, context.scratch, cancelled)
        except EngineError as exc:
            raise _no_image(engine.name, spec.image, exc) from exc
        by_hand = f"{engine.name} run --rm -it -p 127.0.0.1:{SERVE_PORT}:{SERVE_PORT} {spec.image} serve"
        options = [f"--name={container.name}", *labels, *network, *arguments]
        try:
            _start(engine, [*options, spec.image], environment, watcher, container.folder)
        except EngineError as exc:
            msg = f"image {spec.image!r}: {exc}"
            raise EngineError(
                msg, next=f"correct the stage's container block, or try the image by hand: {by_hand}"
            ) from exc
        return Running(container, container.address(int(environment[PORT])), by_hand)

    return open_served(stage, job, context, start, watcher, cancelled)


def _no_image(engine: str, image: str, error: EngineError) -> EngineError:
    advice = f"make it here: {engine} build -t {image} FOLDER; or see why it cannot be had: {engine} pull {image}"
    return EngineError(f"image {image!r} is not on this machine and cannot be pulled: {error}", next=advice)


def _labels(stage: "StageSpec", context: StageContext, watcher: Watcher) -> list[str]:
    """Whose the container and its network are: for the watcher's sweep, for `ps` and for `clean`."""
    owner = json.dumps(this_process({}))
    labels = {RUN_LABEL: context.run_id, STAGE_LABEL: stage.name, OWNER_LABEL: owner}
    return [*(f"--label={name}={value}" for name, value in labels.items()), f"--label={watcher.label}"]


def run_arguments(stage: "StageSpec", engine: str, *, copy: int, model: Path | None) -> list[str]:
    """The options of ``run`` that the job decides: limits, what is taken away, what the job gives back."""
    spec = stage.container
    assert spec
    arguments = ["--cap-drop=ALL", f"--pids-limit={spec.pids}"]
    arguments += [] if spec.new_privileges else ["--security-opt=no-new-privileges"]
    arguments += ["--init"] if spec.init else []
    arguments += [f"--cap-add={capability}" for capability in spec.cap_add]
    if spec.cpus:
        arguments.append(f"--cpus={spec.cpus:g}")
    if spec.memory_mb:
        limit = f"{int(spec.memory_mb * MB)}b"
        arguments += [f"--memory={limit}", f"--memory-swap={limit}"]
    if spec.shm_mb:
        arguments.append(f"--shm-size={int(spec.shm_mb * MB)}b")
    if model:
        source = f"source={model}"
        if set(source) & set(',"'):  # the engine reads a row of CSV
            source = '"' + source.replace('"', '""') + '"'
        arguments.append(f"--mount=type=bind,{source},target=/opt/ml/model,readonly")
    devices = devices_of(stage, copy)
    if devices and engine == "podman":
        arguments += [f"--device=nvidia.com/gpu={device}" for device in devices]
    elif devices:
        # The engine takes the value apart at commas, unless it is quoted.
        arguments.append(f'--gpus="device={",".join(map(str, devices))}"')
    if engine == "podman":
        arguments += ["--log-driver=k8s-file", f"--log-opt=max-size={MAX_LOG_MB}mb"]
    else:
        arguments += ["--log-driver=json-file", f"--log-opt=max-size={MAX_LOG_MB}m", "--log-opt=max-file=2"]
    return arguments


def _network(
    engine: Engine, stage: "StageSpec", labels: list[str], watcher: Watcher, scratch: Path, held: ExitStack
) -> list[str]:
    """How the container is reached: on a port of 127.0.0.1, or by its address in a network without a way out."""
    spec = stage.container
    assert spec
    if spec.network == "none":
        if not engine.is_local:
            raise EngineError(
                "network: none needs an engine that runs on this very Linux machine, as root: elsewhere a container"
                " without a network cannot be reached",
                next="leave network out, or run the stage where the engine is",
            )
        if not engine.has_reachable_networks:
            raise EngineError(
                "network: none needs podman's netavark: this podman makes its networks with CNI, and one without a way"
                " out cannot be reached from here either",
                next="install netavark and state network_backend in containers.conf",
            )
        name = f"batchpipe-{uuid.uuid4().hex[:12]}"
        held.callback(_try, engine, "network", "rm", name)
        engine.create(["network", "create", "--internal", *labels, name], {}, watcher, scratch)
        return [f"--network={name}"]
    if spec.network == "host":
        return ["--network=host"]
    chosen = [] if spec.network == "default" else [f"--network={spec.network}"]
    port = spec.environment.get(PORT, str(SERVE_PORT))
    return [*chosen, f"--publish=127.0.0.1::{port}"]


def _start(
    engine: Engine, arguments: list[str], environment: Mapping[str, str], watcher: Watcher, folder: Path
) -> None:
    """Run the image with these arguments and ``serve``.

    Values go by a file of ours, or by the environment of the command, never by its arguments, which all may read.
    """
    lines = {name: value for name, value in environment.items() if _is_line(value)}
    others = {name: value for name, value in environment.items() if not _is_line(value)}
    file = folder / "environment"
    file.touch(mode=0o600)
    file.write_text("".join(f"{name}={value}\n" for name, value in lines.items()), encoding="utf-8")
    variables = [f"--env-file={file}", *(f"--env={other}" for other in others)]
    try:
        engine.create(["run", "--detach", *variables, *arguments, "serve"], others, watcher, folder)
    finally:
        file.unlink()


def _is_line(value: str) -> bool:
    """Whether the engine reads this from a file as it was written: a line, without a return, of some length."""
    return not re.search(r"[\r\n]", value) and len(value) < LONGEST_LINE


def _try(engine: Engine, *arguments: str) -> None:
    with suppress(EngineError):
        engine.run(*arguments)


class Container:
    """A container, from before its start to its removal; what `http.Server` asks for."""

    def __init__(self, engine: Engine, stage: "StageSpec", context: StageContext) -> None:
        assert stage.container
        self.name = f"batchpipe-{uuid.uuid4().hex[:12]}"
        self.folder = context.scratch / self.name
        self.folder.mkdir()
        self._engine = engine
        self._spec = stage.container
        self._stage = stage.name
        self._context = context
        self._log_name = log_name(stage.name, context.copy)
        self._started = time.monotonic()
        self._inspected = 0.0

    def address(self, port: int) -> tuple[str, int]:
        """Where it listens; meaningless once it has ended."""
        settings = self._inspect().get("NetworkSettings", {})
        if self._spec.network == "host":
            return "127.0.0.1", port
        if self._spec.network == "none":
            [network] = settings["Networks"].values()
            return network["IPAddress"] or "127.0.0.1", port
        published = (settings.get("Ports") or {}).get(f"{port}/tcp") or [{"HostPort": "0"}]
        return "127.0.0.1", int(published[0]["HostPort"])

    def ending(self) -> Ending | None:
        # Asked several times a second while the stage starts; each time costs a process.
        if time.monotonic() - self._inspected < INSPECT_EVERY_S:
            return None
        state = self._inspect().get("State", {"Status": "removed", "ExitCode": "unknown"})
        self._inspected = time.monotonic()
        if state["Status"] not in ("exited", "dead", "removed", "stopped"):
            return None
        after = f"after {time.monotonic() - self._started:.1f} s"
        if not state.get("OOMKilled") and not (self.folder / OOM_FILE).exists():
            return Ending(f"container {self._spec.image} exited with code {state['ExitCode']} {after}")
        limit = f"limit {self._spec.memory_mb:g} MB" if self._spec.memory_mb else "the machine's limit"
        how = f"container {self._spec.image} exited with code {state['ExitCode']} (out of memory, {limit}) {after}"
        more = int(2 * (self._spec.memory_mb or 1024))
        return Ending(how, next=f"set stages.{self._stage}.container.memory_mb={more}")

    def log_tail(self) -> str:
        return tail(self._read_log(), self._context.secrets, self._context.kept_log(self._log_name))

    def close(self) -> None:
        _try(self._engine, "stop", f"-t={STOP_S}", self.name)
        keep_log(self._read_log(), self._context.secrets, self._context.logs, self._log_name)

    def remove(self) -> None:
        """Remove it, also where it still runs, with what it wrote. Never raises."""
        _try(self._engine, "rm", "--force", "--volumes", self.name)

    def _inspect(self) -> dict[str, Any]:
        try:
            return self._engine.inspect(self.name)
        except EngineError:
            return {}

    def _read_log(self) -> str:
        try:
            return self._engine.logs(self.name)
        except EngineError:
            return ""
