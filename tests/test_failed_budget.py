"""How many records may fail: by number as splits settle, by percentage at the end, or as soon as it is certain."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.failures import Budget, too_many_failed
from batchpipe.job import Job
from batchpipe.manifest import Accounts, Failure
from batchpipe.plan import Inputs
from batchpipe.schedule import Tally
from tests.jobs import GATE, Jobs, csv_rows, open_jobs

STAGES = """
import pandas as pd

def no_high(frame: pd.DataFrame):
    with open(HERE / "calls", "a") as calls:
        calls.write(".")
    assert frame.n.max() < 20, "too high"
    return frame
"""

ONE_AFTER_THE_OTHER: dict[str, Any] = {"compute": {"workers": 1}, "batch": {"split_mb": 0.000001, "max_records": 1}}


def make_budget(inputs: Inputs, form: str = "csv", **limits: Any) -> Budget:
    return Budget(make_job(form, **limits), inputs)


def make_job(form: str = "csv", **limits: Any) -> Job:
    blocks = {"input": {"uri": "/in", "format": form}, "stages": [{"callable": "a:b"}], "output": {"uri": "/out"}}
    return Job.model_validate({**blocks, "on_error": limits})


def listed(folder: Path, *objects: tuple[str, int]) -> Inputs:
    spool = folder / "spool"
    spool.write_text("".join(f'["{name}", {size}, "v", "{name}"]\n' for name, size in objects))
    return Inputs(spool, len(objects), sum(size for _, size in objects), "")


def tallied(read: int, failed: int, bytes_read: int) -> Tally:
    return Tally(accounts=Accounts(read, read - failed, failed), bytes_read=bytes_read)


@pytest.mark.parametrize(
    ("limits", "failed", "is_exceeded"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({"max_failed_records": 3}, 3, False),
        ({"max_failed_records": 3}, 4, True),
        ({"max_failed_percent": 0.7}, 7, False),
        ({"max_failed_percent": 0.7}, 8, True),
        ({"max_failed_percent": 0}, 1, True),
        ({"max_failed_percent": 0.7, "max_failed_records": 3}, 4, True),
        ({"max_failed_percent": 0.3, "max_failed_records": 9}, 4, True),
        ({"max_failed_percent": 0.3, "max_failed_records": 9}, 3, False),
    ],
)
def test_both_bounds_hold_at_the_end(tmp_path: Path, limits, failed, is_exceeded):
    budget = make_budget(listed(tmp_path, ("a", 5000)), **limits)

    assert budget.is_exceeded(tallied(1000, failed, 5000), at_end=True) is is_exceeded


@pytest.mark.parametrize(
    ("form", "objects", "is_certain"),
    [
        ("csv", [("a.csv", 1009)], True),
        ("csv", [("a.csv", 1010)], False),
        ("jsonl", [("a.jsonl", 1000)], True),
        ("csv", [("a.csv.gz", 1000)], False),
        ("parquet", [("a.parquet", 1000)], False),
        ("object", [(f"{n}.jpg", 1000) for n in range(609)], True),
        ("object", [(f"{n}.jpg", 1000) for n in range(610)], False),
    ],
)
def test_a_percentage_ends_the_run_early_only_where_all_that_is_unread_cannot_save_it(
    tmp_path: Path, form: str, objects: list[tuple[str, int]], is_certain: bool
):
    """61 of 100 failed: that is more than 10 % of 609 records, and not of 610."""
    budget = make_budget(listed(tmp_path, *objects), form, max_failed_percent=10)

    assert budget.is_exceeded(tallied(100, 61, 500)) is is_certain


@pytest.mark.parametrize(("form", "name"), [("parquet", "a.parquet"), ("csv", "a.csv.gz"), ("csv", "a.csv")])
def test_of_0_percent_the_first_failed_record_is_one_too_many_whatever_is_unread(tmp_path: Path, form: str, name: str):
    budget = make_budget(listed(tmp_path, (name, 1 << 40)), form, max_failed_percent=0)

    assert [budget.is_exceeded(tallied(100, failed, 500)) for failed in (0, 1)] == [False, True]


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=40), st.integers(0, 100))
def test_what_is_certain_early_is_so_in_the_end(tmp_path_factory, records: list[tuple[int, bool]], percent: int):
    inputs = listed(tmp_path_factory.getbasetemp(), ("a.csv", sum(size for size, _ in records)))
    budget = make_budget(inputs, max_failed_percent=percent)

    def upto(count: int) -> Tally:
        some = records[:count]
        return tallied(count, sum(fails for _, fails in some), sum(size for size, _ in some))

    in_the_end = budget.is_exceeded(upto(len(records)), at_end=True)
    assert in_the_end or not any(budget.is_exceeded(upto(count)) for count in range(len(records) + 1))


def test_the_error_names_the_bound_that_was_exceeded_and_a_percentage_that_suffices():
    tally = tallied(300, 7, 5000)
    tally.failures.append(Failure("a.csv", "v", 0, 0, 0, "model", "KeyError", "x"))

    error = too_many_failed(make_job(max_failed_records=100, max_failed_percent=2), tally, "q")

    assert error.message.startswith("stage 'model' failed for 7 records, 2 % of 300 allowed: KeyError: x")
    assert error.next.endswith("--set on_error.max_failed_percent=2.334")
    assert 7 / 300 < 0.02334


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + STAGES)
        yield jobs


def test_a_run_that_cannot_keep_within_its_percentage_ends_before_it_has_read_all_and_resumes(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(2000))
    job = jobs.job("stages:no_high", on_error={"max_failed_percent": 2}, batch={"split_mb": 0.0005})

    refused = jobs.run("run", job)
    again = jobs.run("run", job)
    advised = jobs.run("run", job, "--set", "on_error.max_failed_percent=99.5", "--json")

    assert (refused.code, again.code) == (5, 5), refused.err + again.err
    assert "where: in/a.csv, line 22, byte 187; kept in out/_batchpipe/" in again.err
    assert " 10 of 50 splits are kept" in refused.err
    assert "kept=10 " in again.err
    assert (advised.code, advised.manifest["accounts"]["written"]) == (0, 20), advised.err


def test_a_split_stops_itself_where_it_has_spent_what_the_splits_before_it_left(jobs: Jobs):
    for name in "abcd":  # so many are handed out at once: the next one is when one of them has settled
        jobs.write(f"in/{name}.csv", "n\n1\n30\n")
    jobs.write("in/e.csv", "n\n1\n" + "30\n" * 50)
    job = jobs.job("stages:no_high", on_error={"max_failed_records": 5}, **ONE_AFTER_THE_OTHER)

    refused = jobs.run("run", job)

    assert refused.code == 5, refused.err
    assert "failed for 6 records, 5 allowed" in refused.err
    (stopped,) = jobs.hidden("*/quarantine/split-00000004.jsonl")
    assert len(stopped.read_text().splitlines()) <= 5


BAD = {
    "a value of another type": ("csv", "n,text\n0,a\none,b\n2,c\n", "WrongType", "one,b\n", 3),
    "too many fields": ("csv", "n,text\n0,a\n1,b,c\n2,c\n", "Unparsable", "1,b,c\n", 3),
    "too few fields": ("csv", "n,text\n0,a\n1\n2,c\n", "Unparsable", "1\n", 3),
    "no JSON": ("jsonl", '{"n": 0}\n{"n": \n{"n": 2}\n', "Unparsable", '{"n": \n', 2),
    "JSON that is no object": ("jsonl", '{"n": 0}\n[1]\n{"n": 2}\n', "Unparsable", "[1]\n", 2),
    "a JSON value of another type": ("jsonl", '{"n": 0}\n{"n": "one"}\n{"n": 2}\n', "WrongType", '{"n": "one"}\n', 2),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_parsed_costs_one_row_and_lies_in_quarantine(jobs: Jobs, case: str):
    form, text, reason, row, line = BAD[case]
    jobs.write(f"in/a.{form}", text)
    on_error = {"max_failed_records": 1}

    ran = jobs.run(
        "run", jobs.job("stages:no_high", input={"format": form, "types": {"n": "int64"}}, on_error=on_error)
    )

    assert ran.code == 0, ran.err
    assert [record["n"] for record in jobs.records()] == [0, 2]
    (path,) = jobs.hidden("*/quarantine/*")
    (kept,) = map(json.loads, path.read_text().splitlines())
    assert (kept["stage"], kept["reason"], kept["payload"]) == ("read", reason, row)
    assert (kept["record"], kept["line"], kept["offset"]) == (1, line, text.index(row))
