"""The invocations of this worker that no stack shows: at a server, in another process, or between two attempts.

They are what a run that is stuck waits for; a callable in the worker itself is seen by its calls.
"""

import time
from collections.abc import Callable

_marked: dict["Invocation", None] = {}


class Invocation:
    """One that is waited for, within its block; `calls` asks who works at it for the calls it is in."""

    __slots__ = ("began", "calls", "stage", "state")  # made for every request, of which there are thousands a second

    def __init__(self, stage: str, state: str = "in flight", calls: Callable[[], str] = str) -> None:
        self.stage = stage
        self.state = state
        self.calls = calls
        self.began = time.monotonic()

    def __enter__(self) -> None:
        _marked[self] = None

    def __exit__(self, *_: object) -> None:
        del _marked[self]


def told() -> str:
    """A line for each stage and state, with how many there are and since when; empty where nothing is waited for."""
    alike: dict[tuple[str, str], list[Invocation]] = {}
    for marked in list(_marked):
        alike.setdefault((marked.stage, marked.state), []).append(marked)
    return "\n".join(text for group in alike.values() for text in (_line(group), *_calls(group)))


def _line(alike: list[Invocation]) -> str:
    many, seconds = len(alike), time.monotonic() - min(one.began for one in alike)
    what = f"{many:,} invocations {alike[0].state}, the oldest" if many > 1 else f"1 invocation {alike[0].state}"
    return f"stage {alike[0].stage!r}: {what} for {seconds:,.0f} s"


def _calls(alike: list[Invocation]) -> list[str]:
    return [calls for one in alike if (calls := one.calls())]
