"""A command measured from outside as a whole, start-up included, and two of them in turn."""

import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SAMPLE_S = 0.1
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Seen:
    """What was last seen of a process: its peak of resident memory and the processor time it used itself."""

    command: str
    peak_mb: float = 0.0
    cpu_s: float = 0.0


@dataclass
class Finished:
    """One run of a command. `processes` is filled by `watch` only, the command itself first."""

    seconds: float
    cpu_s: float = 0.0
    """Processor time of the command and of all descendants that somebody waited for."""
    processes: list[Seen] = field(default_factory=list)

    @property
    def driver(self) -> Seen:
        """The command's own process."""
        return self.processes[0]

    def workers(self) -> list[Seen]:
        """The Dask workers among its descendants."""
        return [seen for seen in self.processes if "batchpipe.worker" in seen.command]


def time_command(command: Sequence[str]) -> Finished:
    """Run a command to its end. Raises CalledProcessError, with what it printed, if it fails."""
    before, started = _cpu_of_children(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    _succeeded(command, done.returncode, done.stdout + done.stderr)
    return Finished(seconds, _cpu_of_children() - before)


def watch(command: Sequence[str]) -> Finished:
    """Run a command to its end, looking at it and all its descendants ten times a second (Linux: /proc)."""
    seen: dict[int, Seen] = {}
    with tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for one in (root, *root.children(recursive=True)):
                    _look(one.pid, seen)
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - started
        printed.seek(0)
        _succeeded(command, process.returncode, printed.read())
    return Finished(seconds, processes=list(seen.values()))


def in_turn(a: Callable[[], Finished], b: Callable[[], Finished], runs: int) -> list[tuple[Finished, Finished]]:
    """Run A and B in turn, after one uncounted run of each: what slows the machine slows both."""
    a(), b()
    return [(a(), b()) for _ in range(runs)]


def print_pairs(a: str, b: str, pairs: Sequence[tuple[Finished, Finished]], aim: float) -> None:
    """Print seconds and processor time of A and B, and their ratios pair by pair."""
    width = max(len(a), len(b), len("ratio"))
    print(f"  {'':{width}}      min   median      max   ({len(pairs)} pairs)")
    for unit, figure in (("seconds", lambda run: run.seconds), ("processor seconds", lambda run: run.cpu_s)):
        for name, runs in ((a, [pair[0] for pair in pairs]), (b, [pair[1] for pair in pairs])):
            print(f"  {name:{width}}  {_spread([figure(run) for run in runs])}   {unit}")
        aimed = f", aim: at most {aim:g}" if unit == "seconds" else ""
        ratios = [figure(first) / figure(second) for first, second in pairs]
        print(f"  {'ratio':{width}}  {_spread(ratios)}   of {unit}{aimed}", flush=True)


def _spread(values: Sequence[float]) -> str:
    return "  ".join(f"{value:7.3f}" for value in (min(values), statistics.median(values), max(values)))


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _look(pid: int, seen: dict[int, Seen]) -> None:
    with suppress(OSError, IndexError, ValueError):
        proc = Path("/proc") / str(pid)
        status = (proc / "status").read_text()
        peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), None)
        if peak is None:  # a zombie has no memory any more
            return
        command = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        times = (proc / "stat").read_text().rpartition(") ")[2].split()
        one = seen.setdefault(pid, Seen(command))
        one.command = command
        one.peak_mb = max(one.peak_mb, int(peak) / 1024)
        one.cpu_s = (int(times[11]) + int(times[12])) / TICKS


def _succeeded(command: Sequence[str], code: int, printed: str) -> None:
    if code:
        print(printed)
        raise subprocess.CalledProcessError(code, list(command), printed)
