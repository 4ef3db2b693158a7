"""What Python processes are doing, for the error that ends a run which is stuck.

faulthandler answers a signal without the interpreter, so that a call which keeps that is shown, too.
"""

import faulthandler
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from batchpipe.stages import in_flight
from batchpipe.stages.logs import CALL, OWN_FOLDER, is_own_code, is_user_code
from batchpipe.stages.watcher import WatchedProcess, WatcherLostError

ANSWER_S = 2.0
INNERMOST = 6
_AND = "\n  and\n"
"""Between the calls of two threads."""
_AT_WORK = {
    (f"{OWN_FOLDER}pool.py", "_run"),
    (f"{OWN_FOLDER}stages/__init__.py", "open_stage"),
    (f"{OWN_FOLDER}stages/callable.py", "_construct"),
    (f"{OWN_FOLDER}stages/callable.py", "_call"),
    (f"{OWN_FOLDER}stages/child.py", "_connect"),
}
"""Calls of a thread of ours that works: a task, a stage that is opened or called. The others wait by design."""
_WAITING = (f"{OWN_FOLDER}chain.py", "_result")
"""The call of a task that waits for a stage."""


def answer_when_asked() -> None:
    """Have this process write its stacks to its log whenever it is `asked`."""
    faulthandler.register(signal.SIGUSR1)


def asked(processes: Sequence[tuple[WatchedProcess, Path]]) -> list[str]:
    """The stacks that processes write to their logs; empty for one that does not answer in time. Never raises."""
    before = [_size(log) for _, log in processes]
    for process, _ in processes:
        with suppress(WatcherLostError):
            process.signal(signal.SIGUSR1)
    deadline, dumps = time.monotonic() + ANSWER_S, [""] * len(processes)
    while time.monotonic() < deadline:
        seen = dumps
        dumps = [_written(log, size) for (_, log), size in zip(processes, before, strict=True)]
        if all(dumps) and dumps == seen:
            break
        time.sleep(0.05)
    return dumps


def of_this_worker() -> str:
    """What this process does: the invocations that it waits for, and the calls that it is in."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return calls_at_work(file.read().decode(errors="replace"), in_flight.told())


def calls_at_work(dump: str, waits_for: str = "") -> str:
    """The threads of a faulthandler dump that work, each with its innermost calls, below what the process waits for.

    That is code of the user's, and our own where it reads, writes, or opens a stage. Tasks that wait for a stage are
    shown only where nothing else is.
    """
    threads = [list(filter(None, map(CALL.fullmatch, thread.splitlines()))) for thread in dump.split("\n\n")]
    at_work = [calls for calls in threads if any(map(_is_work, calls))]
    working = [calls for calls in at_work if not _is_waiting(calls)]
    shown = working if working or waits_for else at_work
    return "\n".join(filter(None, [waits_for, _AND.join(map(_innermost, shown))]))


def _is_work(call: re.Match[str]) -> bool:
    return is_user_code(call["file"]) or _place(call) in _AT_WORK


def _is_waiting(calls: list[re.Match[str]]) -> bool:
    return next((_place(call) for call in calls if not _is_library(call)), None) == _WAITING


def _innermost(calls: list[re.Match[str]]) -> str:
    """Some calls, at least one of which is no library's, and nothing of who started the thread."""
    places = [place for place, call in enumerate(calls) if not _is_library(call)]
    first, lines = places[0], [call[0] for call in calls[: places[-1] + 1]]
    return "\n".join(lines[:INNERMOST] if first < INNERMOST else [*lines[: INNERMOST - 1], lines[first]])


def _is_library(call: re.Match[str]) -> bool:
    return not is_user_code(call["file"]) and not is_own_code(call["file"])


def _place(call: re.Match[str]) -> tuple[str, str]:
    return call["file"], call["function"]


def _size(log: Path) -> int:
    with suppress(OSError):
        return log.stat().st_size
    return 0


def _written(log: Path, after: int) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(after)
        return file.read().decode(errors="replace")
    return ""
