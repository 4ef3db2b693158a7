"""Stages of all HTTP kinds, opened as a worker opens them and invoked from a test."""

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from batchpipe.batch import ByteRecords, Records
from batchpipe.invoke import Invoker
from batchpipe.job import Job, StageSpec
from batchpipe.jobfile import load_job
from batchpipe.outcome import FailureLimit, Outcome, new_stats
from batchpipe.redact import secrets_of
from batchpipe.stages import Answer, InvocationFailed, OpenStage, StageContext, open_stage
from batchpipe.stages.http import HttpStage

ANSWER_S = 100.0
"""Below what a test may take."""
SERVER = [sys.executable, str(Path(__file__).with_name("stage_server.py"))]


def make_job(folder: Path, *stages: dict[str, Any], **blocks: Any) -> Job:
    """A job of these stages; a stage without a name is called ``stage``."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [{"name": f"stage{number or ''}", **stage} for number, stage in enumerate(stages)]
    document = {"input": {"uri": "in.csv"}, "stages": named, "output": {"uri": "out"}, **blocks}
    (folder / "job.yaml").write_text(json.dumps(document))
    return load_job(folder / "job.yaml")


def make_context(folder: Path, job: Job, *, copy: int = 0, run_id: str = "run1") -> StageContext:
    """What a worker would hand to the stages of this job."""
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    folders = (folder / "scratch", folder / "logs")
    return StageContext(run_id, copy, *folders, secrets_of(job), kept_logs="out/logs")


class Opened:
    """An open stage and the loop it lives on."""

    def __init__(self, stage: HttpStage) -> None:
        self.stage = stage
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def invoke(self, records: Records) -> Answer:
        return asyncio.run_coroutine_threadsafe(self.stage.invoke(records), self.loop).result(ANSWER_S)

    def outcome(self, records: Records) -> Outcome:
        """Invoke as a chain does, without retries: what became of each record."""
        invocation = Invoker(self.stage, 0).invoke(records, FailureLimit(None), new_stats())
        return asyncio.run_coroutine_threadsafe(invocation, self.loop).result(ANSWER_S)

    def csv(self, *lines: str) -> list[str]:
        """Send lines as CSV records; return the answer's."""
        records = self.invoke(csv_records(*lines)).records
        assert isinstance(records, ByteRecords)
        return [record.decode().rstrip("\r\n") for record in records.to_list()]

    def all_at_once(self, *batches: Records) -> list[Answer | BaseException]:
        """Invoke with every batch at the same time."""

        async def gather() -> list[Answer | BaseException]:
            return await asyncio.gather(*(self.stage.invoke(batch) for batch in batches), return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(gather(), self.loop).result(ANSWER_S)

    def failure(self, *lines: str) -> InvocationFailed:
        """The failure of sending these lines."""
        try:
            answer = self.csv(*lines)
        except InvocationFailed as failure:
            return failure
        raise AssertionError(f"answered {answer}")

    def close(self) -> None:
        self.stage.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


def csv_records(*lines: str) -> ByteRecords:
    return ByteRecords.of([line.encode() + b"\n" for line in lines], "text/csv")


@contextmanager
def opened(
    folder: Path,
    *stages: dict[str, Any],
    copy: int = 0,
    run_id: str = "run1",
    open_it: Callable[[StageSpec, Job, StageContext], OpenStage] | None = None,
    **blocks: Any,
) -> Iterator[Opened]:
    """Open the first of these stages."""
    job = make_job(folder, *stages, **blocks)
    open_it = open_it or partial(open_stage, watcher=None, cancelled=threading.Event())
    stage = open_it(job.stages[0], job, make_context(folder, job, copy=copy, run_id=run_id))
    assert isinstance(stage, HttpStage)
    with contextlib.closing(Opened(stage)) as opened:
        yield opened
