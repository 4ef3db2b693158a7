"""What the first mini-batch decides: the columns, also where its records fail, are dropped, or are not there at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest

from tests.jobs import ECHO, Jobs, csv_rows, open_jobs

PICKY = """
import pandas as pd

def picky(frame: pd.DataFrame, worst):
    assert frame.n.min() > worst, "too small"
    return frame
"""
FEW = """
import pandas as pd

def few(frame: pd.DataFrame):
    kept = (frame.n >= 90).to_numpy(bool)
    return frame[kept], kept
"""
DEADLY = """
import os, signal
import pandas as pd

def deadly(frame: pd.DataFrame):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", ECHO + PICKY + FEW)
        yield jobs


def picky(worst: int) -> list[dict[str, Any]]:
    return [{"callable": "stages:picky", "params": {"worst": worst}}]


def test_a_first_record_that_fails_within_the_budget_leaves_the_columns_to_the_rest(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(20))

    ran = jobs.run("run", jobs.job(picky(2), on_error={"max_failed_records": 3}), "--json")

    assert (ran.code, ran.manifest["accounts"]["quarantined"]) == (0, 3), ran.err
    assert jobs.records() == [{"n": n, "text": f"row {n}"} for n in range(3, 20)]


def test_a_first_record_that_fails_beyond_the_budget_ends_the_run_and_is_kept(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(20))

    ran = jobs.run("run", jobs.job(picky(0)))

    assert ran.code == 5
    assert "stage 'picky' failed for 1 record, 0 allowed: AssertionError: too small (stages.py:" in ran.err
    assert "where: in/a.csv, line 2, byte 7; kept in out/_batchpipe/" in ran.err
    (quarantine,) = jobs.hidden("*/quarantine/*.jsonl")
    assert pd.read_json(quarantine, lines=True).payload.tolist() == ['{"n": 0, "text": "row 0"}']


def test_a_first_mini_batch_without_one_answer_ends_the_run_whatever_the_budget(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(20))

    ran = jobs.run("run", jobs.job(picky(1000), on_error={"max_failed_percent": 100}))

    assert ran.code == 5
    assert "failed for the first records, and none is answered: AssertionError: too small" in ran.err
    assert "mend it and try one mini-batch: batchpipe check job.yaml" in ran.err


def test_a_first_mini_batch_beyond_the_budget_is_not_said_to_be_without_an_answer(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))
    stages = [*picky(3), {"callable": "stages:echo"}]

    ran = jobs.run("run", jobs.job(stages, on_error={"max_failed_records": 2}))

    assert ran.code == 5
    assert "stage 'picky' failed for 3 records, 2 allowed: AssertionError: too small (stages.py:" in ran.err
    assert "next:  allow it: batchpipe run job.yaml --set on_error.max_failed_records=10" in ran.err


@pytest.mark.parametrize(("worst", "first"), [(0, "0,fails"), (-1, "x,is no row")], ids=["fails", "is no row"])
def test_check_fails_where_the_first_mini_batch_is_beyond_the_budget_of_a_run(jobs: Jobs, worst: int, first: str):
    jobs.write("in/a.csv", f"n,text\n{first}\n1,is well\n")
    job = jobs.job(picky(worst), input={"uri": "in", "types": {"n": "int64"}})

    refused = jobs.run("check", job)
    allowed = jobs.run("check", job, "--set", "on_error.max_failed_records=1")

    assert (refused.code, allowed.code) == (5, 0), refused.err + allowed.err
    assert "failed for 1 record, 0 allowed: " in refused.err
    assert "next:  allow it: batchpipe run job.yaml --set on_error.max_failed_records=1" in refused.err
    assert "kept in" not in refused.err
    assert jobs.is_released()


def test_first_mini_batches_of_one_record_that_fail_cost_these_records_and_not_the_run(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(40))
    one_by_one = {"max_records": 1}

    ran = jobs.run("run", jobs.job(picky(11), on_error={"max_failed_percent": 50}, batch=one_by_one), "--json")

    assert ran.code == 0, ran.err
    assert ran.manifest["accounts"] == {"read": 40, "written": 28, "quarantined": 12, "dropped": 0}


def test_as_many_first_records_may_fail_as_the_job_allows_however_small_mini_batches_are(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))
    job = jobs.job(picky(39), on_error={"max_failed_records": 39}, batch={"max_records": 10})

    refused, allowed = jobs.run("run", job), jobs.run("run", job, "--set", "on_error.max_failed_records=40")

    assert (refused.code, "failed for the first records, and none is answered" in refused.err) == (5, True), refused.err
    assert (allowed.code, len(jobs.records())) == (0, 60), allowed.err


def test_more_is_not_offered_to_be_allowed_than_is_tried(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(1_100))

    refused = jobs.run("run", jobs.job(picky(2_000), on_error={"max_failed_records": 1_000}))

    assert refused.code == 5
    assert refused.err.endswith("next:  mend it and try one mini-batch: batchpipe check job.yaml\n")


@pytest.mark.parametrize("rows", [2, 20, 5_000])
def test_a_stage_that_fails_for_every_record_is_said_to_do_so_though_no_record_may_fail(jobs: Jobs, rows: int):
    jobs.write("in/a.csv", csv_rows(rows))

    ran, checked = (jobs.run(verb, jobs.job(picky(10_000))) for verb in ("run", "check"))

    for told in (ran, checked):
        assert told.code == 5
        assert "stage 'picky' failed for the first records, and none is answered: AssertionError: too small" in told.err
        assert "where: in/a.csv, line 2, byte 7" in told.err
        assert "next:  mend it and try one mini-batch: batchpipe check job.yaml; or, if those behind" in told.err
    (quarantine,) = jobs.hidden("*/quarantine/*.jsonl")
    assert len(quarantine.read_text().splitlines()) == min(rows, 16)


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize("limit", [0, 5])
def test_the_stage_that_fails_for_most_of_the_first_records_is_named(jobs: Jobs, verb: str, limit: int):
    """Not the row that cannot be read, nor the stage that fails for one record before it."""
    jobs.write("in/a.csv", "n,text\n1,2,3\n" + csv_rows(100).partition("\n")[2])
    stages = [*picky(0), {"name": "model", "callable": "stages:picky", "params": {"worst": 10_000}}]
    job = jobs.job(stages, input={"uri": "in", "types": {"n": "int64"}}, on_error={"max_failed_records": limit})

    told = jobs.run(verb, job)

    assert told.code == 5
    assert "stage 'model' failed for the first records, and none is answered: AssertionError" in told.err
    assert "where: in/a.csv, line 4, " in told.err
    assert "allow it: batchpipe run job.yaml --set on_error.max_failed_records=100" in told.err


def test_records_that_take_long_to_fail_are_not_gathered_beyond_the_budget(jobs: Jobs):
    jobs.write("stages.py", ECHO + DEADLY)
    jobs.write("in/a.csv", csv_rows(100))
    job = jobs.job("stages:deadly", on_error={"max_failed_records": 1})

    ran = jobs.run("run", job)

    assert ran.code == 5
    assert "stage 'deadly' failed for 2 records, 1 allowed: Killed: " in ran.err


def test_a_small_dataset_without_one_answer_ends_the_run_with_5_whatever_the_budget(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))

    ran = jobs.run("run", jobs.job(picky(1000), on_error={"max_failed_percent": 100}, batch={"max_records": 1}))

    assert (ran.code, "failed for the first records, and none is answered" in ran.err) == (5, True), ran.err


def test_a_large_first_mini_batch_without_one_answer_is_given_up_early(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(5_000))

    ran = jobs.run("run", jobs.job(picky(10_000), on_error={"max_failed_percent": 100}))

    assert ran.code == 5, ran.err
    (quarantine,) = jobs.hidden("*/quarantine/*.jsonl")
    assert len(quarantine.read_text().splitlines()) == 1_001


def test_first_rows_that_cannot_be_parsed_leave_the_columns_to_the_rest(jobs: Jobs):
    jobs.write("in/a.csv", "n,text\n" + "1,2,3\n" * 5 + csv_rows(20).partition("\n")[2])

    ran = jobs.run("run", jobs.job(on_error={"max_failed_records": 5}, batch={"max_records": 2}), "--json")

    assert (ran.code, ran.manifest["accounts"]["quarantined"]) == (0, 5), ran.err


def test_G1_mini_batches_that_are_dropped_whole_leave_the_columns_to_later_ones(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))
    few: list[dict[str, object]] = [{"callable": "stages:few", "may_drop": True}, {"callable": "stages:echo"}]

    ran = jobs.run("run", jobs.job(few, batch={"max_records": 10}), "--json")

    assert ran.code == 0, ran.err
    assert ran.manifest["accounts"] == {"read": 100, "written": 10, "quarantined": 0, "dropped": 90}
    assert [record["n"] for record in jobs.records()] == list(range(90, 100))


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [("n,text\n", None, ["n", "text"]), ("", {"score": "float64"}, ["score"]), (None, {"score": "float64"}, ["score"])],
    ids=["a header alone", "an empty file", "no file at all"],
)
def test_an_empty_dataset_has_one_part_for_its_columns(jobs: Jobs, rows, columns, expected):
    if rows is not None:
        jobs.write("in/a.csv", rows)
    job = jobs.job(input={"allow_empty": True}, output={"format": "parquet", "columns": columns})

    ran = jobs.run("run", job)

    assert ran.code == 0, ran.err
    assert [path.name for path in jobs.parts()] == ["part-00000000.parquet"]
    assert (ds.dataset(jobs.out).schema.names, ds.dataset(jobs.out).count_rows()) == (expected, 0)
    assert jobs.run("verify", jobs.out).code == 0


def test_an_empty_dataset_whose_columns_nobody_knows_has_no_part(jobs: Jobs):
    ran = jobs.run("run", jobs.job(input={"allow_empty": True}))

    assert (ran.code, jobs.parts()) == (0, []), ran.err


def test_check_names_the_first_record_that_fails_and_leaves_nothing(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))

    ran = jobs.run("check", jobs.job(picky(1000)))

    assert ran.code == 5
    assert "where: in/a.csv, line 2, byte 7" in ran.err
    assert not [path for path in jobs.out.rglob("*") if path.is_file()]
