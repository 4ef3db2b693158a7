"""The container engine, by its command: docker or podman, whichever is there and answers."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from batchpipe.stages import CannotStart
from batchpipe.stages.watcher import Watcher, WatcherLostError

RUN_LABEL = "batchpipe.run"
STAGE_LABEL = "batchpipe.stage"
OWNER_LABEL = "batchpipe.owner"
"""The worker process, as the owner of a lock is written: it tells who is dead."""
ENGINES = ("docker", "podman")
TIMEOUT_S = 60.0
START_TIMEOUT_S = 600.0
"""For an image that is large, or far away."""
POLL_S = 0.01


class EngineError(CannotStart):
    """A command of the engine failed; the text is what it said."""


class NoEngineError(EngineError):
    """No engine is installed, so that none can have a container of ours."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A command that answers. ``name`` is docker or podman, ``path`` where it lies."""

    name: str
    path: str

    def run(self, *arguments: str, timeout_s: float = TIMEOUT_S) -> str:
        """Run one command and return what it printed. Raises EngineError."""
        return _run([self.path, *arguments], timeout_s)

    def pull(self, image: str, watcher: Watcher, scratch: Path, cancelled: threading.Event | None) -> None:
        """Fetch an image that is not there. Raises EngineError, WatcherLostError."""
        try:
            self.image_id(image, pulls=False)
        except EngineError:
            _run_watched([self.path, "pull", "--quiet", image], {}, watcher, scratch, cancelled=cancelled)

    def create(self, arguments: list[str], environment: Mapping[str, str], watcher: Watcher, scratch: Path) -> None:
        """Run a command that makes a container or a network; it ends before the watcher sweeps for the last time.

        Raises EngineError, WatcherLostError.
        """
        _run_watched([self.path, *arguments], environment, watcher, scratch, creates=True)

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows of a container. Raises EngineError, also where there is none."""
        found: list[dict[str, Any]] = json.loads(self.run("container", "inspect", container))
        return found[0]

    def logs(self, container: str) -> str:
        """What a container wrote, both streams. Raises EngineError."""
        return self.run("logs", container)

    def image_id(self, image: str, *, pulls: bool) -> str:
        """The id of an image, pulled first where it is not there, if that is wanted. Raises EngineError."""
        inspect = ("image", "inspect", "--format={{.Id}}", image)
        try:
            found = self.run(*inspect)
        except EngineError:
            if not pulls:
                raise
            self.run("pull", "--quiet", image, timeout_s=START_TIMEOUT_S)
            found = self.run(*inspect)
        return found.strip().removeprefix("sha256:")

    @property
    def is_local(self) -> bool:
        """Whether containers run under this very kernel, so that their own addresses can be reached from here."""
        if self.name == "podman":
            return os.uname().sysname == "Linux" and os.getuid() == 0  # rootless: their network is not ours
        host = os.environ.get("DOCKER_HOST", "unix://")
        return os.uname().sysname == "Linux" and host.startswith("unix://")

    @property
    def has_reachable_networks(self) -> bool:
        """Whether this machine has an address in a network without a way out: not in those of podman with CNI."""
        if self.name != "podman":
            return True
        try:
            return self.run("info", "--format={{.Host.NetworkBackend}}").strip() == "netavark"
        except EngineError:  # before podman 4 there was nothing else
            return False


def find_engine() -> Engine:
    """Return the engine that answers. Raises EngineError that says which commands were tried."""
    return _find_engine(os.environ.get("PATH", os.defpath), os.environ.get("DOCKER_HOST", ""))


@lru_cache(maxsize=4)
def _find_engine(path: str, _host: str) -> Engine:
    tried = []
    for name in ENGINES:
        command = shutil.which(name, path=path)
        if not command:
            tried.append(f"{name} is not installed")
            continue
        try:
            version = _run([command, "version", "--format", "{{json .}}"], 30.0)
        except EngineError as exc:
            tried.append(f"{name} does not answer ({exc})")
            continue
        is_podman = name == "podman" or '"OsArch"' in version  # it may be installed as docker
        return Engine("podman" if is_podman else name, command)
    advice = "start one, `docker info` or `podman info` must answer; DOCKER_HOST says where docker is, if not here"
    is_none_there = not any(shutil.which(name, path=path) for name in ENGINES)
    error = NoEngineError if is_none_there else EngineError
    raise error(f"no container engine answers: {'; '.join(tried)}", next=advice)


def _run_watched(
    command: list[str],
    environment: Mapping[str, str],
    watcher: Watcher,
    scratch: Path,
    *,
    creates: bool = False,
    cancelled: threading.Event | None = None,
) -> None:
    log = scratch / f"engine-{uuid4().hex}"
    child = watcher.start(command, env={**os.environ, **environment}, cwd=scratch, log=log, creates=creates)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while (code := child.poll()) is None:
            if cancelled and cancelled.is_set():
                child.stop()
                raise EngineError("was not waited for: another stage did not start")
            if time.monotonic() > deadline:
                child.stop()
                raise _too_slow(command, START_TIMEOUT_S)
            time.sleep(POLL_S)
    except WatcherLostError:
        child.outlive()  # so that whoever asked for it can remove it
        raise
    said = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    if code:
        raise _failed(code, said)


def _run(command: list[str], timeout_s: float) -> str:
    # A session of its own: Ctrl-C at the terminal must not end a command that is starting or removing a container.
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "logs" in command[1:2] else subprocess.PIPE,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as exc:
        raise _too_slow(command, timeout_s) from exc
    except OSError as exc:
        raise EngineError(str(exc)) from exc
    if done.returncode:
        raise _failed(done.returncode, (done.stderr or done.stdout).decode("utf-8", "replace"))
    return done.stdout.decode("utf-8", "replace")


def _too_slow(command: list[str], timeout_s: float) -> EngineError:
    return EngineError(f"`{' '.join(command[:2])}` took more than {timeout_s:g} s")


def _failed(code: int, said: str) -> EngineError:
    lines = said.strip().splitlines()
    errors = [line for line in lines if "rror" in line]  # not where help is
    return EngineError("".join((errors or lines)[:1]) or f"exit code {code}")
