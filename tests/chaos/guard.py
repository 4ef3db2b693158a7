"""The first stage of every job of the suite, copied beside its job file: a gate for the driver, and poison.

Each call waits in a file of its own until the driver removes it, or opens the gate for all: so the driver decides
how far a run goes before it injects a fault. Records that `orders.json` names are poison, or, in the undisturbed run
that all others are compared with, dropped.
"""

import ctypes
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

HERE = Path(__file__).parent
KEY = ["month", "day", "carrier", "flight", "origin"]
GATE_S = 120.0
POLL_S = 0.01
EATEN = 16 << 20

_calls = itertools.count()


class Poisoned(Exception):
    """What a poison record of the kind "exception" raises."""


def guard(flights: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    wait_at_the_gate()
    orders = json.loads((HERE / "orders.json").read_text())
    keys = flights[KEY].astype(str).agg("-".join, axis=1)
    named = keys.isin(list(orders["records"])).to_numpy()
    if orders["drop"]:
        return flights[~named], ~named
    for kind in sorted({orders["records"][key] for key in keys[named]}):
        act(kind)
    return flights, np.ones(len(flights), bool)


def wait_at_the_gate() -> None:
    waiting = HERE / "gate" / f"{os.getpid()}-{next(_calls)}"
    deadline = time.monotonic() + GATE_S
    waiting.touch()
    while waiting.exists() and not (HERE / "open").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody let {waiting.name} through the gate")
        time.sleep(POLL_S)
    waiting.unlink(missing_ok=True)


def act(kind: str) -> None:
    if kind == "exception":
        raise Poisoned(kind)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "hang":
        time.sleep(600)
    if kind == "memory":
        eaten: list[bytearray] = []
        while len(eaten) < 250:  # 4 GB, where the test allows one
            eaten.append(bytearray(b"1") * EATEN)
