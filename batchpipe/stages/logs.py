"""A stage's log: its last lines for an error's text, and the whole of it, with secrets masked, for the run's logs."""

import re
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from batchpipe.errors import MAX_LOG_CHARACTERS
from batchpipe.redact import mask

CALL = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
"""A call in what faulthandler prints."""
OWN_FOLDER = f"{Path(__file__).parent.parent}/"
_LIBRARY_FOLDERS = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
)
TAIL_LINES = 20
MAX_KEPT_BYTES = 64 << 20
"""Of all the servers that a stage had in a run; each one's own log is bounded by who writes it."""


def log_name(stage: str, copy: int) -> str:
    """The file of a stage's log below the run's ``logs/``."""
    return f"{stage}.log" if copy == 0 else f"{stage}.{copy}.log"


def tail(text: str, secrets: frozenset[str], kept_as: str) -> str:
    """Return the last lines of a log for an error's text, masked, and where the rest is; empty for an empty log.

    ``kept_as`` is where the whole log will be found; empty where it is not kept.
    """
    lines = mask(text, secrets).splitlines()
    if not lines:
        return ""
    place = f"; all in {kept_as}" if kept_as else ""
    rest = f"\n(last {min(TAIL_LINES, len(lines)):,} of {len(lines):,} lines{place})"
    return "\n".join(lines[-TAIL_LINES:])[-(MAX_LOG_CHARACTERS - len(rest)) :] + rest


@dataclass(frozen=True, slots=True)
class Crash:
    """Where a Python process was when it ended against its will; both empty where it could not tell."""

    text: str = ""
    """The signal, and the innermost calls."""
    location: str = ""
    """``file.py:41 in __call__``, of the user's own code."""


def crash_in(log: str) -> Crash:
    """What faulthandler printed last: the signal, and the calls of the thread that it hit.

    Where that thread ran no code of the user's, the calls are those of one that did.
    """
    _, fatal, dump = log.rpartition("Fatal Python error: ")
    if not fatal:
        return Crash()
    what, *threads = dump.split("\n\n")
    # The thread that was hit comes first; one that was told to abort was hit while another one did the work.
    threads.sort(key=lambda thread: (not _users_call(thread), not thread.startswith("Current thread ")))
    frames = [line for line in threads[0].splitlines() if line.startswith("  File ")] if threads else []
    return Crash("\n".join([fatal + what, *frames[:8]]), _users_call("\n".join(frames)))


def _users_call(calls: str) -> str:
    """``file.py:41 in __call__``: the innermost call of the user's own code; empty if there is none."""
    found = (CALL.fullmatch(line) for line in calls.splitlines())
    first = next((frame for frame in found if frame and is_user_code(frame["file"])), None)
    return f"{first['file']}:{first['line']} in {first['function']}" if first else ""


def is_user_code(file: str) -> bool:
    """Whether a file is neither ours, nor Python's, nor an installed library."""
    return not file.startswith((OWN_FOLDER, "<", *_LIBRARY_FOLDERS))


def is_own_code(file: str) -> bool:
    """Whether a file is ours."""
    return file.startswith(OWN_FOLDER)


def read_log(files: Sequence[Path]) -> str:
    """Return the text of a log that lies in several files, the oldest first; those that do not exist are empty."""
    text = ""
    for file in files:
        with suppress(FileNotFoundError):
            text += file.read_text(encoding="utf-8", errors="replace")
    return text


def keep_log(text: str, secrets: frozenset[str], folder: Path, name: str) -> None:
    """Add a masked log to what the run keeps of the stage. A disk that is full costs the log, not the run."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / name
        is_full = file.exists() and file.stat().st_size > MAX_KEPT_BYTES
        with file.open("w" if is_full else "a", encoding="utf-8") as kept:
            kept.write(mask(text, secrets))
