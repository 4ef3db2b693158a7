"""What is kept of records that failed for good: one line each, where it came from and why, and the user's traceback."""

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from batchpipe.batch import ByteRecords, MiniBatch, Origins
from batchpipe.manifest import Failure
from batchpipe.numbering import object_of
from batchpipe.quarantine import MAX_PAYLOAD_CHARACTERS, record_text
from batchpipe.split import InputObject
from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs, until
from tests.s3_server import S3Server

STAGES = """
import pandas as pd

def picky(frame: pd.DataFrame):
    for n in frame.n:
        if n % 40 == 7:
            raise KeyError(f"no {n}")
    return frame

def slow(frame: pd.DataFrame):
    if frame.n.max() >= 300:
        (HERE / "began").touch()
        wait_for("go")
    return picky(frame)

def tells(frame: pd.DataFrame):
    if 7 in set(frame.n):
        raise ValueError("denied: hunter2hunter2" + "." * 5000)
    return frame

def flaky(frame: pd.DataFrame):
    assert (HERE / "go").exists() or 57 not in set(frame.n), "not yet"
    return frame
"""
FEW = {"max_failed_records": 20}
FAILING = [7, 47, 87, 127, 167, 207, 247, 287, 327, 367]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + STAGES)
        yield jobs


def numbers(jobs: Jobs) -> list[tuple[str, int, int]]:
    return [(Path(line["object"]).name, line["record"], line["line"]) for line in jobs.quarantined()]


def test_a_line_says_which_record_failed_where_and_why(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(400))

    ran = jobs.run("run", jobs.job("stages:picky", on_error=FEW, batch={"split_mb": 0.001}))

    assert ran.code == 0, ran.err
    line = jobs.quarantined()[1]
    assert line.pop("location").rpartition("/")[2] == "stages.py:22 in picky"
    assert line == {
        **{"object": str(jobs.folder / "in/a.csv"), "version": str((jobs.folder / "in/a.csv").stat().st_mtime_ns)},
        **{"record": 47, "line": 49, "offset": 457, "range_start": 0, "ordinal": 47},
        **{"stage": "picky", "attempts": 1, "reason": "KeyError", "message": "'no 47'"},
        **{"payload": '{"n": 47, "text": "row 47"}', "traceback": "logs/tracebacks/split-00000000.txt"},
    }


def test_the_traceback_of_user_code_is_kept_once_for_each_kind_of_failure(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(60))

    ran = jobs.run("run", jobs.job("stages:picky", on_error=FEW))

    assert ran.code == 0, ran.err
    (path,) = jobs.hidden("*/logs/tracebacks/*")
    first, *traceback = path.read_text().splitlines()
    assert first == f"stage 'picky', {jobs.folder}/in/a.csv, byte 63: 2 records, of which this is the first"
    assert (traceback[0], traceback[-2]) == ("Traceback (most recent call last):", "KeyError: 'no 7'")
    assert '    raise KeyError(f"no {n}")' in traceback
    assert {line["traceback"] for line in jobs.quarantined()} == {"logs/tracebacks/split-00000000.txt"}


def test_G7_secrets_are_masked_in_messages_and_tracebacks(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(10))
    job = jobs.job("stages:tells", on_error=FEW, storage_options={"s3": {"secret": "hunter2hunter2"}})

    ran = jobs.run("run", job)

    assert ran.code == 0, ran.err
    assert jobs.quarantined()[0]["message"] == "denied: ***" + "." * 1_989
    (path,) = jobs.hidden("*/logs/tracebacks/*")
    assert "ValueError: denied: ***" in path.read_text()
    assert not [path for path in jobs.hidden("**/*") if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_failed_record_of_a_cut_object_has_its_record_and_line(jobs: Jobs, workers: int):
    jobs.write("in/a.csv", csv_rows(400))
    jobs.write("in/b.csv", csv_rows(5, 5))
    job = jobs.job("stages:picky", on_error=FEW, batch={"split_mb": 0.0005}, compute={"workers": workers})

    ran = jobs.run("run", job)

    assert ran.code == 0, ran.err
    assert len(jobs.hidden("*/quarantine/*")) > 3
    assert numbers(jobs) == [*(("a.csv", n, n + 2) for n in FAILING), ("b.csv", 2, 4)]


def test_small_objects_of_one_split_and_compressed_ones_have_their_lines_too(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(10))
    jobs.write("in/b.csv.gz", gzip.compress(csv_rows(50).encode()))
    jobs.write("in/c.csv", csv_rows(10, 5))

    ran = jobs.run("run", jobs.job("stages:picky", on_error=FEW))

    assert ran.code == 0, ran.err
    assert numbers(jobs) == [("a.csv", 7, 9), ("b.csv.gz", 7, 9), ("b.csv.gz", 47, 49), ("c.csv", 2, 4)]


def test_a_line_is_that_of_the_file_where_values_hold_newlines(jobs: Jobs):
    jobs.write("in/a.csv", "n,text\n" + "".join(f'{n},"two\nlines"\n' for n in range(60)))

    ran = jobs.run("run", jobs.job("stages:picky", on_error=FEW))

    assert ran.code == 0, ran.err
    assert numbers(jobs) == [("a.csv", 7, 16), ("a.csv", 47, 96)]


def test_pandas_reads_a_file_and_several_of_them_in_one_line(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(400))
    ran = jobs.run("run", jobs.job("stages:picky", on_error=FEW, batch={"split_mb": 0.001}))
    assert ran.code == 0, ran.err
    paths = jobs.hidden("*/quarantine/*.jsonl")

    one = pd.read_json(paths[0], lines=True)
    every = pd.concat(pd.read_json(path, lines=True) for path in paths)

    assert one.reason.unique().tolist() == ["KeyError"]
    assert (every.record.tolist(), every.line.tolist()) == (FAILING, [n + 2 for n in FAILING])


def test_records_beyond_the_budget_are_numbered_and_named_before_the_run_ends(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(400))

    ran = jobs.run("run", jobs.job("stages:picky", on_error={"max_failed_records": 3}, batch={"split_mb": 0.0005}))

    assert (ran.code, "in/a.csv, line 9, byte 63; kept in out" in ran.err) == (5, True), ran.err
    assert numbers(jobs) == [("a.csv", n, n + 2) for n in FAILING[:4]]


def test_G4_a_killed_run_resumes_to_the_same_quarantine(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(400))
    stages = [{"name": "picky", "callable": "stages:slow"}]
    job = jobs.job(stages, on_error=FEW, batch={"split_mb": 0.0005})
    run = jobs.start("run", job)
    until((jobs.folder / "began").exists, within_s=60)
    run.kill()
    run.communicate()
    jobs.write("go", "")

    resumed = jobs.run("run", job, "--wait", "30")
    killed = {path.name: path.read_text() for path in jobs.hidden("*/quarantine/*")}
    jobs.out = jobs.folder / "again"
    again = jobs.run("run", job, "--set", "output.uri=again")

    assert (resumed.code, again.code) == (0, 0), resumed.err + again.err
    assert killed == {path.name: path.read_text() for path in jobs.hidden("*/quarantine/*")}
    assert [n for _, n, _ in numbers(jobs)] == FAILING


def test_a_record_that_is_answered_in_the_end_is_not_in_quarantine_any_more(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))
    job = jobs.job("stages:flaky", batch={"split_mb": 0.0002})
    refused = jobs.run("run", job)
    kept = numbers(jobs)
    jobs.write("go", "")

    done = jobs.run("run", job, "--json")

    assert (refused.code, kept) == (5, [("a.csv", 57, 59)]), refused.err
    assert (done.code, done.manifest["accounts"]["written"]) == (0, 100), done.err
    assert jobs.hidden("*/quarantine/*") + jobs.hidden("*/logs/tracebacks/*") == []


def test_an_object_whose_address_holds_a_secret_is_found_by_what_a_failure_says_of_it():
    signed, other = (
        InputObject(place, f"https://me:pw@h/a.csv?sig={place}", 10, version) for place, version in enumerate("vw")
    )
    failure = Failure("https://h/a.csv", "w", 0, 0, 4, "stage", "ValueError", "")

    assert object_of(failure, [signed, other]) is other
    assert object_of(failure, [signed]) is None


def test_the_quarantine_of_an_s3_output_is_numbered(jobs: Jobs, s3_server: S3Server, bucket: str):
    jobs.write("in/a.csv", csv_rows(400))
    options = {"s3": s3_server.storage_options}
    output = {"uri": f"s3://{bucket}/out", "storage_options": options}

    ran = jobs.run("run", jobs.job("stages:picky", on_error=FEW, batch={"split_mb": 0.0005}, output=output))

    assert ran.code == 0, ran.err
    found = s3_server.client.list_objects_v2(Bucket=bucket, Prefix="out/_batchpipe/")["Contents"]
    keys = [each["Key"] for each in found if "/quarantine/" in each["Key"]]
    bodies = [s3_server.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
    lines = [json.loads(line)["line"] for body in bodies for line in body.splitlines()]
    assert lines == [n + 2 for n in FAILING]
    assert not s3_server.client.list_multipart_uploads(Bucket=bucket).get("Uploads")


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_a_long_text_is_kept_up_to_a_character(character: str):
    kept = kept_of(("x" + character * 2 * MAX_PAYLOAD_CHARACTERS).encode())

    assert kept == "x" + character * (MAX_PAYLOAD_CHARACTERS - 1)


@pytest.mark.parametrize("record", [b"\xff" * 2 * MAX_PAYLOAD_CHARACTERS, b"caf\xe9", "é".encode()[:1]])
def test_bytes_that_are_no_text_are_kept_as_base64_within_the_limit(record: bytes):
    kept = kept_of(record)

    assert len(kept) <= MAX_PAYLOAD_CHARACTERS
    assert record.startswith(base64.b64decode(kept.removeprefix("base64:"), validate=True))
    assert len(kept) > min(len(record), MAX_PAYLOAD_CHARACTERS - 8)


def kept_of(record: bytes) -> str:
    origins = Origins.of_range(0, 0, np.zeros(1, np.int64))
    return record_text(MiniBatch(ByteRecords.of([record]), origins), 0)
