"""One run that faults are injected into: its folder, its gate, its starts and how they end.

A fault is injected while the run stands still at its gate, so that what it meets depends on the seed and not on the
speed of the machine.
"""

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import yaml

from batchpipe.processes import MAX_LOST_IN_A_ROW
from tests import images
from tests.chaos.poison import Poison
from tests.jobs import Jobs, below, until

if TYPE_CHECKING:
    import subprocess

ROOT = Path(__file__).parents[2]
WITHIN_S = 300.0
"""Seconds are no promise on a machine that others share: what takes longer hangs."""
RELEASED_WITHIN_S = 60.0
"""G5 promises 10 s, on a machine of one's own; how long it took is noted."""
CONTAINER_S = 5.0
"""What an invocation of a container may take, before somebody looks whether it is stuck."""
WORKER_TTL = "15s"
"""After which Dask gives up a worker that it has not heard of: it takes minutes otherwise."""
PACE_S = 0.2
"""Between two calls that are let through while something is waited for: so that the run is not over before."""
RETURN_S = 2.0
"""How long such a call may take to come back to the gate, with all that it writes on its way, on a slow machine."""
ARROW = "application/vnd.apache.arrow.stream"

StagesKind = Literal["callables", "processes", "containers"]


class RunOverError(Exception):
    """The run has ended, well or not, before a fault could meet it."""


class Scene:
    """A run of the flight job on local files; `S3Scene` has it on S3."""

    def __init__(
        self,
        folder: Path,
        poison: Poison,
        stages: StagesKind = "callables",
        *,
        drop: bool = False,
        timeout_s: float = 600.0,
        workers: int = 2,
    ) -> None:
        self.workers_wanted = workers if stages == "callables" else 1
        self.timeout_s = timeout_s
        self.poison = poison
        self.stages = stages
        self.jobs = Jobs(folder)
        self.inputs = folder / "in"
        self.run_id = folder.name
        self.driver: subprocess.Popen[str]
        self.released_s: list[float] = []
        """How long it took after the end of each start until nothing was left of it."""
        self._lost = 0
        self.group: Path | None = None
        """The control group that the run is put into."""
        self.environment = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": WORKER_TTL}
        poison.write_inputs(folder, drop=drop)
        shutil.copy(Path(__file__).with_name("guard.py"), folder)
        self.gate = folder / "gate"
        self.gate.mkdir()
        self.job = self.jobs.write("job.yaml", yaml.safe_dump(self.document(), sort_keys=False))

    def document(self) -> dict[str, Any]:
        """The example's own job file, with a guard in front, its slice of the data and small splits."""
        name = "flight_delays_containers" if self.stages == "containers" else "flight_delays"
        job: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / f"{name}.yaml").read_text())
        stages = [*map(as_process, job["stages"])] if self.stages == "processes" else job["stages"]
        for stage in stages:
            if "container" in stage:
                stage["invocations_timeout_s"] = CONTAINER_S
            if "model_data" in stage.get("container", {}):
                stage["container"]["model_data"] = str(ROOT / "jobs" / stage["container"]["model_data"])
        job["python_path"] = [str(ROOT / "jobs")]
        job["input"]["uri"] = "in/*.csv"
        job["output"]["uri"] = "out"
        job["stages"] = [
            {"name": "guard", "callable": "guard:guard", "may_drop": True, "invocations_timeout_s": self.timeout_s},
            *stages,
        ]
        job["batch"] = {"split_mb": 0.008, "max_records": 16, "max_concurrent_transforms": 2}
        job["on_error"] = {"max_failed_records": len(self.poison)}
        job["compute"] = {"workers": self.workers_wanted}
        return job

    # --- starts and ends ---

    def start(self) -> None:
        """Start the run, or resume it."""
        self._lost = 0
        self.driver = self.jobs.start("run", self.job, "--run-id", self.run_id, **self.environment)
        if self.group:
            (self.group / "cgroup.procs").write_text(str(self.driver.pid))

    def ends_with(self, *codes: int, left_for_the_next: str = "nothing") -> None:
        """Wait until the run ends, with one of these codes and with everything released."""
        _, err = self.driver.communicate(timeout=WITHIN_S)
        assert self.driver.returncode in codes, f"code {self.driver.returncode}, not {codes}:\n{err}"
        assert "Traceback" not in err, err
        ended, how = time.monotonic(), f"code {self.driver.returncode}"
        while left := [each for each in self.leftovers() if not each.startswith(left_for_the_next)]:
            assert time.monotonic() < ended + RELEASED_WITHIN_S, f"left after {how}: {left}\n{err}"
            time.sleep(0.05)
        self.released_s.append(time.monotonic() - ended)

    def resume(self, *codes: int, left_for_the_next: str = "nothing") -> None:
        """Wait until the run ends with one of these codes, and start it again."""
        self.ends_with(*codes, left_for_the_next=left_for_the_next)
        self.start()

    def finish(self) -> None:
        """Open the gate; the run must succeed."""
        self.open()
        self.ends_with(0)

    def leftovers(self) -> list[str]:
        """What G5 promises is gone when a start has ended, however it ended."""
        left = [f"process {process}" for process in self.jobs.processes()]
        left += [str(path) for path in self.jobs.temporary.iterdir()]
        if self.stages == "containers":
            left += self.containers("-a") + self.networks()
        return left + self.unjournaled()

    def unjournaled(self) -> list[str]:
        """Pending pieces that no segment of the journal names."""
        journal = "".join(path.read_text() for path in self.jobs.hidden("*/journal/0*.jsonl"))
        return [str(path) for path in self.jobs.hidden("*/pending/*") if path.name not in journal]

    @property
    def pending(self) -> str:
        """What names of unjournaled pieces begin with."""
        return str(self.jobs.out / "_batchpipe")

    def lapse_lock(self) -> None:
        """What time does to the lock of a start that has stopped, on a file server."""
        (self.jobs.out / "_batchpipe" / "lock").unlink()

    def close(self) -> None:
        """Kill what a failed check left."""
        self.jobs.end()
        if self.stages == "containers":
            until(lambda: not self.remove_containers())

    def remove_containers(self) -> list[str]:
        """Remove what is left of them and their networks, as the run's watcher may do too; what is still there."""
        for container in self.containers("-a"):
            images.try_to("docker", "rm", "-f", container)
        for network in self.networks():
            images.try_to("docker", "network", "rm", network)
        return self.containers("-a") + self.networks()

    # --- the gate ---

    def open(self) -> None:
        """Let every call through from here on."""
        self.jobs.write("open", "")

    def step(self, calls: int) -> None:
        """Let so many calls through the gate, then wait until another stands there."""
        for _ in range(calls):
            self.someone_waiting().unlink(missing_ok=True)
        self.someone_waiting()

    def step_until(self, condition: Callable[[], object]) -> None:
        """Let calls through until something has happened, or the run has ended."""
        deadline = time.monotonic() + WITHIN_S
        while not condition() and self.driver.poll() is None:
            assert time.monotonic() < deadline, f"not within {WITHIN_S} s"
            stood = len(self.waiting())
            self.let_one_through()
            time.sleep(PACE_S)
            returns_by = time.monotonic() + RETURN_S
            while len(self.waiting()) < stood and self.driver.poll() is None and time.monotonic() < returns_by:
                time.sleep(0.02)
        if not condition():
            raise RunOverError

    def lose_workers(self, count: int) -> None:
        """Let some work be finished first, if else so many were lost in a row that the run would end."""
        if self._lost + count >= MAX_LOST_IN_A_ROW:
            before, self._lost = self.journaled(), 0
            self.step_until(lambda: self.journaled() > before)
        self._lost += count

    def wear_out(self) -> None:
        """Let calls through until the run has ended."""
        until(lambda: self.driver.poll() is not None or self.let_one_through(), WITHIN_S)

    def let_one_through(self) -> bool:
        """Let a call through if one stands at the gate; false, for that is not what is waited for."""
        for path in self.waiting()[:1]:
            path.unlink(missing_ok=True)
        return False

    def someone_waiting(self) -> Path:
        """A call that stands at the gate, as soon as there is one. Raises RunOverError if none will come."""
        deadline = time.monotonic() + WITHIN_S
        while not (waiting := self.waiting()):
            if self.driver.poll() is not None:
                raise RunOverError
            assert time.monotonic() < deadline, f"nobody came to the gate within {WITHIN_S} s"
            time.sleep(0.02)
        return waiting[0]

    def waiting(self) -> list[Path]:
        """Calls at the gate, of processes that are neither dead nor frozen."""
        found = sorted(self.gate.iterdir())
        return [path for path in found if is_awake(int(path.name.partition("-")[0]))]

    # --- who is there ---

    def workers(self) -> list[psutil.Process]:
        return self.jobs.processes("batchpipe.worker")

    def watchers(self) -> list[psutil.Process]:
        """Watchers: the driver's first, then those of workers with stages to watch."""
        found = self.jobs.processes("watcher_process.py")
        return sorted(found, key=lambda process: process.ppid() != self.driver.pid)

    def servers(self) -> list[psutil.Process]:
        """The servers of stages that are processes."""
        return self.jobs.processes("batchpipe serve")

    def containers(self, *options: str) -> list[str]:
        """Containers of this run: those that run, or with ``-a`` all."""
        return images.run("docker", "ps", "-q", *options, self.label).split()

    def networks(self) -> list[str]:
        """Networks of this run's containers."""
        return images.run("docker", "network", "ls", "-q", self.label).split()

    @property
    def label(self) -> str:
        return f"--filter=label=batchpipe.run={self.run_id}"

    # --- what it wrote ---

    @property
    def out(self) -> str:
        return str(self.jobs.out)

    @property
    def storage_options(self) -> dict[str, Any]:
        """How to reach the output by another road than the run's."""
        return {}

    def published(self) -> dict[str, bytes]:
        """Name and content of everything that is seen in the output."""
        return self.jobs.part_bytes()

    def hidden(self) -> dict[str, bytes]:
        """Name and content of what runs keep beside it."""
        hidden, found = self.jobs.out / "_batchpipe", {}
        for path in below(hidden):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                found[str(path.relative_to(hidden))] = path.read_bytes()
        return found

    def journaled(self) -> int:
        """How many splits the journal says have settled."""
        segments = [data for name, data in self.hidden().items() if "/journal/0" in name]
        return sum(data.count(b'"type": "split"') for data in segments)


def as_process(stage: dict[str, Any]) -> dict[str, Any]:
    """A callable's stage as a server process."""
    command = [sys.executable, "-m", "batchpipe", "serve", stage["callable"]]
    return {"name": stage["name"], "process": {"command": command}, "content_type": ARROW, "accept": ARROW}


def is_awake(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return False


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to processes, of which some may be gone. Those that it kills are dead afterwards."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    if number == signal.SIGKILL:
        until(lambda: not any(is_awake(process.pid) for process in processes))
