"""A stage that is a URL which already answers the contract: nothing is started, and nothing stopped."""

from typing import TYPE_CHECKING

from batchpipe.stages import StageContext
from batchpipe.stages.connections import Connections
from batchpipe.stages.http import HttpStage

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


def open_endpoint(stage: "StageSpec", job: "Job", context: StageContext) -> HttpStage:
    """Return the stage; the first connection is made by the first invocation."""
    assert stage.endpoint
    return HttpStage(stage, job, context, Connections(stage.endpoint.url, stage.endpoint.headers))
