"""The container engine, by its command: docker or podman, whichever is there and answers."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

RUN_LABEL = "batchpipe.run"
STAGE_LABEL = "batchpipe.stage"
OWNER_LABEL = "batchpipe.owner"
"""The worker process, as the owner of a lock is written: it tells who is dead."""
ENGINES = ("docker", "podman")
TIMEOUT_S = 60.0


class EngineError(Exception):
    """A command of the engine failed; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A command that answers. ``name`` is docker or podman, ``path`` where it lies."""

    name: str
    path: str

    def run(self, *arguments: str, timeout_s: float = TIMEOUT_S, environment: Mapping[str, str] | None = None) -> str:
        """Run one command and return what it printed. Raises EngineError."""
        return _run([self.path, *arguments], timeout_s, environment)

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows of a container. Raises EngineError, also where there is none."""
        found: list[dict[str, Any]] = json.loads(self.run("container", "inspect", container))
        return found[0]

    def logs(self, container: str) -> str:
        """What a container wrote, both streams. Raises EngineError."""
        return self.run("logs", container)

    @property
    def is_local(self) -> bool:
        """Whether containers run under this very kernel, so that their own addresses can be reached from here."""
        if self.name == "podman":
            return os.uname().sysname == "Linux" and os.getuid() == 0  # rootless: their network is not ours
        host = os.environ.get("DOCKER_HOST", "unix://")
        return os.uname().sysname == "Linux" and host.startswith("unix://")


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
            _run([command, "version", "--format", "{{.Server.Version}}"], 30.0)
        except EngineError as exc:
            tried.append(f"{name} does not answer ({exc})")
            continue
        return Engine(name, command)
    raise EngineError("; ".join(tried))


def _run(command: list[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str:
    # A session of its own: Ctrl-C at the terminal must not end a command that is starting or removing a container.
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "logs" in command[1:2] else subprocess.PIPE,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as exc:
        raise EngineError(f"`{' '.join(command[:2])}` took more than {timeout_s:g} s") from exc
    except OSError as exc:
        raise EngineError(str(exc)) from exc
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
        errors = [line for line in said if "rror" in line]  # not what it says of pulling, nor where help is
        raise EngineError("".join((errors or said)[:1]) or f"exit code {done.returncode}")
    return done.stdout.decode("utf-8", "replace")
