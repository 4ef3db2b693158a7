"""A callable in a process of its own: answers as in the worker; deaths, hangs and memory cost the records at fault."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from batchpipe.batch import MiniBatch, Origins, Records
from batchpipe.chain import Chain, StageRefused, open_chain
from batchpipe.convert.frames import FrameRecords
from batchpipe.errors import PoolError, StageStartError
from batchpipe.gauge import read_gauge
from batchpipe.outcome import FailureLimit, Outcome, new_stats
from batchpipe.redact import secrets_of
from batchpipe.stages import InvocationFailed, Remedy, StageContext
from batchpipe.stages.child_process import Call, answer
from batchpipe.stages.kept import JOINED, Rows
from batchpipe.stages.watcher import open_watcher
from tests.jobs import until
from tests.opened_stage import make_job

STAGES = """
import ctypes, gc, os, time
from pathlib import Path
import pandas as pd

def dying(frame: pd.DataFrame):
    if 3 in frame.n.values:
        ctypes.string_at(0)
    return frame.assign(n=2 * frame.n)

def leaving(frame: pd.DataFrame):
    if 3 in frame.n.values:
        os._exit(7)
    return frame

def sleeping(frame: pd.DataFrame):
    if 3 in frame.n.values:
        Path(__file__).with_name("asleep").touch()
        time.sleep(600)
    return frame

def spinning(frame: pd.DataFrame):
    if 3 in frame.n.values:
        ctypes.PyDLL(None).sleep(600)  # keeps the interpreter
    return frame

def eating(frame: pd.DataFrame):
    if 3 in frame.n.values:
        eaten = [bytearray(os.urandom(1 << 20)) for _ in range(8_000)]
    return frame

def failing(frame: pd.DataFrame):
    if 3 in frame.n.values:
        raise LookupError("no three")
    return frame

def small(frame: pd.DataFrame):
    return frame.astype({"n": "int8"})

def dtype(frame: pd.DataFrame):
    return frame.assign(dtype=str(frame.n.dtype))

def bodies(records: list[bytes]):
    return [record.upper() for record in records]

def lambdas(frame: pd.DataFrame):
    return frame.assign(call=[lambda n=n: n for n in frame.n])

def wrapped(frame: pd.DataFrame):
    return frame.assign(call=[lambda call=call: call() for call in frame.call])

def calling(frame: pd.DataFrame):
    return pd.DataFrame({"n": [call() for call in frame.call]})

def looked_up(frame: pd.DataFrame):  # what is not found is NaN: the type of the column is that of what is there
    if 6 in frame.n.values:
        raise LookupError("no six")
    return frame.assign(found=[{0: 1, 1: 2, 2: 3, 3: 4}.get(n, float("nan")) for n in frame.n])

def as_text(frame: pd.DataFrame):
    if 1 in frame.n.values:
        raise LookupError("no one")
    return frame.assign(n=frame.found.astype(str))

def n_only(frame: pd.DataFrame):
    return frame[["n"]]

class Counted:
    pass

class StillBorn:
    def __init__(self):
        if "PYTHONFAULTHANDLER" in os.environ:
            print("my key is hunter2hunter2", flush=True)
            os._exit(1)
    def __call__(self, frame: pd.DataFrame):
        return frame

def counted(frame: pd.DataFrame):
    return frame.assign(held=[Counted() for _ in frame.n])

def count(frame: pd.DataFrame):
    return frame.assign(held=sum(isinstance(each, Counted) for each in gc.get_objects()))

def even(frame: pd.DataFrame):
    kept = frame.n % 2 == 0
    return frame[kept], kept

def asked():
    with Path(__file__).with_name("asked").open("a") as file:
        file.write(".")
        return file.tell()

def odd_once(frame: pd.DataFrame):
    kept = frame.n % 2 == (asked() == 1)
    return frame[kept], kept

def leaving_all(frame: pd.DataFrame):
    return leaving(frame), frame.n >= 0

class Busy(Exception):
    retry = True

def busy_once(frame: pd.DataFrame):
    if asked() == 1:
        raise Busy
    return frame

def failing_at_the_fourth(frame: pd.DataFrame):
    if asked() == 4:
        raise LookupError("not now")
    return frame
"""
Open = Callable[..., Chain]


@pytest.fixture
def open_children(tmp_path: Path) -> Iterator[Open]:
    """Open a chain of these callables of STAGES, in child processes."""
    (tmp_path / "child_stages.py").write_text(STAGES)
    with contextlib.ExitStack() as stack:

        def open_it(*names: str, on_error: dict[str, Any] | None = None, **keys: Any) -> Chain:
            stages = [{"callable": f"child_stages:{name}", "name": name, **keys} for name in names]
            job = make_job(tmp_path, *stages, on_error=on_error or {})
            watcher = stack.enter_context(open_watcher())
            chain = stack.enter_context(
                open_chain(job, StageContext("run", 0, tmp_path, tmp_path, secrets_of(job)), watcher)
            )
            return stack.enter_context(contextlib.closing(chain.with_children(job, watcher, tmp_path)))

        yield open_it


def send(chain: Chain, records: Records) -> Outcome:
    batch = MiniBatch(records, Origins.of_range(0, 0, np.full(len(records), -1, np.int64)))
    return next(outcome for _, outcome in chain.stream([batch], FailureLimit(None), new_stats()))


def answers(outcome: Outcome, column: str = "n") -> list[Any]:
    assert isinstance(outcome.records, pa.Table)
    return outcome.records.column(column).to_pylist()


def numbers(count: int = 8) -> pa.Table:
    return pa.table({"n": pa.array(range(count), pa.int64())})


@pytest.mark.parametrize(
    ("name", "reason", "text", "function"),
    [
        ("dying", "Killed", "the process of the callable was killed by signal 11 (SIGSEGV)", "dying"),
        ("leaving", "Killed", "the process of the callable exited with 7", ""),
        ("sleeping", "Timeout", "no answer within 0.5 s (invocations_timeout_s)", "sleeping"),
        ("spinning", "Timeout", "no answer within 0.5 s (invocations_timeout_s)", "spinning"),
        ("failing", "LookupError", "no three", "failing"),
    ],
)
def test_record_that_ends_or_stops_the_process_is_found_and_told(open_children: Open, name, reason, text, function):
    outcome = send(open_children(name, invocations_timeout_s=0.5), numbers())

    (failed,) = outcome.failed
    assert (failed.place, failed.why.reason, failed.why.message) == (3, reason, text)
    assert failed.why.location.endswith(f" in {function}" if function else "")
    assert outcome.places.tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_values_that_no_process_can_hand_on_stay_in_the_one_that_callables_share(open_children: Open):
    outcome = send(open_children("lambdas", "wrapped", "calling"), numbers())

    assert answers(outcome) == list(range(8))


@pytest.mark.parametrize(
    ("names", "at_fault", "reason"),
    [
        (["dying", "lambdas", "calling"], "dying", "Killed"),
        (["lambdas", "dying", "calling"], "dying", "Killed"),
        (["lambdas", "wrapped", "dying", "calling"], "dying", "Killed"),
        (["lambdas", "sleeping", "calling"], "sleeping", "Timeout"),
        (["lambdas", "failing", "calling"], "failing", "LookupError"),
        (["failing_at_the_fourth", "leaving"], "leaving", "Killed"),  # when it is asked again for record 2 alone
    ],
)
def test_record_that_fails_where_callables_share_a_process_costs_itself_alone(
    open_children: Open, names, at_fault, reason
):
    outcome = send(open_children(*names, invocations_timeout_s=0.5), numbers())

    failed = [(failed.place, failed.stage, failed.why.reason) for failed in outcome.failed]
    assert failed == [(3, at_fault, reason)]
    assert outcome.places.tolist() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("names", [["eating"], ["lambdas", "eating", "calling"]])
def test_record_that_takes_all_memory_is_found(open_children: Open, monkeypatch: pytest.MonkeyPatch, names):
    monkeypatch.setattr("batchpipe.stages.child.memory_available", lambda: 1 << 30)

    outcome = send(open_children(*names), numbers())

    assert [(failed.place, failed.why.reason) for failed in outcome.failed] == [(3, "MemoryError")]


def test_G4_frames_pass_between_children_as_they_pass_in_the_worker(open_children: Open):
    outcome = send(open_children("small", "dtype"), numbers(2))

    assert isinstance(outcome.records, pa.Table)
    assert outcome.records.column("dtype").to_pylist() == ["int8"] * 2


def test_G4_frames_of_halves_are_joined_as_in_the_worker(tmp_path: Path, open_children: Open):
    names = ["looked_up", "as_text", "n_only"]
    apart = send(open_children(*names), numbers())
    job = make_job(tmp_path, *[{"callable": f"child_stages:{name}", "name": name} for name in names])
    with open_chain(job, StageContext("run", 0, tmp_path, tmp_path, frozenset()), None) as chain:
        in_the_worker = send(chain, numbers())

    assert answers(apart) == answers(in_the_worker) == ["1.0", "3.0", "4.0", None, None, None]


def test_dropped_records_are_told(open_children: Open):
    assert send(open_children("even", may_drop=True), numbers(5)).dropped.tolist() == [1, 3]


def test_G5_closing_ends_a_call_that_never_returns(open_children: Open, tmp_path: Path):
    chain = open_children("sleeping")
    ended = list[BaseException]()

    def wait() -> None:
        try:
            send(chain, numbers())
        except PoolError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until((tmp_path / "asleep").exists)

    chain.close()

    waiting.join(10)
    assert len(ended) == 1


def test_frames_that_are_of_no_more_use_are_let_go(open_children: Open):
    chain = open_children("counted", "count")

    for _ in range(10):
        assert answers(send(chain, numbers()), "held")[0] <= 3 * 8  # this frame, the one before it, and the proof


def test_stage_that_answers_other_records_when_asked_again_is_told(open_children: Open):
    with pytest.raises(StageRefused) as refused:
        send(open_children("odd_once", "leaving_all", may_drop=True), numbers())

    why = "stage 'odd_once', asked again for what was lost with its process, answers other records than before"
    assert refused.value.why.message == why


def test_process_that_does_not_start_shows_its_log_without_secrets(open_children: Open):
    with pytest.raises(StageStartError) as error:
        send(open_children("StillBorn", storage_options={"s3": {"secret": "hunter2hunter2"}}), numbers())

    assert error.value.message == "stage 'StillBorn' did not start in a process of its own, as it did in its worker"
    assert error.value.log == "my key is ***\n(last 1 of 1 lines)"


class Crowded(FrameRecords):
    """A frame of which no rows can be taken, as there is no memory for them."""

    def take(self, indices: Any) -> FrameRecords:
        raise MemoryError


def test_rows_for_which_there_is_no_memory_are_tried_as_fewer_and_break_no_contract():
    rows = Rows(np.zeros(2, np.int64), np.arange(2))

    failure = answer([], Call(JOINED, rows, 1, (0,)), {0: Crowded(pd.DataFrame({"n": [1, 2]}))})

    assert isinstance(failure, InvocationFailed)
    assert (failure.reason, failure.remedy) == ("MemoryError", Remedy.ISOLATE)


def test_a_wait_between_attempts_moves_the_run_while_it_lasts(open_children: Open):
    chain = open_children("busy_once", on_error={"no_progress_timeout_s": 0.15})
    before = read_gauge()["moved"]

    outcome = send(chain, pa.table({"n": [1]}))

    assert answers(outcome) == [1]
    assert (
        read_gauge()["moved"] >= before + 2 + 2
    )  # two attempts, and a wait of 0.1 s and more, a third of it at a time
