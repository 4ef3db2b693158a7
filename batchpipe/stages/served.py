"""A stage whose server was started for it, a process or a container: waited for, asked, and called over HTTP."""

import threading
from typing import TYPE_CHECKING

from batchpipe.errors import StageStartError
from batchpipe.stages import StageContext
from batchpipe.stages.connections import Connections
from batchpipe.stages.contract import Advice, ask_advice, wait_until_ready
from batchpipe.stages.http import HttpStage, Server

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


def open_served(
    stage: "StageSpec",
    job: "Job",
    context: StageContext,
    server: Server,
    address: tuple[str, int],
    cancelled: threading.Event | None = None,
) -> HttpStage:
    """Wait until the server at ``address`` is ready and return the stage that owns it.

    Raises StageStartError, with the server closed, at once when the server ends or ``cancelled`` is set.
    """
    spec = stage.container or stage.process
    assert spec

    def check() -> None:
        if ending := server.ending():
            msg = f"stage {stage.name!r} did not start: {ending.how}"
            raise StageStartError(msg, log=server.log_tail(), next=ending.next)
        if cancelled and cancelled.is_set():
            raise StageStartError(f"stage {stage.name!r} was not waited for: another stage did not start")

    try:
        try:
            wait_until_ready(*address, spec.startup_timeout_s, check)
        except TimeoutError as exc:
            raise StageStartError(f"stage {stage.name!r} did not start: {exc}", log=server.log_tail()) from exc
        known = context.advice.get(stage.name)
        advice = ask_advice(*address) if known is None else Advice.of(known)
        connections = Connections(f"http://{address[0]}:{address[1]}/invocations", {})
        return HttpStage(stage, job, context, connections, advice=advice, server=server)
    except BaseException:
        server.close()
        raise
