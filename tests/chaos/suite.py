"""The seeded driver: deals the faults out to episodes, plays each, checks what it published, and counts.

An episode is one run with some faults, its resumptions, and the checks. What is done in it follows from the seed and
its number alone, so that one that failed can be played again by itself.
"""

import math
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from tests.chaos.checks import check
from tests.chaos.faults import FAULTS, POISON, Fault, SceneKind
from tests.chaos.poison import Poison, choose_poison
from tests.chaos.scene import RunOverError
from tests.chaos.setting import Setting

FAULTS_PER_EPISODE: dict[SceneKind, int] = {"local": 6, "s3": 5, "disk": 2, "processes": 4, "containers": 5}
MOST_CALLS = 3
"""Calls that are let through the gate before a fault."""
POISON_PER_EPISODE = {"exception": 6, "bad row": 6, "segfault": 3, "hang": 2}
"""Poison records of one run that is about them; "memory" has runs of its own, in a control group."""


@dataclass(frozen=True)
class Episode:
    """One run: where it reads and writes, the faults in their order, the poison records in its input."""

    scene: SceneKind
    faults: tuple[Fault, ...]
    poison: Poison
    number: int = 0

    @property
    def counted(self) -> Counter[str]:
        """Faults by kind. A few poison records are in every run, and count only in runs that are about them."""
        return Counter(fault.kind for fault in self.faults) or Counter(self.poison.kinds.values())


@dataclass(frozen=True)
class Played:
    """An episode that was played: the faults that met its run, and the traceback of what did not hold."""

    episode: Episode
    seconds: float
    tried: Counter[str]
    failed: str = ""


def deal(seed: int, total: int, only: str = "") -> list[Episode]:
    """Deal at least so many faults out, each kind by its share; with `only`, that kind alone."""
    choose = Random(seed)
    wanted = shares(total, only)
    dealt = [*deal_faults(choose, wanted, few_poison(seed)), *deal_poison(choose, wanted)]
    choose.shuffle(dealt)
    return [Episode(each.scene, each.faults, each.poison, number) for number, each in enumerate(dealt)]


def few_poison(seed: int) -> Poison:
    """What is in every run: so that a fault that costs another record, or hides one, is seen."""
    return choose_poison(Random(seed), {"exception": 3, "bad row": 1})


def shares(total: int, only: str) -> Counter[str]:
    """How often each kind of fault is wanted."""
    shares = {fault.kind: fault.share for fault in FAULTS} | POISON
    shares = {kind: share for kind, share in shares.items() if not only or kind == only}
    whole = sum(shares.values())
    return Counter({kind: math.ceil(share * total / whole) for kind, share in shares.items()})


def deal_faults(choose: Random, wanted: Counter[str], few: Poison) -> list[Episode]:
    episodes = []
    for scene in dict.fromkeys(fault.scene for fault in FAULTS):
        here = [fault for fault in FAULTS if fault.scene == scene for _ in range(wanted[fault.kind])]
        choose.shuffle(here)
        lasts, others = [f for f in here if f.when == "last"], [f for f in here if f.when != "last"]
        while lasts or others:
            last = [lasts.pop()] if lasts else []
            count = FAULTS_PER_EPISODE[scene] - len(last)
            episodes.append(Episode(scene, (*sorted(others[:count], key=is_late), *last), few))
            del others[:count]
    return episodes


def is_late(fault: Fault) -> bool:
    return fault.when != "early"


def deal_poison(choose: Random, wanted: Counter[str]) -> list[Episode]:
    left, episodes = {kind: wanted[kind] for kind in POISON_PER_EPISODE}, []
    while any(left.values()):
        taken = {kind: min(count, POISON_PER_EPISODE[kind]) for kind, count in left.items()}
        left = {kind: count - taken[kind] for kind, count in left.items()}
        episodes.append(Episode("poison", (), choose_poison(choose, taken)))
    return episodes + [Episode("memory", (), choose_poison(choose, {"memory": 1})) for _ in range(wanted["memory"])]


def play_all(setting: Setting, seed: int, episodes: list[Episode], at_once: int) -> Iterator[Played]:
    """Play all episodes, some side by side, whatever becomes of each; yield them as they end."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="chaos") as threads:
        try:
            for done in as_completed(threads.submit(try_to_play, setting, seed, episode) for episode in episodes):
                yield done.result()
        finally:
            threads.shutdown(cancel_futures=True)  # after Ctrl-C: those that have begun are ended in good order


def try_to_play(setting: Setting, seed: int, episode: Episode) -> Played:
    """Play one episode and note what did not hold: the others are worth playing all the same."""
    began, failed, tried = time.monotonic(), "", episode.counted
    try:
        tried = play(setting, seed, episode)
    except Exception:  # noqa: BLE001 - told in the table
        failed = traceback.format_exc()
    return Played(episode, time.monotonic() - began, tried, failed)


def play(setting: Setting, seed: int, episode: Episode) -> Counter[str]:
    """Play one episode; the faults by kind. Raises whatever shows that a promise was not kept.

    A run that is over before the last of its faults has met it must be well, too; those that have not do not count.
    """
    choose = Random(f"{seed} {episode.number}")
    undisturbed = setting.undisturbed(episode.poison, episode.scene)
    with setting.open(episode.scene, f"episode-{episode.number}", episode.poison) as scene:
        scene.start()
        met: list[Fault] = []
        with suppress(RunOverError):
            for fault in episode.faults:
                scene.step(choose.randint(0, MOST_CALLS))
                fault.inject(scene, choose)
                met.append(fault)
        if not (met and met[-1].when == "last"):
            scene.finish()
        check(scene, undisturbed)
    return Counter(fault.kind for fault in met) if episode.faults else episode.counted
