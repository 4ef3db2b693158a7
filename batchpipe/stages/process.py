"""A stage that is a command: started by the watcher in a group of its own, it serves the contract on a free port."""

import os
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from batchpipe.errors import StageStartError
from batchpipe.redact import mask
from batchpipe.stages import StageContext
from batchpipe.stages.contract import PORT, contract_environment, devices_of
from batchpipe.stages.http import Ending, HttpStage
from batchpipe.stages.logs import keep_log, log_name, read_log, tail
from batchpipe.stages.model_data import open_model_data
from batchpipe.stages.ports import PortBlock, take_ports
from batchpipe.stages.served import open_served
from batchpipe.stages.watcher import WatchedProcess, Watcher, WatcherLostError, open_watcher

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
    """Start the command, wait until it answers its ping, and ask what it advises.

    Without the worker's ``watcher`` it has one of its own. Setting ``cancelled`` ends the waiting.
    Raises StageStartError, with everything that was started released.
    """
    spec = stage.process
    assert spec
    with ExitStack() as held:
        try:
            watcher = watcher or held.enter_context(open_watcher())
            ports = take_ports()
            held.callback(ports.close)
            environment = _environment(stage, job, context, ports)
            if spec.model_data:
                model = held.enter_context(open_model_data(stage, spec.model_data, context, cancelled))
                environment["SM_MODEL_DIR"] = str(model)
            environment |= spec.environment
            log = context.scratch / log_name(stage.name, context.copy)
            child = watcher.start(spec.command, env=environment, cwd=job.path.parent, log=log)
        except OSError as exc:
            why = mask(str(exc), context.secrets)
            raise StageStartError(f"stage {stage.name!r} did not start: {why}") from exc
        server = _Process(child, log, context, held.pop_all())
    return open_served(stage, job, context, server, ("127.0.0.1", int(environment[PORT])), cancelled)


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
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices_of(stage, context.copy)))
    return environment


class _Process:
    """The running command and its log."""

    def __init__(self, child: WatchedProcess, log: Path, context: StageContext, held: ExitStack) -> None:
        self._child = child
        self._log = log
        self._context = context
        self._held = held
        self._started = time.monotonic()
        self._is_open = True

    def ending(self) -> Ending | None:
        try:
            code = self._child.poll()
        except WatcherLostError as exc:
            return Ending(str(exc))
        if code is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return Ending(f"its process {how} after {time.monotonic() - self._started:.1f} s")

    def log_tail(self) -> str:
        return tail(self._read_log(), self._context.secrets, self._log.name)

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        with self._held:
            with suppress(WatcherLostError):
                self._child.stop()
            keep_log(self._read_log(), self._context.secrets, self._context.logs, self._log.name)

    def _read_log(self) -> str:
        return read_log([self._log.with_name(self._log.name + ".1"), self._log])
