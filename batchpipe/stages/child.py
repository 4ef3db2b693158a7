"""A callable in a process of its own, for splits that lost their worker: a record that kills then costs no other one.

The very same stage runs over there, so that it answers alike: see `child_process`. A death, or a call that takes too
long, is an invocation that failed like any other, and `invoke` finds the record.
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
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from batchpipe.batch import Records
from batchpipe.errors import StageStartError
from batchpipe.stages import Answer, InvocationFailed, Remedy
from batchpipe.stages.callable import CallableStage
from batchpipe.stages.child_process import Birth, send, socket_path
from batchpipe.stages.logs import crash_in
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
    """An open callable whose process starts with the first invocation, and again after each death."""

    concurrency = 1
    is_exclusive = True

    def __init__(self, stage: "StageSpec", job: "Job", like: CallableStage, watcher: Watcher, scratch: Path) -> None:
        self.name = stage.name
        self.takes_table = like.takes_table
        self._birth = Birth(stage, job, like.hands_on_frames, memory_available())
        self._timeout_s = stage.invocations_timeout_s
        self._watcher = watcher
        self._scratch = scratch
        self._child: Child | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"child {stage.name}")
        self._closed = threading.Event()

    def takes_one(self, records: Records) -> bool:  # noqa: ARG002 - as HTTP stages have it
        """No: a callable is called with a mini-batch as it comes."""
        return False

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:  # noqa: ARG002 - it always is
        """Have the callable called over there."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._call, records)

    def close(self) -> None:
        """Kill the process, in whatever call it is."""
        self._closed.set()
        if self._child:
            self._child.kill()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _call(self, records: Records) -> Answer:
        child = self._child = self._child or Child(self._birth, self._watcher, self._scratch, self._closed)
        try:
            return child.call(records, self._timeout_s)
        except TimeoutError:
            self._child = None
            message = f"no answer within {self._timeout_s:g} s (invocations_timeout_s)"
            raise child.abort("Timeout", message) from None
        except (EOFError, OSError):
            self._child = None
            raise child.died() from None


class Child:
    """The process of one callable, from its start to its death. Raises StageStartError (4) where it does not start."""

    def __init__(self, birth: Birth, watcher: Watcher, scratch: Path, closed: threading.Event) -> None:
        self._folder = scratch / f"child-{uuid4().hex[:8]}"
        self._folder.mkdir(mode=0o700)
        self._log = self._folder / "log"
        (self._folder / "birth.pickle").write_bytes(pickle.dumps(birth))
        command = [sys.executable, "-P", "-m", "batchpipe.stages.child_process", str(self._folder)]
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        self._process = watcher.start(command, env=environment, cwd=Path.cwd(), log=self._log)
        self._connection = self._connect(birth.stage.name, closed)

    def call(self, records: Records, timeout_s: float) -> Answer:
        """Send records and wait for the answer. Raises TimeoutError, and EOFError or OSError where it died."""
        send(self._connection, records, "the stage before")
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        answer: Answer | InvocationFailed = self._connection.recv()
        if isinstance(answer, InvocationFailed):
            raise answer
        return answer

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

    def _connect(self, name: str, closed: threading.Event) -> "Connection[Records, Answer | InvocationFailed]":
        """It listens once the callable is constructed."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with socket_path(self._folder) as path:
            while self._process.poll() is None and time.monotonic() < deadline and not closed.is_set():
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    return Client(path, "AF_UNIX")
                time.sleep(0.01)
        self.kill()
        log = self._log.read_text(errors="replace")
        raise StageStartError(
            f"stage {name!r} did not start in a process of its own, as it did in its worker",
            log=log,
            next="see its log: is there memory for a second one? the same command then resumes the run",
        )
