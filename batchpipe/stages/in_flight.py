"""The invocations of this worker that no stack shows: at a server, in another process, or between two attempts.

They are what a run that is stuck waits for; a callable in the worker itself is seen by its calls.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

_numbers = count()
_marked: dict[int, "_Invocation"] = {}


@dataclass(frozen=True, slots=True)
class _Invocation:
    stage: str
    state: str
    calls: Callable[[], str]
    began: float = field(default_factory=time.monotonic)


@contextmanager
def invocation(stage: str, state: str = "in flight", calls: Callable[[], str] = str) -> Iterator[None]:
    """Mark an invocation that is waited for; `calls` asks who works at it for the calls it is in."""
    number = next(_numbers)
    _marked[number] = _Invocation(stage, state, calls)
    try:
        yield
    finally:
        del _marked[number]


def told() -> str:
    """A line for each stage and state, with how many there are and since when; empty where nothing is waited for."""
    alike: dict[tuple[str, str], list[_Invocation]] = {}
    for marked in list(_marked.values()):
        alike.setdefault((marked.stage, marked.state), []).append(marked)
    return "\n".join(text for group in alike.values() for text in (_line(group), *_calls(group)))


def _line(alike: list[_Invocation]) -> str:
    many, seconds = len(alike), time.monotonic() - min(one.began for one in alike)
    what = f"{many:,} invocations {alike[0].state}, the oldest" if many > 1 else f"1 invocation {alike[0].state}"
    return f"stage {alike[0].stage!r}: {what} for {seconds:,.0f} s"


def _calls(alike: list[_Invocation]) -> list[str]:
    return [calls for one in alike if (calls := one.calls())]
