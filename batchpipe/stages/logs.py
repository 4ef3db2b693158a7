"""A stage's log: its last lines for an error's text, and the whole of it, with secrets masked, for the run's logs."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from batchpipe.errors import MAX_LOG_CHARACTERS
from batchpipe.redact import mask

TAIL_LINES = 20


def log_name(stage: str, copy: int) -> str:
    """The file of a stage's log below the run's ``logs/``."""
    return f"{stage}.log" if copy == 0 else f"{stage}.{copy}.log"


def tail(text: str, secrets: frozenset[str], kept_as: str) -> str:
    """Return the last lines of a log for an error's text, masked, and where the rest is; empty for an empty log."""
    lines = mask(text, secrets).splitlines()
    if not lines:
        return ""
    rest = f"(last {min(TAIL_LINES, len(lines)):,} of {len(lines):,} lines; all in logs/{kept_as})"
    last = "\n        ".join(lines[-TAIL_LINES:])
    return f"{last[-(MAX_LOG_CHARACTERS - 200) :]}\n        {rest}"


def read_log(files: Sequence[Path]) -> str:
    """Return the text of a log that lies in several files, the oldest first; those that do not exist are empty."""
    text = ""
    for file in files:
        with suppress(FileNotFoundError):
            text += file.read_text(encoding="utf-8", errors="replace")
    return text


def keep_log(text: str, secrets: frozenset[str], folder: Path, name: str) -> None:
    """Write a masked log where the run keeps it. A disk that is full costs the log, not the run."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(mask(text, secrets), encoding="utf-8")
