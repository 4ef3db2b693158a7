"""A stage that is a Python callable: how it is found, constructed, called, and what of its answers is refused (G8)."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml

from batchpipe.errors import JobError, RecordsFailedError, StageStartError
from batchpipe.job import Job
from batchpipe.jobfile import load_job
from batchpipe.outcome import Outcome
from batchpipe.transform import run_chain

TABLE = pa.table({"n": pa.array(range(8), pa.int64())})


@pytest.fixture
def make_job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Write a module and a job whose one stage names `attribute` in it; each test has a module of its own."""
    module = "stages_" + "".join(c if c.isalnum() else "_" for c in request.node.name)

    def make(source: str, attribute: str = "stage", **stage: Any) -> Job:
        (tmp_path / f"{module}.py").write_text("import numpy as np\nimport pandas as pd\n" + source)
        stages = [{"callable": f"{module}:{attribute}", "name": "stage", **stage}]
        document = {"input": {"uri": "in"}, "stages": stages, "output": {"uri": "out"}}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
        return load_job(tmp_path / "job.yaml")

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        yield make


def answers(outcome: Outcome) -> list[dict[str, Any]]:
    assert isinstance(outcome.records, pa.Table)
    return outcome.records.to_pylist()


def test_a_function_is_called_with_what_its_annotation_asks_for(make_job):
    job = make_job("def stage(frame: pd.DataFrame, by):\n    return frame.assign(n=frame.n * by)", params={"by": 3})

    assert answers(run_chain(job, TABLE)) == [{"n": 3 * n} for n in range(8)]


def test_a_class_is_constructed_once_with_its_params_and_called_on_the_thread_that_constructed_it(make_job):
    source = """
import threading
class Stage:
    def __init__(self, add):
        self.add, self.thread = add, threading.get_ident()
    def __call__(self, rows: list[dict]):
        assert threading.get_ident() == self.thread
        return [{"n": row["n"] + self.add} for row in rows]
"""
    outcome = run_chain(make_job(source, "Stage", params={"add": 1}), TABLE)

    assert answers(outcome) == [{"n": n + 1} for n in range(8)]
    assert threading.active_count() < 20


MEND = r"mend the code, or correct the params \(none are stated\); then run it again"
NAME = "name a function, or a class with __call__; its first parameter is one of these, or not annotated"


@pytest.mark.parametrize(
    ("source", "attribute", "code", "text", "advice"),
    [
        (
            "def stag(x): return x",
            "stage",
            2,
            "has no 'stage'; did you mean 'stag'?",
            r"correct it to \w+:stag, or define",
        ),
        ("x = 1", "stage", 2, "has no 'stage'", "correct it to one that it has, or define it"),
        (
            "raise LookupError('no model')",
            "stage",
            2,
            "LookupError: no model",
            r"mend the module: python -c 'import \w+'",
        ),
        ("def stage(:", "stage", 2, "SyntaxError: invalid syntax", r"mend the module: python -c 'import \w+'"),
        (
            *("import no_such_library.sub", "stage", 2, "ModuleNotFoundError: No module named 'no_such_library'"),
            "install what has the module 'no_such_library' where the stage runs",
        ),
        ("class Stage: pass", "Stage", 2, "stage 'stage' cannot be called: '", NAME),
        ("stage = 3", "stage", 2, "stage 'stage' cannot be called: '", NAME),
        ("def stage(x: int): ...", "stage", 2, "stage 'stage' asks for int, which records cannot be given as", NAME),
        (
            *("class S:\n  def __init__(self): raise OSError('x')\n  def __call__(self, f): ...", "S", 4),
            *("did not start: OSErr", MEND),
        ),
        (
            *("class S:\n  def __init__(self, a): ...\n  def __call__(self, f): ...", "S", 4),
            *("missing 1 required positional", MEND),
        ),
        ("def stage(frame, by): ...", "stage", 4, "did not start: TypeError: missing a required argument: 'by'", MEND),
        ("def stage(): ...", "stage", 4, "did not start: TypeError: too many positional arguments", MEND),
    ],
)
def test_what_cannot_be_imported_or_constructed_says_why(make_job, source, attribute, code, text, advice):
    with pytest.raises((JobError, StageStartError)) as caught:
        run_chain(make_job(source, attribute), TABLE)

    assert (caught.value.exit_code, text in caught.value.message) == (code, True), caught.value
    assert re.match(advice, caught.value.next), caught.value


def test_params_that_a_function_does_not_take_are_told_before_it_is_called(make_job):
    job = make_job("def stage(frame, by=1): return frame", params={"bye": 3})

    with pytest.raises(StageStartError, match="TypeError: got an unexpected keyword argument 'bye'") as caught:
        run_chain(job, TABLE)

    assert caught.value.where.endswith(".py:3")
    assert caught.value.next == "mend the code, or correct the params (bye); then run it again"


def test_params_go_to_the_decorator_of_a_function(make_job):
    source = """
import functools
def gives_by(function):
    @functools.wraps(function)
    def stage(frame, scale):
        return function(frame, scale, 10)
    return stage
@gives_by
def stage(frame, scale, by):
    return frame.assign(n=frame.n * scale * by)
"""
    assert answers(run_chain(make_job(source, params={"scale": 2}), TABLE)) == [{"n": 20 * n} for n in range(8)]


def test_a_missing_module_says_where_it_was_looked_for(make_job, tmp_path: Path):
    job = make_job("")
    (tmp_path / Path(job.stages[0].callable.partition(":")[0] + ".py")).unlink()

    with pytest.raises(JobError, match="ModuleNotFoundError: No module named 'stages_") as caught:
        run_chain(job, TABLE)
    assert f"looked in {tmp_path}" in caught.value.where
    advice = "put it into one of these folders, name its own in python_path, or correct the module's name"
    assert caught.value.next == advice


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("None", "returned None; expected a pandas DataFrame"),
        ("'text'", "returned a str; expected a pandas DataFrame"),
        ("3", "returned an int; expected a pandas DataFrame"),
        ("frame.head(5)", "answered 5 records for 8 sent"),
        ("frame.mean().to_frame().T", "answered 1 records for 8 sent"),
        ("pd.concat([frame, frame])", "answered 16 records for 8 sent"),
        ("frame[::-1]", "answered 8 records with their index in another order: answers go by place"),
        ("frame.sort_values('n', ascending=False).n", "index in another order"),
    ],
)
def test_G8_an_answer_that_breaks_the_contract_is_refused_with_stage_and_counts(make_job, returned, text):
    job = make_job(f"def stage(frame: pd.DataFrame):\n    return {returned}")

    with pytest.raises(RecordsFailedError) as caught:
        run_chain(job, TABLE)

    assert caught.value.message.startswith("stage 'stage' ")
    assert text in caught.value.message
    assert caught.value.where.endswith(".py:3")


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("frame", "must return (result, kept), as may_drop is set, not pandas.DataFrame"),
        ("frame, [1, 0] * 4", "must return kept as 8 booleans, one for each record sent, not int64 of shape (8,)"),
        ("frame, np.ones(3, bool)", "must return kept as 8 booleans, one for each record sent, not bool of shape (3,)"),
        ("frame, frame.n < 3", "answered 8 records for 3 kept"),
    ],
)
def test_G8_what_a_stage_drops_must_add_up(make_job, returned, text):
    job = make_job(f"def stage(frame: pd.DataFrame):\n    return {returned}", may_drop=True)

    with pytest.raises(RecordsFailedError) as caught:
        run_chain(job, TABLE)

    assert text in caught.value.message


def test_G1_dropped_records_are_told_apart_from_answered_ones(make_job):
    source = (
        "def stage(frame: pd.DataFrame):\n    kept = (frame.n % 2 == 0).to_numpy(bool)\n    return frame[kept], kept"
    )

    outcome = run_chain(make_job(source, may_drop=True), TABLE)

    assert (outcome.places.tolist(), outcome.dropped.tolist()) == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert [row["n"] for row in answers(outcome)] == [0, 2, 4, 6]


def test_a_stage_that_raises_names_the_line_of_user_code_and_fails_only_for_its_records(make_job):
    source = "def stage(frame: pd.DataFrame):\n    assert 5 not in set(frame.n), 'five'\n    return frame"

    outcome = run_chain(make_job(source), TABLE)

    (failed,) = outcome.failed
    assert (failed.place, failed.why.reason, failed.why.message) == (5, "AssertionError", "five")
    assert failed.why.location.endswith(".py:4 in stage")
    assert [row["n"] for row in answers(outcome)] == [0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("raised", "reason", "message"),
    [
        ("type('Panic', (BaseException,), {})('five')", "Panic", "five"),
        ("SystemExit('five')", "SystemExit", "five"),
        ("asyncio.CancelledError('five')", "CancelledError", "five"),
        ("Mute()", "Mute", "(Mute cannot be shown as text)"),
        ("ValueError('five \\ud800')", "ValueError", "five \\ud800"),
    ],
)
def test_whatever_a_stage_raises_fails_only_for_its_records(make_job, raised: str, reason: str, message: str):
    source = f"""
import asyncio
class Mute(Exception):
    def __str__(self):
        raise KeyError("no text")
def stage(frame: pd.DataFrame):
    if 5 in set(frame.n):
        raise {raised}
    return frame
"""
    outcome = run_chain(make_job(source), TABLE)

    (failed,) = outcome.failed
    assert (failed.place, failed.why.reason, failed.why.message) == (5, reason, message)
    assert failed.why.location.endswith(" in stage")
    assert failed.why.traceback.encode()
    assert [row["n"] for row in answers(outcome)] == [0, 1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("shape", ["pd.DataFrame({'n': values})", "[{'n': n} for n in values]", "{'n': values}"])
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("2**70", "returned column 'n' with values that no one type can hold: "),
        ("deep()", "maximum recursion depth exceeded"),
        ("Odd()", "returned column 'n' with values that no one type can hold: Could not convert"),
        ("'n/a'", "answered column 'n' as string; most of its mini-batch as int64"),
    ],
)
def test_an_answer_that_no_column_can_hold_fails_only_for_its_record(make_job, shape: str, value: str, why: str):
    source = f"""
class Odd:
    pass
def deep():
    nested = []
    for _ in range(2_000):
        nested = [nested]
    return nested
def stage(frame: pd.DataFrame):
    values = [{value} if n == 5 else int(n) for n in frame.n]
    return {shape}
"""
    outcome = run_chain(make_job(source), TABLE)

    (failed,) = outcome.failed
    assert failed.place == 5
    assert failed.why.message.startswith(why)
    assert failed.why.location.endswith(".py:11") or failed.why.reason == "WrongAnswer"
    assert [row["n"] for row in answers(outcome)] == [0, 1, 2, 3, 4, 6, 7]


def test_a_callable_may_say_that_a_second_attempt_helps(make_job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchpipe.invoke.FIRST_DELAY_S", 0.001)
    source = """
class Busy(Exception):
    retry = True
class Stage:
    calls = 0
    def __call__(self, frame: pd.DataFrame):
        self.calls += 1
        if self.calls < 3:
            raise Busy
        return frame.assign(calls=self.calls)
"""
    outcome = run_chain(make_job(source, "Stage"), TABLE)

    assert {row["calls"] for row in answers(outcome)} == {3}


def test_missing_values_reach_pandas_with_one_dtype_whatever_a_batch_holds(make_job):
    job = make_job("def stage(frame: pd.DataFrame):\n    return [str(frame.n.dtype)] * len(frame)")
    dtypes = [answers(run_chain(job, pa.table({"n": pa.array(ns, pa.int64())}))) for ns in ([1], [None], [1, None])]

    assert {row["prediction"] for rows in dtypes for row in rows} == {str(pd.Int64Dtype())}
