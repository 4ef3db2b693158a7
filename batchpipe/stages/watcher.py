"""The driver and each worker have one watcher: a small process that outlives them and releases what they held (G5).

This is their side of it: open it first, tell it what to release, close it last. `watcher_process` is the other side.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchpipe.errors import PoolError

GRACE_S = 3.0
"""Between TERM and KILL: what a server needs to answer what it has begun, and well within G5's 10 s."""
CLOSE_S = 60.0
_PROGRAM = Path(__file__).with_name("watcher_process.py")


def open_watcher(*, label: str = "", scratch: Path | None = None) -> "Watcher":
    """Start a watcher for this process. Raises OSError if it cannot be started, WatcherLostError if it is killed.

    ``label`` (``key=value``) marks containers and networks to remove, ``scratch`` is a folder to delete, at the end.
    """
    # By path and without site: it starts in 30 ms, imports nothing of ours, and no PYTHONPATH can break it.
    command = [sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with contextlib.ExitStack() as undo:
        watcher = undo.enter_context(Watcher(process))
        if label:
            watcher.containers(label)
        if scratch:
            watcher.scratch(scratch)
        undo.pop_all()
    return watcher


class WatcherLostError(PoolError):
    """The watcher was killed: what it should release may stay behind, so nothing more is started."""


class Watcher:
    """A running watcher. Closed once by whoever opened it; any thread may call it, each call takes under 1 ms."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self.pid = process.pid
        self.label = f"batchpipe.worker={uuid.uuid4().hex}"
        """What marks containers and networks as this owner's; `containers` must still be told of it."""
        self._process = process
        self._orders, self._replies = process.stdin, process.stdout
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, creates: bool = False
    ) -> "WatchedProcess":
        """Start a process in its own group, its output in ``log`` (bounded). Raises OSError as Popen does.

        At the end it is stopped; where it ``creates`` what `containers` names, it is let finish before the sweep.
        """
        reply = self._order("start", command=list(command), env=dict(env), cwd=str(cwd), log=str(log), creates=creates)
        if error := reply.get("error"):
            raise OSError(*error)
        return WatchedProcess(self, reply["pid"])

    def scratch(self, path: Path) -> None:
        """Delete this folder at the end."""
        self._order("scratch", path=str(path.absolute()))

    def containers(self, label: str, engine: str = "docker") -> None:
        """Remove the containers and networks with this label (``key=value``) at the end. Say so before they start."""
        self._order("containers", label=label, engine=engine)

    def at_end(self, command: Sequence[str] | None) -> None:
        """Start this clean-up command if the owner dies without closing; None takes it back."""
        self._order("at_end", command=list(command) if command else None)

    def close(self) -> None:
        """Release everything and wait until that is done. Never raises, may be called twice."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._orders.write(b'{"do": "close"}\n')
            self._orders.flush()
        with contextlib.suppress(OSError):
            self._orders.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._replies.close()

    def poll(self, pid: int) -> int | None:
        """Return the exit code of a process this watcher started, negative for a signal, None while it runs."""
        code: int | None = self._order("poll", pid=pid)["returncode"]
        return code

    def signal(self, pid: int, number: int) -> bool:
        """Send a signal to the group of a process this watcher started; say whether the group had members."""
        return bool(self._order("signal", pid=pid, number=number)["alive"])

    def _order(self, do: str, **values: object) -> dict[str, Any]:
        try:
            with self._lock:
                number = next(self._numbers)
                self._orders.write(json.dumps({"do": do, "order": number, **values}).encode() + b"\n")
                self._orders.flush()
                reply = self._replies.readline()
                # A signal may have cut an earlier order short: its reply is still to come.
                while reply and json.loads(reply)["order"] != number:
                    reply = self._replies.readline()
        except (OSError, ValueError) as exc:  # ValueError: closed already
            raise self._lost() from exc
        if not reply:
            raise self._lost()
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _lost(self) -> WatcherLostError:
        msg = f"the run's watcher process (pid {self.pid}) was killed, and nothing would release what the run holds"
        return WatcherLostError(msg, next="the same command again resumes the run")


class WatchedProcess:
    """A process that a watcher started, and the group it leads."""

    def __init__(self, watcher: Watcher, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._watcher = watcher

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal's number, None while it runs."""
        if self.returncode is None:
            self.returncode = self._watcher.poll(self.pid)
        return self.returncode

    def signal(self, number: int) -> None:
        """Send a signal to the whole group. Raises WatcherLostError."""
        self._watcher.signal(self.pid, number)

    def outlive(self, within_s: float = GRACE_S) -> None:
        """Wait until the whole group is gone, where no watcher is there to tell."""
        deadline = time.monotonic() + within_s
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(self.pid, 0)
                time.sleep(0.01)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End the whole group: TERM, and KILL for what is left after the grace. Never raises."""
        try:
            self._stop(grace_s)
        except WatcherLostError:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _stop(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        alive = self._watcher.signal(self.pid, signal.SIGTERM)
        while alive and time.monotonic() < deadline:
            time.sleep(0.01)
            alive = self._watcher.signal(self.pid, 0)
        self._watcher.signal(self.pid, signal.SIGKILL)
        while self.poll() is None and time.monotonic() < deadline + grace_s:
            time.sleep(0.01)
