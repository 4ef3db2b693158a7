"""Faults of the servers of stages: containers, processes, and the watchers that would end them."""

import signal
from random import Random

from tests import images
from tests.chaos.scene import Scene, send


def container_killed(scene: Scene, choose: Random) -> None:
    images.run("docker", "kill", choose.choice(scene.containers()))


def container_removed(scene: Scene, choose: Random) -> None:
    images.run("docker", "rm", "-f", choose.choice(scene.containers()))


def container_paused(scene: Scene, choose: Random) -> None:
    """For as long as it takes a mini-batch to come to it."""
    paused = choose.choice(scene.containers())
    images.run("docker", "pause", paused)
    scene.let_one_through()
    if images.try_to("docker", "unpause", paused):  # a slow machine made it too long, and another takes its place
        scene.step_until(lambda: paused not in scene.containers())


def container_paused_for_good(scene: Scene, choose: Random) -> None:
    """Longer than an invocation may take: another container takes its place."""
    paused = choose.choice(scene.containers())
    images.run("docker", "pause", paused)
    scene.step_until(lambda: paused not in scene.containers())


def process_killed(scene: Scene, choose: Random) -> None:
    send([choose.choice(scene.servers())], signal.SIGKILL)


def worker_killed(scene: Scene, choose: Random) -> None:
    """A worker with the servers of its stages."""
    scene.lose_workers(1)
    send(scene.workers(), signal.SIGKILL)


def process_and_watcher_killed(scene: Scene, choose: Random) -> None:
    """A server, and with it the process that would start another and end it with its worker."""
    scene.watchers()[-1].kill()
    send([choose.choice(scene.servers())], signal.SIGKILL)
    scene.wear_out()
    scene.resume(6)
