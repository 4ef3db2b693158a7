"""A job in a folder of its own, run through the real command line in a bare environment, and what it left behind.

Every process of a run carries the folder's TMPDIR in its environment: that is how `Jobs.processes` finds them all.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import yaml

ENGINE_VARIABLES = ("DOCKER_HOST", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF")
COMMAND = [sys.executable, "-m", "batchpipe"]

NO_ENGINE = "/nowhere"
"""A PATH for `ps` and `clean` that leave the engine alone: its containers may be those of a test beside this one."""

# What stages of several tests share: they wait for a file, which the test makes when it has looked.
GATE = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent

def wait_for(name):
    deadline = time.monotonic() + 60
    while not (HERE / name).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
"""
ECHO = """
import pandas as pd

def echo(frame: pd.DataFrame):
    return frame
"""


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``--json`` printed, which is all of stdout."""
        document: dict[str, Any] = json.loads(self.out)
        return document


def hear_signals() -> None:
    """Be told of Ctrl-C and of a hang-up, and with us all that we start.

    The background of a script ignores the one, what `nohup` starts the other.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Jobs:
    """A folder with job files, stage modules and inputs; `run` and `start` are the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = f"test-{uuid4().hex[:8]}"
        """For runs whose containers are looked for: other tests may use the engine at the same time."""
        self.out = folder / "out"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._started: list[subprocess.Popen[str]] = []
        self.environment = {"PATH": os.environ["PATH"], "HOME": "/proc", "TMPDIR": str(self.temporary)}
        self.environment |= {name: os.environ[name] for name in ENGINE_VARIABLES if name in os.environ}

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file of the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def job(self, stages: str | list[dict[str, Any]] = "stages:echo", name: str = "job.yaml", **blocks: Any) -> Path:
        """Write a job file: CSV in ``in/``, JSON Lines out, one worker, unless the blocks say otherwise."""
        document = {
            "input": {"uri": "in"},
            "stages": [{"callable": stages}] if isinstance(stages, str) else stages,
            "output": {"uri": "out", "format": "jsonl"},
            "compute": {"workers": 1},
        }
        for block, keys in blocks.items():
            known = document.get(block)
            document[block] = {**known, **keys} if isinstance(known, dict) and isinstance(keys, Mapping) else keys
        return self.write(name, yaml.safe_dump(document, sort_keys=False))

    def run(self, *arguments: str | Path, timeout: float = 60, **environment: str) -> Result:
        """Run a command to its end; `arguments` begin with the verb."""
        process = self.start(*arguments, **environment)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Result(process.returncode, out, err)

    def start(self, *arguments: str | Path, **environment: str) -> "subprocess.Popen[str]":
        """Start a command without a terminal, in a session of its own."""
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def processes(self, holding: str = "") -> list[psutil.Process]:
        """Every process of this folder's runs that is alive and whose command line holds a text."""
        marker = f"TMPDIR={self.temporary}".encode()
        return [p for p in psutil.process_iter() if marker in _environment(p.pid) and holding in " ".join(_command(p))]

    def is_released(self) -> bool:
        """Whether no process and no temporary file is left (G5)."""
        return not self.left()

    def left(self) -> list[str]:
        """Processes and temporary files of this folder's runs that are there."""
        running = [f"{process.pid}: {_command(process)}" for process in self.processes()]
        return running + [str(path) for path in below(self.temporary)]

    def end(self) -> None:
        """Kill what a failed test left."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for started in self._started:
            if started.stdout and not started.stdout.closed:
                started.kill()
                started.communicate(timeout=30)

    def parts(self) -> list[Path]:
        """The published files, in order of their names."""
        return sorted(p for p in self.out.rglob("*") if p.is_file() and "_batchpipe" not in p.parts)

    def part_bytes(self) -> dict[str, bytes]:
        """Name and content of every published file."""
        return {str(path.relative_to(self.out)): path.read_bytes() for path in self.parts()}

    def records(self) -> list[dict[str, Any]]:
        """The records of JSON Lines parts, in order."""
        return [json.loads(line) for path in self.parts() for line in path.read_text().splitlines()]

    def hidden(self, pattern: str) -> list[Path]:
        """Files below the output's own folder, by glob."""
        return sorted((self.out / "_batchpipe").glob(pattern))

    def quarantined(self) -> list[dict[str, Any]]:
        """All lines of the quarantine, in order of their splits."""
        return [json.loads(line) for path in self.hidden("*/quarantine/*") for line in path.read_text().splitlines()]

    def table(self, name: str) -> list[dict[str, Any]]:
        """One of the manifest's long tables."""
        (path,) = self.hidden(f"*/{name}.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def open_jobs(folder: Path) -> Iterator[Jobs]:
    """A folder of jobs with nothing of it running afterwards."""
    jobs = Jobs(folder)
    try:
        yield jobs
    finally:
        jobs.end()


@contextlib.contextmanager
def running(command: Sequence[str | Path], **options: Any) -> "Iterator[subprocess.Popen[Any]]":
    """A process that is killed where the block ends, however it does: Popen alone would wait for it, without end."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Wait for what another process does; 10 s is what G5 promises."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.02)


def stop_at_an_obstacle(jobs: Jobs, job: Path, name: str) -> str:
    """Have a run publish all but one of its parts, in whose place there is a file of somebody else for a while.

    Its stages touch ``began`` and wait for ``go``. What the run said, which it ends with 7.
    """
    run = jobs.start("run", job)
    until((jobs.folder / "began").exists, within_s=60)
    obstacle = jobs.write(f"out/{name}", "not ours")
    jobs.write("go", "")
    _, told = run.communicate(timeout=60)
    assert (run.returncode, f"error: cannot publish {name!r}: " in told) == (7, True), told
    obstacle.unlink()
    return told


def below(folder: Path) -> Iterator[Path]:
    """What lies below a folder. Unlike a glob it bears with what is removed while it looks."""
    for found, folders, files in os.walk(folder):
        yield from (Path(found) / name for name in [*folders, *files])


def csv_rows(count: int, first: int = 0) -> str:
    """A CSV of two columns: n counts up, text is as long as n is large."""
    return "n,text\n" + "".join(f"{n},row {n}\n" for n in range(first, first + count))


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
