"""Containers and networks on this machine that batchpipe started: what `ps` lists, and `clean` removes if orphaned.

An orphan is one whose worker is dead: its watcher was killed too, or the machine lost power.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchpipe.stages.engine import OWNER_LABEL, RUN_LABEL, STAGE_LABEL, Engine, EngineError
from batchpipe.storage.owner import is_dead, this_process

LISTINGS = 10
"""Times that containers are listed anew where one of them vanishes before it is looked at."""


@dataclass(frozen=True, slots=True)
class Started:
    """One container or network: of which run and stage, by whom, and whether that one is gone."""

    kind: str
    """``container`` or ``network``."""
    name: str
    run_id: str
    stage: str
    state: str
    """As the engine says: running, exited ...; empty for a network."""
    since: str
    """When its worker opened it, UTC."""
    is_orphan: bool


def find_started(engine: Engine) -> list[Started]:
    """Return all containers and networks of all runs, orphans or not. Raises EngineError."""
    commands = (("container", ["ps", "--all"]), ("network", ["network", "ls"]))
    found = [_started(kind, each) for kind, command in commands for each in _inspect(engine, kind, command)]
    return sorted(found, key=lambda each: (each.kind, each.since, each.name))


def remove_started(engine: Engine, started: Iterable[Started]) -> None:
    """Remove containers, then networks. What is left then is told by `find_started`."""
    for each in sorted(started, key=lambda each: each.kind):
        with suppress(EngineError):
            engine.run(each.kind, "rm", *(["--force", "--volumes"] if each.kind == "container" else []), each.name)


def _inspect(engine: Engine, kind: str, command: list[str]) -> list[dict[str, Any]]:
    """All that the engine knows of those that this command lists."""
    tries = LISTINGS
    while names := engine.run(*command, "--quiet", f"--filter=label={RUN_LABEL}").split():
        try:
            found: list[dict[str, Any]] = json.loads(engine.run(kind, "inspect", *names))
        except EngineError:  # one of them may have gone just now
            tries -= 1
            if not tries:
                raise
        else:
            return found
    return []


def _started(kind: str, found: dict[str, Any]) -> Started:
    found = {key.lower(): value for key, value in found.items()}  # podman writes those of a network small
    labels: dict[str, str] = found.get("labels") or (found.get("config") or {}).get("Labels") or {}
    owner = _parsed(labels.get(OWNER_LABEL, ""))
    return Started(
        kind,
        str(found["name"]).lstrip("/"),
        labels.get(RUN_LABEL, ""),
        labels.get(STAGE_LABEL, ""),
        (found.get("state") or {}).get("Status", ""),
        str(owner.get("since", "")),
        is_dead(owner) or _is_from_before_a_boot(owner),
    )


def _is_from_before_a_boot(owner: dict[str, Any]) -> bool:
    """Whether this machine was started anew since: whoever ran before is dead."""
    here = this_process({})
    return bool(owner.get("host") == here["host"] and owner.get("boot") and owner["boot"] != here["boot"])


def _parsed(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
