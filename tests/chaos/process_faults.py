"""Faults of processes: each is injected while the run stands at its gate, and a run that it ends is resumed."""

import signal
from random import Random

import psutil

from tests.chaos.scene import WITHIN_S, Scene, is_awake, send
from tests.jobs import until


def worker_killed(scene: Scene, choose: Random) -> None:
    """One of the workers, in the middle of its splits."""
    scene.lose_workers(1)
    send([choose.choice(scene.workers())], signal.SIGKILL)


def all_workers_killed(scene: Scene, choose: Random) -> None:
    scene.lose_workers(2)
    send(scene.workers(), signal.SIGKILL)


def driver_killed(scene: Scene, choose: Random) -> None:
    scene.driver.kill()
    scene.resume(-signal.SIGKILL)


def driver_and_worker_killed(scene: Scene, choose: Random) -> None:
    """Both at once: the watcher alone is left to release the rest."""
    send([choose.choice(scene.workers()), psutil.Process(scene.driver.pid)], signal.SIGKILL)
    scene.resume(-signal.SIGKILL)


def driver_interrupted(scene: Scene, choose: Random) -> None:
    """Ctrl-C, or what a scheduler sends."""
    number = choose.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    scene.driver.send_signal(number)
    scene.resume(128 + number)


def watcher_killed(scene: Scene, choose: Random) -> None:
    """The process that would release what a killed driver leaves: the run ends by itself."""
    scene.watchers()[0].kill()
    scene.resume(6)


def second_run(scene: Scene, choose: Random) -> None:
    """The same command again, while the run goes on: it is sent away at once."""
    code = scene.jobs.run("run", scene.job, "--run-id", scene.run_id, timeout=WITHIN_S, **scene.environment).code
    assert code == 75


def worker_frozen(scene: Scene, choose: Random) -> None:
    """A worker stops until its splits were given to another, then goes on: it is late, and writes all the same.

    Dask gives a worker up that it has not heard of for `worker-ttl`, which a scene makes seconds.
    """
    worker = int(scene.someone_waiting().name.partition("-")[0])
    held = [path for path in scene.gate.iterdir() if path.name.startswith(f"{worker}-")]
    send([psutil.Process(worker)], signal.SIGSTOP)
    # A split that lost its worker is run again with its callables in child processes.
    scene.step_until(lambda: scene.jobs.processes("child_process"))
    for path in held:
        path.unlink(missing_ok=True)
    send([psutil.Process(worker)], signal.SIGCONT)
    scene.finish()


def run_frozen(scene: Scene, choose: Random) -> None:
    """All of a run stops, time takes its lock from it, another start finishes its work, and then it goes on."""
    frozen, late = scene.jobs.processes(), scene.driver
    send(frozen, signal.SIGSTOP)
    until(lambda: not any(is_awake(process.pid) for process in frozen))
    scene.lapse_lock()
    scene.open()
    scene.start()
    _, err = scene.driver.communicate(timeout=WITHIN_S)
    assert scene.driver.returncode == 0, err
    published = scene.published()
    send(frozen, signal.SIGCONT)
    scene.driver = late
    # What it wrote too late lies unseen below `_batchpipe` until the next start.
    scene.resume(0, 6, 7, left_for_the_next=scene.pending)
    assert scene.published() == published
    scene.ends_with(0)
