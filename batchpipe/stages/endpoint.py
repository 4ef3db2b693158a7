"""A stage that is a URL which already answers the contract: nothing is started, and nothing stopped."""

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from batchpipe.specs.stage import EndpointSpec
from batchpipe.stages import StageContext
from batchpipe.stages.connections import Connections, HttpAnswer
from batchpipe.stages.contract import ADVICE_S, Advice, advice_in
from batchpipe.stages.http import HttpStage

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

INVOCATIONS = "/invocations"


def open_endpoint(stage: "StageSpec", job: "Job", context: StageContext) -> HttpStage:
    """Return the stage, having asked what it advises; whether it answers at all the first invocation shows."""
    spec = stage.endpoint
    assert spec
    return HttpStage(stage, job, context, Connections(spec.url, spec.headers), advice=_ask_advice(spec))


def _ask_advice(spec: EndpointSpec) -> Advice:
    """Ask ``/execution-parameters`` beside ``/invocations``; a URL of another name has none, nor need this one."""
    parts = urlsplit(spec.url)
    if not parts.path.endswith(INVOCATIONS):
        return Advice()
    beside = parts._replace(path=f"{parts.path.removesuffix(INVOCATIONS)}/execution-parameters")
    try:
        answer = asyncio.run(_get(Connections(urlunsplit(beside), spec.headers, method="GET")))
    except (OSError, TimeoutError):
        return Advice()
    return advice_in(answer.body) if answer.status == 200 else Advice()


async def _get(connections: Connections) -> HttpAnswer:
    try:
        return await connections.post(b"", {}, ADVICE_S)
    finally:
        await connections.close_idle()
