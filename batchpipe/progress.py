"""Progress as a bar on a terminal, as log lines without one: a callback handed to the runner."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

from tqdm import tqdm

from batchpipe.schedule import OnProgress, Progress, ignore
from batchpipe.summary import count, format_bytes, format_seconds, short_path

LOG_EVERY_S = 10.0


@contextmanager
def open_progress(mode: str, resume: str, stream: TextIO | None = None) -> Iterator[OnProgress]:
    """The callback for ``auto``, ``bar``, ``log`` or ``none``; auto is a bar on a terminal.

    `resume` is the command that a person types to go on. Whatever ends the block, what is printed next begins a line.
    Where stderr is closed, full or a pipe that nobody reads, the run goes on without a word.
    """
    stream = stream or sys.stderr
    if mode == "auto" and stream is not None:
        mode = "bar" if stream.isatty() else "log"
    if mode == "none" or stream is None:
        yield ignore
    elif mode == "log":
        yield _while_it_is_taken(Log(stream, resume))
    else:
        bar = Bar(stream, resume)
        try:
            yield _while_it_is_taken(bar)
        finally:
            with suppress(OSError):
                bar.close()


def _while_it_is_taken(show: OnProgress) -> OnProgress:
    is_taken = True

    def show_or_not(progress: Progress) -> None:
        nonlocal is_taken
        if is_taken:
            try:
                show(progress)
            except OSError:
                is_taken = False

    return show_or_not


class Log:
    """One line of ``key=value`` at each step and every ten seconds, for cron and Airflow."""

    def __init__(self, stream: TextIO, resume: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._resume = resume
        self._clock = clock
        self._last = self._started = clock()
        self._step = ""

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if progress.step == self._step and now - self._last < LOG_EVERY_S:
            return
        is_new, self._step, self._last = progress.step != self._step, progress.step, now
        if is_new and progress.step == "plan":
            self._write(
                progress,
                objects=progress.objects,
                bytes=progress.bytes,
                splits=progress.tally.splits,
                kept=progress.tally.settled,
                output=short_path(progress.job.output.uri, Path.cwd()),
                resume=f'"{self._resume}"',
            )
        elif not is_new or progress.step != "transform":
            self._write(progress, **_figures(progress, now - self._started))

    def _write(self, progress: Progress, **values: object) -> None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        pairs = " ".join(f"{key}={value}" for key, value in values.items())
        print(
            f"{moment} {progress.job.name} run={progress.run_id} step={progress.step} {pairs}",
            file=self._stream,
            flush=True,
        )


class Bar:
    """A bar that moves inside splits: bytes read of those listed, records, rate, time left, failures, workers."""

    def __init__(self, stream: TextIO, resume: str) -> None:
        self._stream = stream
        self._resume = resume
        self._bar: tqdm[NoReturn] | None = None
        self._kept = 0

    def __call__(self, progress: Progress) -> None:
        if progress.step == "plan":
            self._announce(progress)
        elif progress.step in ("start", "transform"):
            self._update(progress)
        elif self._bar is not None:
            self._update(progress)
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Leave the bar as it stands, of a run that ends early, and end its line."""
        if self._bar is not None:
            self._bar.leave = True
            self._bar.close()
            self._bar = None

    def _announce(self, progress: Progress) -> None:
        job, tally = progress.job, progress.tally
        stages = count(len(job.stages), "stage")
        print(
            f"{job.name} {progress.run_id}: {count(progress.objects, 'object')}, {format_bytes(progress.bytes)} "
            f"{job.input.format} -> {count(tally.splits, 'split')}, {stages}; "
            f"output {short_path(job.output.uri, Path.cwd())}; resume with: {self._resume}",
            file=self._stream,
            flush=True,
        )
        if tally.settled:
            print(
                f"  resumed: {tally.settled:,} of {count(tally.splits, 'split')} are done",
                file=self._stream,
                flush=True,
            )
        self._kept = tally.accounts.read

    def _update(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=max(progress.bytes, 1),
                initial=progress.tally.bytes_read,
                file=self._stream,
                bar_format="{percentage:3.0f}% |{bar:20}| {desc}",
                leave=False,
                ncols=_width(self._stream),
                nrows=20,  # where the terminal says none, tqdm would hide the bar
                mininterval=0.1,
            )
        total = max(progress.bytes, 1)
        done = min(progress.tally.bytes_read + max(progress.bytes_at_work, 0), total)
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.n = done
        figures = _figures(progress, elapsed, self._kept)
        eta = _eta(done - self._bar.initial, total - done, elapsed)
        self._bar.set_description_str(
            f"{figures['records']:,} records  {_short(figures['per_s'])}/s  eta {eta}"
            f"  failed {figures['failed']:,}  workers {progress.workers}"
        )


def _eta(moved: float, left: float, elapsed: float) -> str:
    return format_seconds(left * elapsed / moved) if moved > 0 else "?"


def _figures(progress: Progress, elapsed: float, kept: int = 0) -> dict[str, int]:
    records = progress.tally.accounts.read + max(progress.records_at_work, 0)
    return {
        "records": records,
        "per_s": int((records - kept) / elapsed) if elapsed > 0 else 0,
        "splits": progress.tally.settled,
        "of": progress.tally.splits,
        "failed": progress.tally.accounts.quarantined,
        "workers": progress.workers,
    }


def _width(stream: TextIO) -> int:
    """Columns of the terminal; one that does not know its own, as under `script` or `docker run -t`, has 100."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    return columns - 1 if columns > 1 else 100


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000 or unit == "M":
            return f"{number:.1f}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    raise AssertionError
