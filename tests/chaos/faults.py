"""The table of faults: what is done, to which kind of scene, and how often of some two hundred times."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from tests.chaos import input_faults, process_faults, server_faults, storage_faults

SceneKind = Literal["local", "s3", "disk", "processes", "containers", "poison", "memory"]


@dataclass(frozen=True)
class Fault:
    """A kind of fault; `when` is its place in a run: "early" while little is read, "last" where it finishes the run."""

    kind: str
    scene: SceneKind
    inject: Callable[[Any, Random], None]
    share: int
    when: Literal["early", "any", "last"] = "any"


FAULTS = [
    Fault("worker killed", "local", process_faults.worker_killed, 10),
    Fault("all workers killed", "local", process_faults.all_workers_killed, 4),
    Fault("driver killed", "local", process_faults.driver_killed, 8),
    Fault("driver and worker killed", "local", process_faults.driver_and_worker_killed, 4),
    Fault("driver interrupted", "local", process_faults.driver_interrupted, 3),
    Fault("watcher killed", "local", process_faults.watcher_killed, 4),
    Fault("second run on the same output", "local", process_faults.second_run, 5),
    Fault("worker frozen, then late", "local", process_faults.worker_frozen, 4, "last"),
    Fault("run frozen, then late", "local", process_faults.run_frozen, 2, "last"),
    Fault("input truncated", "local", input_faults.truncated, 3, "early"),
    Fault("input grown", "local", input_faults.grown, 1, "early"),
    Fault("input rewritten", "local", input_faults.rewritten, 2, "early"),
    Fault("input removed", "local", input_faults.removed, 1, "early"),
    Fault("disk full", "disk", storage_faults.disk_full, 4),
    Fault("S3: worker killed", "s3", process_faults.worker_killed, 3),
    Fault("S3: driver killed", "s3", process_faults.driver_killed, 3),
    Fault("S3: driver killed while it publishes", "s3", storage_faults.driver_killed_while_it_publishes, 3, "last"),
    Fault("S3: run frozen, then late", "s3", process_faults.run_frozen, 1, "last"),
    Fault("S3: connection reset", "s3", storage_faults.connection_reset, 14),
    Fault("S3: 503 SlowDown", "s3", storage_faults.slowed_down, 14),
    Fault("S3: request stalled", "s3", storage_faults.stalled, 8),
    Fault("S3: answer slow", "s3", storage_faults.trickled, 6),
    Fault("S3: answer of a request lost", "s3", storage_faults.write_acknowledged_in_vain, 16),
    Fault("S3: answer of a publication lost", "s3", storage_faults.publication_acknowledged_in_vain, 3, "last"),
    Fault("S3: line cut until the run ends", "s3", storage_faults.line_cut, 2),
    Fault("S3: input overwritten", "s3", input_faults.overwritten_on_s3, 2, "early"),
    Fault("stage process killed", "processes", server_faults.process_killed, 6),
    Fault("worker killed with its stage processes", "processes", server_faults.worker_killed, 2),
    Fault("stage process killed with its watcher", "processes", server_faults.process_and_watcher_killed, 2),
    Fault("container killed", "containers", server_faults.container_killed, 5),
    Fault("container removed", "containers", server_faults.container_removed, 2),
    Fault("container paused", "containers", server_faults.container_paused, 4),
    Fault("container paused for good", "containers", server_faults.container_paused_for_good, 2),
    Fault("worker killed with its containers", "containers", server_faults.worker_killed, 2),
    Fault("driver killed with its containers", "containers", process_faults.driver_killed, 2),
]

POISON = {"exception": 22, "bad row": 22, "segfault": 6, "hang": 3, "memory": 1}
"""Poison records, by the same measure."""
