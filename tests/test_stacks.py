"""What is told of a process: the threads in faulthandler's dump that work, and the invocations that it waits for."""

import json
import re
from pathlib import Path

import pytest

import batchpipe
from batchpipe.stages import in_flight
from batchpipe.stages.stacks import _AT_WORK, _WAITING, calls_at_work

OURS = Path(batchpipe.__file__).parent
LIBRARY = json.__file__
"""One of Python's files."""


def call(file: object, function: str) -> str:
    return f'  File "{file}", line 7 in {function}'


TASK = call(OURS / "pool.py", "_run")
USERS = [call(LIBRARY, "sleep"), call("/home/me/stages.py", "model"), call(OURS / "stages/callable.py", "_call")]
WRITES = [call(LIBRARY, "write"), call(OURS / "storage/local.py", "write"), call(OURS / "transform.py", "run"), TASK]
WAITS = [call(LIBRARY, "wait"), call(OURS / "chain.py", "_result"), call(OURS / "transform.py", "run"), TASK]
OPENS = [
    call(LIBRARY, "poll"),
    call(OURS / "stages/served.py", "start"),
    call(OURS / "stages/__init__.py", "open_stage"),
]
STANDING = [
    [call(LIBRARY, "select"), call(LIBRARY, "run_forever"), call(OURS / "chain.py", "_run")],
    [call(LIBRARY, "wait"), call(LIBRARY, "_worker")],
    [call(OURS / "worker.py", "_end_with_parent"), call(LIBRARY, "run")],
]


def dump(*threads: list[str]) -> str:
    """As faulthandler writes it, below what the process has printed."""
    shown = (
        f"Thread 0x{number} (most recent call first):\n" + "\n".join(calls) for number, calls in enumerate(threads)
    )
    return "printed before\n" + "\n\n".join(shown) + "\n"


@pytest.mark.parametrize(
    ("threads", "shown"),
    [
        pytest.param([USERS, WAITS], USERS, id="code of the user's, and no task that waits for it"),
        pytest.param([WRITES, *STANDING], WRITES, id="a task that writes"),
        pytest.param([OPENS, *STANDING], OPENS, id="a stage that is opened"),
        pytest.param([WRITES, USERS], [*WRITES, "  and", *USERS], id="both"),
        pytest.param([WAITS, *STANDING], WAITS, id="a task that waits, where nothing else is known"),
        pytest.param(STANDING, [], id="none that wait by design"),
    ],
)
def test_threads_that_work_are_shown(threads: list[list[str]], shown: list[str]):
    assert calls_at_work(dump(*threads)).splitlines() == shown


@pytest.mark.parametrize(("file", "function"), [*sorted(_AT_WORK), _WAITING])
def test_the_calls_that_tell_threads_apart_are_there(file: str, function: str):
    assert f"def {function}(" in Path(file).read_text()


def test_what_is_waited_for_stands_above_the_calls_and_in_the_place_of_tasks_that_wait():
    assert calls_at_work(dump(WAITS, WRITES, *STANDING), "waits").splitlines() == ["waits", *WRITES]
    assert calls_at_work(dump(WAITS, *STANDING), "waits") == "waits"


def test_who_started_the_thread_is_not_shown():
    assert calls_at_work(dump([*USERS, call(LIBRARY, "run"), call(LIBRARY, "_bootstrap")])).splitlines() == USERS


def test_the_call_into_a_library_is_shown_however_deep_it_went():
    deep = [call(LIBRARY, f"inner_{number}") for number in range(20)]

    assert calls_at_work(dump(deep + USERS)).splitlines() == [*deep[:5], USERS[1]]


def test_a_dump_of_something_else_shows_nothing():
    assert calls_at_work("") == calls_at_work("printed\n\n  File of mine\n") == ""


def test_invocations_are_counted_by_stage_and_by_what_they_wait_for_until_they_end():
    with (
        in_flight.Invocation("model"),
        in_flight.Invocation("model"),
        in_flight.Invocation("model", "waiting for another attempt"),
        in_flight.Invocation("other", "in a process of its own", lambda: "its calls"),
    ):
        told = re.sub(r"\d s$", "N s", in_flight.told(), flags=re.MULTILINE)

    assert told.splitlines() == [
        "stage 'model': 2 invocations in flight, the oldest for N s",
        "stage 'model': 1 invocation waiting for another attempt for N s",
        "stage 'other': 1 invocation in a process of its own for N s",
        "its calls",
    ]
    assert in_flight.told() == ""
