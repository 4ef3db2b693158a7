"""A stage that is a command: started by the watcher in a group of its own, it serves the contract on a free port."""

import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from batchpipe.stages import StageContext
from batchpipe.stages.contract import DEVICES, PORT, contract_environment, devices_of
from batchpipe.stages.http import Ending, HttpStage, Server
from batchpipe.stages.logs import keep_log, log_name, read_log, tail
from batchpipe.stages.ports import PortBlock, take_ports
from batchpipe.stages.served import Address, open_served
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

    def start(watcher: Watcher, model: Path | None, held: ExitStack) -> tuple[Server, Address]:
        ports = take_ports()
        held.callback(ports.close)
        environment = _environment(stage, job, context, ports)
        if model:
            environment["SM_MODEL_DIR"] = str(model)
        environment |= spec.environment
        log = context.scratch / log_name(stage.name, context.copy)
        child = watcher.start(spec.command, env=environment, cwd=job.path.parent, log=log)
        return _Process(child, log, context), ("127.0.0.1", int(environment[PORT]))

    return open_served(stage, job, context, start, watcher, cancelled)


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
