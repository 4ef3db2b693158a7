"""Inputs that change under a run: it ends, says so, and resumes when they are as they were."""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.chaos.s3_scene import S3Scene
from tests.chaos.scene import Scene

LAST = "03.csv"
"""The object that no worker has begun to read while the run is at its first calls."""


def truncated(scene: Scene, choose: Random) -> None:
    change(scene, lambda path: os.truncate(path, choose.randrange(path.stat().st_size)))


def grown(scene: Scene, choose: Random) -> None:
    change(scene, lambda path: path.write_bytes(path.read_bytes() * 2))


def rewritten(scene: Scene, choose: Random) -> None:
    """As many other bytes."""
    change(scene, lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"2")))


def removed(scene: Scene, choose: Random) -> None:
    change(scene, Path.unlink)


def change(scene: Scene, change: Callable[[Path], object]) -> None:
    path = scene.inputs / LAST
    data, stat = path.read_bytes(), path.stat()
    change(path)
    scene.wear_out()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    scene.resume(3)


def overwritten_on_s3(scene: S3Scene, choose: Random) -> None:
    key, data = f"in/{LAST}", (scene.inputs / LAST).read_bytes()
    scene.put(key, data[: choose.randrange(len(data))])
    scene.wear_out()
    scene.put(key, data)
    scene.resume(3)
