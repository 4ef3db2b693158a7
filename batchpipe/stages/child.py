"""Callables in processes of their own, for splits that lost their worker: a record that kills then costs no other one.

The very same stages run over there, so that they answer alike: see `child_process`. A death, or a call that takes too
long, is an invocation that failed like any other, and `invoke` finds the record. Callables that hand each other
DataFrames share a process, and the frames stay there: see `kept`.
"""

import asyncio
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, cast
from uuid import uuid4
from weakref import WeakSet

import numpy as np

from batchpipe.batch import Records
from batchpipe.errors import StageStartError
from batchpipe.redact import secrets_at_work
from batchpipe.stages import Answer, InvocationFailed, Remedy, in_flight, stacks
from batchpipe.stages.callable import CallableStage
from batchpipe.stages.child_process import Birth, Call, socket_path
from batchpipe.stages.kept import KeptRecords, Made, Rows
from batchpipe.stages.logs import crash_in, tail
from batchpipe.stages.watcher import Watcher, WatcherLostError

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

START_TIMEOUT_S = 600.0
LAST_WORDS_S = 2.0
"""What a process has to write down where it is, once it is told to abort."""


def memory_available() -> int | None:
    """Bytes that processes may still take without swapping, as Linux estimates them; None elsewhere."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return None


class ChildStage:
    """An open callable in a process that it may share."""

    concurrency = 1
    is_exclusive = True

    def __init__(self, stage: "StageSpec", like: CallableStage, process: "SharedProcess") -> None:
        self.name = stage.name
        self.takes_table = like.takes_table
        self._process = process
        self._place = process.add(stage)

    def takes_one(self, records: Records) -> bool:  # noqa: ARG002 - as HTTP stages have it
        """No: a callable is called with a mini-batch as it comes."""
        return False

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:  # noqa: ARG002 - it always is
        """Have the callable called over there."""
        process = self._process
        return await asyncio.get_running_loop().run_in_executor(process.thread, process.call, self._place, records)

    def close(self) -> None:
        """Kill the process, in whatever call it is."""
        self._process.close()


class SharedProcess:
    """The process of some callables, each but the last of which hands the next one DataFrames.

    It starts with the first call, and again after each death.
    """

    def __init__(self, job: "Job", watcher: Watcher, scratch: Path) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="child")
        """Who calls, calls on it: one at a time, so that who dies dies of the call."""
        self._birth = Birth((), job, memory_available())
        self._watcher = watcher
        self._scratch = scratch
        self._child: Child | None = None
        self._closed = threading.Event()

    def add(self, stage: "StageSpec") -> int:
        """Have one more stage in the processes that are started from now on; its place there."""
        self._birth = replace(self._birth, stages=(*self._birth.stages, stage))
        return len(self._birth.stages) - 1

    def close(self) -> None:
        """Kill the process, in whatever call it is. May be called twice."""
        self._closed.set()
        if self._child:
            self._child.kill()
        self.thread.shutdown(wait=False, cancel_futures=True)

    def call(self, stage: int, records: Records) -> Answer:
        """Have the stage at this place called with records. A DataFrame that it hands on stays over there."""
        made = Made(stage, records)
        child, answer = self._answer(made)
        if not isinstance(answer.records, Rows):
            return answer
        made = replace(made, kept=answer.kept)
        child.keeps.add(made)
        return replace(answer, records=cast("Records", KeptRecords.of(made, len(answer.records.places))))

    def _answer(self, wanted: Made) -> "tuple[Child, Answer]":
        """The answer, and the child that has it if only rows are told. What it is made of is made first if need be."""
        child = self._child = self._child or Child(self._birth, self._watcher, self._scratch, self._closed)
        sent = wanted.sent
        if isinstance(sent, KeptRecords):
            for made in dict.fromkeys(sent.made):
                if made not in child.keeps:
                    self._make(made)
        rows = sent.rows() if isinstance(sent, KeptRecords) else sent
        stage = self._birth.stages[wanted.stage]  # the last one for what is only joined
        timeout_s = stage.invocations_timeout_s
        try:
            with in_flight.Invocation(stage.name, "in a process of its own", child.calls):
                return child, child.call(wanted.stage, rows, wanted.number, timeout_s)
        except TimeoutError:
            self._child = None
            raise child.abort("Timeout", f"no answer within {timeout_s:g} s (invocations_timeout_s)") from None
        except (EOFError, OSError):
            self._child = None
            raise child.died() from None

    def _make(self, made: Made) -> None:
        """Join a frame of others, or make one again that died with its process: the stage answered that before."""
        who = f"stage {self._birth.stages[made.stage].name!r}, asked again for what was lost with its process,"
        try:
            child, answer = self._answer(made)
        except InvocationFailed as why:
            # No record that was answered before is at fault, so that another time may help.
            remedy = Remedy.RETRY if why.remedy is Remedy.ISOLATE else why.remedy
            message, where = f"{who} failed: {why.message}", why.location
            raise InvocationFailed(why.reason, message, remedy, location=where, traceback=why.traceback) from why
        if not isinstance(answer.records, Rows) or not np.array_equal(np.asarray(answer.kept), np.asarray(made.kept)):
            raise InvocationFailed("WrongAnswer", f"{who} answers other records than before", Remedy.NONE)
        child.keeps.add(made)


class Child:
    """One process, from its start to its death. Raises StageStartError (4) where it does not start."""

    def __init__(self, birth: Birth, watcher: Watcher, scratch: Path, closed: threading.Event) -> None:
        self._folder = scratch / f"child-{uuid4().hex[:8]}"
        self._folder.mkdir(mode=0o700)
        self._log = self._folder / "log"
        (self._folder / "birth.pickle").write_bytes(pickle.dumps(birth))
        command = [sys.executable, "-P", "-m", "batchpipe.stages.child_process", str(self._folder)]
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        self._process = watcher.start(command, env=environment, cwd=Path.cwd(), log=self._log)
        self._connection = self._connect(birth, closed)
        self.keeps: WeakSet[Made] = WeakSet()
        """Frames that are there and are still of use. It lets go of the others with the next call."""

    def call(self, stage: int, records: Records | Rows, number: int, timeout_s: float) -> Answer:
        """Send a call and wait for the answer. Raises TimeoutError, and EOFError or OSError where it died."""
        self._connection.send(Call(stage, records, number, tuple(made.number for made in self.keeps)))
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        answer: Answer | InvocationFailed = self._connection.recv()
        if isinstance(answer, InvocationFailed):
            raise answer
        return answer

    def calls(self) -> str:
        """The calls it is in now; empty where it does not say so in time."""
        (dump,) = stacks.asked([(self._process, self._log)])
        return stacks.calls_at_work(dump)

    def abort(self, reason: str, message: str) -> InvocationFailed:
        """End it with the calls it was in written down, as the failure of what it was sent."""
        with suppress(WatcherLostError):
            self._process.signal(signal.SIGABRT)
        self._wait(LAST_WORDS_S)
        self.kill()
        return self._failed(reason, message)

    def died(self) -> InvocationFailed:
        """The failure of what it was sent when it died."""
        code = self._wait(LAST_WORDS_S)
        how = (
            f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if code and code < 0
            else f"exited with {code}"
        )
        self.kill()
        return self._failed("Killed", f"the process of the callable {how}")

    def kill(self) -> None:
        """End it at once. Never raises."""
        self._process.stop(grace_s=0)

    def _failed(self, reason: str, message: str) -> InvocationFailed:
        crash = crash_in(self._log.read_text(errors="replace"))
        return InvocationFailed(reason, message, Remedy.DIED, location=crash.location, traceback=crash.text)

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        with suppress(WatcherLostError):
            while (code := self._process.poll()) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            return code
        return None

    def _connect(self, birth: Birth, closed: threading.Event) -> "Connection[Call, Answer | InvocationFailed]":
        """It listens once the callables are constructed."""
        names = " and ".join(repr(stage.name) for stage in birth.stages)
        deadline = time.monotonic() + START_TIMEOUT_S
        with socket_path(self._folder) as path:
            while self._process.poll() is None and time.monotonic() < deadline and not closed.is_set():
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    return Client(path, "AF_UNIX")
                time.sleep(0.01)
        self.kill()
        raise StageStartError(
            f"stage {names} did not start in a process of its own, as it did in its worker",
            log=tail(self._log.read_text(errors="replace"), secrets_at_work(birth.job), ""),
            next="see its log: is there memory for a second one? the same command then resumes the run",
        )
