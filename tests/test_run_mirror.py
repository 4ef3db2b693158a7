"""`layout: mirror`: one output object for each input object, records in input order, however it was cut."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs, stop_at_an_obstacle, until

SLOW = """
import pandas as pd

def slow(frame: pd.DataFrame):
    if frame.n.max() >= 900:
        (HERE / "began").touch()
        wait_for("go")
    return frame
"""
MIRROR: dict[str, Any] = {"format": "csv", "layout": "mirror"}
SPLITS: dict[str, Any] = {"split_mb": 0.002}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + SLOW)
        jobs.write("in/deep/big.csv", csv_rows(600))
        jobs.write("in/empty.csv", "")
        jobs.write("in/more.csv", csv_rows(600, 400))
        jobs.write("in/small.csv", csv_rows(2))
        yield jobs


def answers(count: int, first: int = 0) -> bytes:
    return b'"n","text"\n' + b"".join(b'%d,"row %d"\n' % (n, n) for n in range(first, first + count))


EXPECTED = {
    "deep/big.csv.out": answers(600),
    "empty.csv.out": answers(0),
    "more.csv.out": answers(600, 400),
    "small.csv.out": answers(2),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_object_has_one_answer_whose_pieces_are_joined_in_order(jobs: Jobs, workers: int):
    ran = jobs.run("run", jobs.job(output=MIRROR, batch=SPLITS, compute={"workers": workers}), "--json")

    assert ran.code == 0, ran.err
    assert ran.manifest["splits"] > 8
    assert jobs.part_bytes() == EXPECTED
    parts = {part["uri"]: (part["records"], part["splits"]) for part in jobs.table("parts")}
    assert parts["deep/big.csv.out"][0] == 600
    assert parts["deep/big.csv.out"][1][0] < parts["deep/big.csv.out"][1][1]
    assert not jobs.hidden("*/pieces") + jobs.hidden("*/pending")
    assert jobs.run("verify", jobs.out).code == 0


def test_compressed_pieces_are_joined_to_one_compressed_object(jobs: Jobs):
    ran = jobs.run("run", jobs.job(output={**MIRROR, "compression": "gzip"}, batch=SPLITS))

    assert ran.code == 0, ran.err
    assert {name: gzip.decompress(data) for name, data in jobs.part_bytes().items()} == {
        f"{name}.gz": data for name, data in EXPECTED.items()
    }


def test_G4_a_killed_run_resumes_and_joins_old_and_new_pieces(jobs: Jobs):
    job = jobs.job("stages:slow", output=MIRROR, batch=SPLITS)
    run = jobs.start("run", job)
    until((jobs.folder / "began").exists, within_s=60)
    until(lambda: '"split"' in "".join(path.read_text() for path in jobs.hidden("*/journal/0*.jsonl")))
    run.kill()
    run.communicate()
    until(lambda: not jobs.processes())
    assert jobs.parts() == []
    jobs.write("go", "")

    again = jobs.run("run", job)

    assert (again.code, jobs.part_bytes()) == (0, EXPECTED), again.err


def test_G2_a_commit_that_failed_half_way_is_finished_by_the_next_start(jobs: Jobs):
    job = jobs.job("stages:slow", output=MIRROR, batch=SPLITS)
    err = stop_at_an_obstacle(jobs, job, "more.csv.out")
    assert "error: cannot publish 'more.csv.out': the output holds an object of that name" in err
    assert "move it away and run the same command again" in err

    again = jobs.run("run", job)

    assert (again.code, jobs.part_bytes()) == (0, EXPECTED), again.err
    assert jobs.run("verify", jobs.out).code == 0


def test_pieces_that_are_gone_while_it_was_published_are_made_anew(jobs: Jobs):
    """Those that were joined as well as those that they were joined of."""
    job = jobs.job("stages:slow", output=MIRROR, batch=SPLITS)
    stop_at_an_obstacle(jobs, job, "more.csv.out")
    lost = [*jobs.hidden("*/pending/*"), *jobs.hidden("*/pieces/*")]
    assert len(lost) > 5
    for piece in lost:
        piece.unlink()

    again = jobs.run("run", job)

    assert (again.code, jobs.part_bytes()) == (0, EXPECTED), again.err
    assert jobs.run("verify", jobs.out).code == 0


def test_an_answer_that_is_gone_is_told_whatever_order_names_have_and_made_anew(jobs: Jobs):
    """`small.csv` comes before `small.csv-2`, and its answer behind; `_part.csv` is named and no data of the output."""
    names = {"small.csv": 2, "small.csv-2": 3, "_part.csv": 4}
    for name, rows in names.items():
        jobs.write(f"in/{name}", csv_rows(rows))
    job = jobs.job(input={"uri": [f"in/{name}" for name in names]}, output=MIRROR)
    expected = {f"{name}.out": answers(rows) for name, rows in names.items()}
    assert jobs.run("run", job).code == 0
    assert "nothing to do" in jobs.run("run", job).out
    (jobs.out / "small.csv-2.out").unlink()

    refused, restarted = jobs.run("run", job), jobs.run("run", job, "--restart")

    assert (refused.code, "published: small.csv-2.out is missing\n" in refused.err) == (7, True), refused.err
    assert (restarted.code, jobs.part_bytes()) == (0, expected), restarted.err
