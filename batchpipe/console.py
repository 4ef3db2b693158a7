"""How a command meets the world: signals as an exception, answers to stdout, errors to stderr with their code."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Stopped(BaseException):
    """A signal that ends the run: raised where the program is, so that everything is released on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def report(error: Exception, arguments: list[str]) -> int:
    """Tell an error, as JSON too where the arguments ask for it; return its exit code."""
    from pathlib import Path

    from batchpipe.errors import BatchpipeError
    from batchpipe.summary import error_document, explain

    if not isinstance(error, BatchpipeError):
        if "-v" in arguments or "--verbose" in arguments:
            import traceback

            traceback.print_exception(error)
        message = f"unexpected {type(error).__name__}: {error}"
        error = BatchpipeError(message, next="this is a defect of batchpipe; `batchpipe -v ...` shows where")
    try:
        here = Path.cwd()
    except FileNotFoundError:  # somebody removed it
        here = Path("/")
    tell(explain(error, here))
    if "--json" in arguments:
        with suppress(OSError):  # where stdout takes nothing, that is what has just been told
            _write(json.dumps(error_document(error)), sys.stdout)
    return error.exit_code


def working_folder_or_raise() -> None:
    """Refuse to start where the working directory was removed: relative paths mean nothing. Raises BatchpipeError."""
    from pathlib import Path

    try:
        Path.cwd()
    except FileNotFoundError as error:
        from batchpipe.errors import JobError

        raise JobError("the working directory was removed", next="change to one that exists: cd") from error


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """The first hang-up, Ctrl-C or TERM raises `Stopped`; later ones wait for the release it starts."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer(text: str) -> None:
    """Print what a command answers. Raises OutputError where stdout does not take it: a full disk is no defect."""
    try:
        _write(text, sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        from batchpipe.errors import OutputError

        drop_stdout()
        raise OutputError(
            f"what the command has to say could not be printed: {error.strerror}",
            where="stdout",
            next="send it where there is room; a run that is done is not run again",
        ) from error


def drop_stdout() -> None:
    """Let what is buffered go nowhere: it would only fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text: str) -> None:
    """Print what is no answer: it must not get into a pipe. Where stderr takes nothing, the exit code says enough."""
    with suppress(OSError):
        _write(text, sys.stderr)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is not None:  # it was closed
        stream.write(f"{text}\n")
        stream.flush()
