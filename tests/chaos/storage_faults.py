"""Faults of the line to the S3 store, of what is published over it, and of the disk."""

import itertools
import signal
from random import Random

import pytest

from tests.chaos.s3_scene import S3Scene
from tests.chaos.scene import WITHIN_S, Scene
from tests.s3_proxy import Act, is_completion

KINDS_OF_REQUEST = {
    "any": lambda _: True,
    "a read": lambda line: line.startswith(b"GET "),
    "a write": lambda line: line.startswith(b"PUT "),
    "the begin of an upload": lambda line: line.startswith(b"POST ") and b"?uploads" in line,
    "a segment of the journal": lambda line: line.startswith(b"PUT ") and b"/journal/" in line,
}
CHUNK = b"\0" * 65_536


def is_publication(line: bytes) -> bool:
    """Whether a request makes a part visible."""
    return is_completion(line) and b"/out/part-" in line


def disturb(scene: S3Scene, choose: Random, act: Act) -> None:
    """Do this to one or two requests, fewer than are tried again, and see them answered before the next fault."""
    of = KINDS_OF_REQUEST[choose.choice(list(KINDS_OF_REQUEST))]
    trouble = scene.proxy.disturb(act, choose.randint(1, 2), of)
    scene.step_until(lambda: trouble.is_over)


def connection_reset(scene: S3Scene, choose: Random) -> None:
    disturb(scene, choose, "reset")


def slowed_down(scene: S3Scene, choose: Random) -> None:
    """503 SlowDown."""
    disturb(scene, choose, "slow down")


def stalled(scene: S3Scene, choose: Random) -> None:
    """No answer, until the client gives up."""
    disturb(scene, choose, "stall")


def trickled(scene: S3Scene, choose: Random) -> None:
    """Answers that come a little at a time."""
    disturb(scene, choose, "trickle")


def write_acknowledged_in_vain(scene: S3Scene, choose: Random) -> None:
    """A write that the store has done, and nobody is told."""
    disturb(scene, choose, "lose the answer")


def line_cut(scene: S3Scene, choose: Random) -> None:
    """The store is away until the run gives up; what it could not give back there, the next start does."""
    trouble = scene.proxy.disturb("reset", 1_000_000)
    scene.wear_out()
    trouble.end()
    scene.resume(3, 7, left_for_the_next=scene.pending)


def publication_acknowledged_in_vain(scene: S3Scene, choose: Random) -> None:
    trouble = scene.proxy.disturb("lose the answer", choose.randint(1, 3), is_publication)
    scene.finish()
    assert trouble.left == 0


def driver_killed_while_it_publishes(scene: S3Scene, choose: Random) -> None:
    """Some parts are visible, others not: the next start goes on from there."""
    left = choose.randint(0, 20)

    def may_pass(line: bytes) -> bool:
        nonlocal left
        if is_publication(line):
            left -= 1
            if left < 0:
                scene.driver.kill()
                return False
        return True

    scene.proxy.may_pass = may_pass
    scene.open()
    scene.driver.wait(WITHIN_S)
    scene.proxy.may_pass = lambda _: True
    scene.resume(-signal.SIGKILL, left_for_the_next=scene.pending)  # from the commit on it only rolls forward
    scene.finish()


def disk_full(scene: Scene, choose: Random) -> None:
    """Nothing can be written where the output is."""
    fill_until_the_run_ends(scene, "disk")
    scene.resume(7)


def fill_until_the_run_ends(scene: Scene, name: str) -> None:
    filler = scene.jobs.folder / name / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(itertools.repeat(CHUNK))
    scene.wear_out()
    filler.unlink()
