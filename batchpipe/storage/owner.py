"""Who holds a lock: written into it, told to who comes later, and asked whether it is still alive."""

import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchpipe.errors import LockedError
from batchpipe.redact import clean_uri


def this_process(details: Mapping[str, Any]) -> dict[str, Any]:
    """This process as the owner of a lock, with what the caller adds (the run id)."""
    return {
        **details,
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "processes": _pid_namespace(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether the owner certainly lives no more: its process is one we can see, and it is gone.

    A process is only judged by who shares its boot and its pid namespace (containers on one host may share the name);
    anywhere else, and where the system has no boot id, the answer is False and the lock must lapse.
    """
    here = this_process({})
    if not here["boot"] or any(owner.get(key) != here[key] for key in ("host", "boot", "processes")):
        return False
    pid = owner.get("pid")
    return isinstance(pid, int) and _start_time(pid) != owner.get("started")


def locked(uri: str, owner: Mapping[str, Any], check: str) -> LockedError:
    """The error that names who holds the lock."""
    run = f"run {owner['run']}" if owner.get("run") else "another run"
    where = f" on {owner['host']}, pid {owner['pid']}, since {owner['since']}" if "pid" in owner else ""
    error = LockedError(f"{run}{where} holds this output", where=clean_uri(uri), next=check)
    error.passes_soon = bool(owner.get("sweeps"))
    return error


def to_bytes(owner: Mapping[str, Any]) -> bytes:
    """What a lock contains."""
    return json.dumps(owner, indent=1).encode()


def from_bytes(data: bytes) -> dict[str, Any]:
    """The owner in a lock; empty where it is not yet written, or not by us."""
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """When a process started, in ticks since boot: so that a reused pid is told apart. Empty: no such process."""
    state = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return state[19] if len(state) > 19 and state[0] not in ("Z", "X") else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
