"""A stage that is a command: started by the watcher in a group of its own, it serves the contract on a free port."""

import os
import shlex
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from batchpipe.specs.stage import PORT
from batchpipe.stages import CannotStart, StageContext
from batchpipe.stages.contract import DEVICES, contract_environment, devices_of
from batchpipe.stages.http import Ending, HttpStage
from batchpipe.stages.logs import keep_log, log_name, read_log, tail
from batchpipe.stages.ports import PortBlock, take_ports
from batchpipe.stages.served import Running, open_served
from batchpipe.stages.watcher import WatchedProcess, Watcher

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


def open_process(
    stage: "StageSpec",
    job: "Job",
    context: StageContext,
    *,
    watcher: Watcher | None = None,
    cancelled: threading.Event | None = None,
) -> HttpStage:
    """Start the command, wait until it answers its ping, and ask what it advises: see `open_served`."""
    spec = stage.process
    assert spec

    def start(watcher: Watcher, model: Path | None, held: ExitStack) -> Running:
        ports = take_ports()
        held.callback(ports.close)
        environment = _environment(stage, job, context, ports)
        if model:
            environment["SM_MODEL_DIR"] = str(model)
        environment |= spec.environment
        log = context.scratch / log_name(stage.name, context.copy)
        try:
            child = watcher.start(spec.command, env=environment, cwd=job.path.parent, log=log)
        except OSError as exc:
            raise _cannot_run(spec.command[0], stage.name, job.path.parent, exc) from exc
        by_hand = f"cd {shlex.quote(str(job.path.parent))} && {PORT}=8080 {shlex.join(spec.command)}"
        return Running(_Process(child, log, context), ("127.0.0.1", int(environment[PORT])), by_hand)

    return open_served(stage, job, context, start, watcher, cancelled)


def _cannot_run(command: str, stage: str, folder: Path, error: OSError) -> CannotStart:
    if isinstance(error, FileNotFoundError):
        place = f"stages.{stage}.process.command: a name is looked for in PATH, a path from {folder}"
        msg = f"its command {command!r} was not found"
        return CannotStart(msg, next=f"install it where the workers run, or correct {place}")
    advice = f"make it a program that can be run (chmod +x), or correct stages.{stage}.process.command"
    return CannotStart(f"its command {command!r} cannot be run: {error.strerror}", next=advice)


def _environment(stage: "StageSpec", job: "Job", context: StageContext, ports: PortBlock) -> dict[str, str]:
    """What the worker has, with its interpreter and the job's folders first, and what the contract says."""
    inherited = dict(os.environ)
    folders = {
        "PATH": [str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)],
        "PYTHONPATH": [*job.import_folders, *filter(None, [inherited.get("PYTHONPATH")])],
    }
    environment = inherited | {name: os.pathsep.join(parts) for name, parts in folders.items()}
    environment |= contract_environment(stage, job, ports.port, ports.safe_range)
    if stage.gpus:
        environment[DEVICES] = ",".join(map(str, devices_of(stage, context.copy)))
    return environment


class _Process:
    """The running command and its log."""

    def __init__(self, child: WatchedProcess, log: Path, context: StageContext) -> None:
        self._child = child
        self._log = log
        self._context = context
        self._started = time.monotonic()

    def ending(self) -> Ending | None:
        code = self._child.poll()
        if code is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return Ending(f"its process {how} after {time.monotonic() - self._started:.1f} s")

    def log_tail(self) -> str:
        return tail(self._read_log(), self._context.secrets, self._context.kept_log(self._log.name))

    def close(self) -> None:
        self._child.stop()
        keep_log(self._read_log(), self._context.secrets, self._context.logs, self._log.name)

    def _read_log(self) -> str:
        return read_log([self._log.with_name(self._log.name + ".1"), self._log])
