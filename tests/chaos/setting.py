"""What the scenes of a suite stand on, made when the first of them needs it: folders, the undisturbed runs' bytes."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import images
from tests.chaos.faults import SceneKind
from tests.chaos.poison import Poison
from tests.chaos.s3_scene import S3Scene
from tests.chaos.scene import ROOT, Scene, StagesKind
from tests.memory_group import open_memory_group
from tests.s3_proxy import open_proxy
from tests.s3_server import S3Server, start_s3_server

STAGES: dict[SceneKind, StagesKind] = {"processes": "processes", "containers": "containers"}
DISK_MB = 8
HANG_S = 3.0
"""What a call may take where a poison record hangs."""


def lacks(kind: SceneKind) -> str:
    """What this machine lacks for scenes of a kind; nothing, if they can be played here."""
    if kind == "containers" and not (
        shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        return "a docker that answers"
    if kind in ("disk", "memory") and not (sys.platform == "linux" and os.geteuid() == 0):
        return "Linux and root, to mount a disk or make a control group"
    return ""


class Setting:
    """Opens scenes below one folder."""

    def __init__(self, folder: Path, release: contextlib.ExitStack) -> None:
        self._folder = folder
        self._release = release
        self._making = threading.RLock()
        self.released_s: list[float] = []
        """How long each start that has ended took to be released."""
        self._undisturbed: list[tuple[Poison, StagesKind, dict[str, bytes]]] = []

    @contextlib.contextmanager
    def open(self, kind: SceneKind, name: str, poison: Poison) -> Iterator[Scene]:
        """A scene of a kind, closed at the end; `name` is its run's id."""
        with contextlib.ExitStack() as release:
            with self._making:
                scene = self._make(kind, self._folder / name, poison, release)
            release.callback(scene.close)
            yield scene
            self.released_s += scene.released_s

    def undisturbed(self, poison: Poison, kind: SceneKind) -> dict[str, bytes]:
        """What a run publishes that nobody disturbs: made once for each kind of stages and each poison."""
        with self._making:
            return self._undisturbed_of(poison, STAGES.get(kind, "callables"))

    def _undisturbed_of(self, poison: Poison, stages: StagesKind) -> dict[str, bytes]:
        for known, kind_known, published in self._undisturbed:
            if (known, kind_known) == (poison, stages):
                return published
        assert stages != "containers" or self._images
        scene = Scene(self._folder / f"undisturbed-{len(self._undisturbed)}", poison, stages, drop=True)
        with contextlib.closing(scene):
            scene.start()
            scene.finish()
            published = scene.published()
        assert len(published) > 20, sorted(published)
        self._undisturbed.append((poison, stages, published))
        return published

    def _make(self, kind: SceneKind, folder: Path, poison: Poison, release: contextlib.ExitStack) -> Scene:
        match kind:
            case "s3":
                proxy = release.enter_context(open_proxy(self._s3_server.endpoint))
                return S3Scene(folder, poison, self._s3_server, proxy)
            case "disk":
                release.enter_context(mounted(folder / "disk"))
                return DiskScene(folder, poison)
            case "poison":
                return Scene(folder, poison, timeout_s=HANG_S)
            case "memory":
                scene = Scene(folder, poison, workers=1)
                scene.group = release.enter_context(open_memory_group())
                return scene
            case "containers":
                assert self._images
        return Scene(folder, poison, STAGES.get(kind, "callables"))

    @functools.cached_property
    def _s3_server(self) -> S3Server:
        return self._release.enter_context(start_s3_server())

    @functools.cached_property
    def _images(self) -> list[str]:
        """The images of the container job."""
        base, made = images.job_base_image("docker"), []
        for name in ("features", "model", "decide"):
            images.build("docker", f"flight-delays-{name}", ROOT, f"jobs/flight_delays/Dockerfile.{name}", BASE=base)
            made.append(name)
        return made


class DiskScene(Scene):
    """A run whose output lies on a small disk of its own."""

    def document(self) -> dict[str, Any]:
        job = super().document()
        job["output"]["uri"] = "disk/out"
        self.jobs.out = self.jobs.folder / "disk" / "out"
        return job


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk in memory at a folder. Raises CalledProcessError without the right to mount one."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "chaos", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def open_setting(folder: Path) -> Iterator[Setting]:
    """A setting below a folder; what it started is gone at the end."""
    with contextlib.ExitStack() as release:
        yield Setting(folder, release)
