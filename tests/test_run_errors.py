"""Bad input gets a clear answer, never a traceback: each exit code with the text that says what to do."""

import gzip
import io
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchpipe.errors import PoolError, StageStartError
from batchpipe.jobfile import load_job
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.processes import open_host
from batchpipe.stages.logs import tail
from batchpipe.summary import explain
from batchpipe.transform import run_splits
from tests.jobs import COMMAND, ECHO, Jobs, csv_rows, open_jobs

STAGES = """
import os, signal
from pathlib import Path
import pandas as pd

def no_57(frame: pd.DataFrame):
    assert 57 not in set(frame.n), "no 57"
    return frame

def appends(frame: pd.DataFrame):
    with open(Path(__file__).parent / "in" / "a.csv", "a") as file:
        file.write("9,x" + chr(10))
    return frame

def head(frame: pd.DataFrame):
    return frame.head(5)

def removes(frame: pd.DataFrame):
    (Path(__file__).parent / "in" / "a.csv").unlink(missing_ok=True)
    raise ValueError("no")

class Leaky:
    def __init__(self):
        raise RuntimeError(f"cannot log in with {os.environ['TOKEN']}")
    def __call__(self, frame):
        return frame

class Broken:
    def __init__(self):
        raise FileNotFoundError("model.bin")
    def __call__(self, frame):
        return frame
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", ECHO + STAGES)
        yield jobs


def parquet(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": range(rows)}), sink)
    return sink.getvalue()


CASES: dict[str, tuple[str, bytes | str, dict[str, Any], int, list[str]]] = {
    "nothing matches": ("other/a.csv", "", {}, 3, ["no input object matches 'in'", "input.allow_empty: true accepts"]),
    "output inside input": ("in/a.csv", "n\n1\n", {"output": {"uri": "in/out"}}, 2, ["'in/out' lies inside the input"]),
    "no module": ("in/a.csv", "n\n1\n", {"stages": "gone:echo"}, 2, ["No module named 'gone'", "where: looked in"]),
    "no attribute": ("in/a.csv", "n\n1\n", {"stages": "stages:ecko"}, 2, ["has no 'ecko'; did you mean 'echo'?"]),
    "constructor": (
        *("in/a.csv", "n\n1\n", {"stages": "stages:Broken"}, 4),
        ["stage 'Broken' did not start: FileNotFoundError: model.bin", "stages.py:35 in __init__"],
    ),
    "ragged row": (
        *("in/a.csv", csv_rows(10) + "1,2,3\n", {}, 5),
        ["reading failed for 1 record, 0 allowed: Unparsable: has 3 fields, the header has 2", "line 12, byte 87"],
    ),
    "bad JSON line": (
        *("in/a.jsonl", '{"n": 1}\n{"n": 2\n{"n": 3}\n', {"input": {"uri": "in", "format": "jsonl"}}, 5),
        ["Unparsable: is not JSON: ", "where: in/a.jsonl, line 2, byte 9"],
    ),
    "truncated Parquet": (
        *("in/a.parquet", parquet(1000)[:-40], {"input": {"uri": "in", "format": "parquet"}}, 3),
        ["cannot read 'in/a.parquet' as Parquet", "the object is truncated, corrupt or of another format"],
    ),
    "truncated gzip": (
        *("in/a.csv.gz", gzip.compress(csv_rows(10_000).encode())[:-300], {}, 3),
        ["cannot read 'in/a.csv.gz': its gzip data are truncated or corrupt", "write the object again"],
    ),
    "changed while read": (
        *("in/a.csv", csv_rows(100), {"stages": "stages:appends"}, 3),
        [
            "cannot read 'in/a.csv': it changed since it was listed",
            "wait until nobody writes it, then run it again with --restart",
        ],
    ),
    "short answer": (
        *("in/a.csv", csv_rows(100), {"stages": "stages:head"}, 5),
        [
            "100 sent; to drop records state may_drop: true and return (result, kept) (stages.py:",
            "and the 99 sent with it, in split 0",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told_with_its_exit_code(jobs: Jobs, case: str):
    name, content, blocks, code, texts = CASES[case]
    jobs.write(name, content)

    ran = jobs.run("run", jobs.job(**blocks))

    assert ran.code == code, ran.err
    assert [text for text in texts if text not in ran.err] == [], ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert jobs.is_released()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "job.yaml: there is no such job file"),
        ("input: {uri: in}\nstages: []\noutput: {uri: out, formatt: csv}\n", "unknown key; did you mean 'format'?"),
        ("input: {uri: [3]}\nstages: [{callable: 'a:b'}]\noutput: {uri: out}\n", "job.yaml:1: input.uri"),
    ],
)
def test_a_wrong_job_file_is_2_and_names_the_place(jobs: Jobs, content: str | None, text: str):
    if content is not None:
        jobs.write("job.yaml", content)

    ran = jobs.run("run", "job.yaml")

    assert (ran.code, text in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("verb", ["run", "redrive"])
@pytest.mark.parametrize("run_id", ["a b/c", "..", "", "lock", "x" * 101])
def test_a_run_id_that_can_be_no_folder_is_2_and_says_what_it_may_be(jobs: Jobs, verb: str, run_id: str):
    ran = jobs.run(verb, jobs.job(), "--run-id", run_id)

    assert (ran.code, jobs.out.exists()) == (2, False)
    assert ran.err.startswith(f"error: the run id {run_id!r} cannot be the name of the run's folder\n")
    assert "  next:  give --run-id 1 to 100 letters, digits and . _ - : +, a letter or digit first" in ran.err


def test_a_run_id_of_airflow_is_taken(jobs: Jobs):
    jobs.write("in/a.csv", "n\n1\n")

    ran = jobs.run("run", jobs.job(), "--run-id", "scheduled__2024-01-31T00:00:00+00:00")

    assert (ran.code, len(jobs.records())) == (0, 1), ran.err


def test_an_error_is_one_json_object_where_asked_for(jobs: Jobs):
    ran = jobs.run("run", jobs.job(), "--json")

    document = json.loads(ran.out)
    assert (ran.code, document["exit_code"]) == (3, 3)
    assert document["error"].startswith("no input object matches ")
    assert "error: no input object matches 'in'" in ran.err


@pytest.mark.parametrize("form", ["--json", "-v"])
def test_a_full_disk_behind_stdout_is_no_defect(jobs: Jobs, form: str):
    jobs.write("in/a.csv", csv_rows(3))
    with Path("/dev/full").open("w") as full:
        command = [*COMMAND, "run", str(jobs.job()), form, "--progress=none"]
        ran = subprocess.run(
            command, cwd=jobs.folder, env=jobs.environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert (ran.returncode, len(jobs.records())) == (7, 3)
    assert ran.stderr == (
        "error: what the command has to say could not be printed: No space left on device\n"
        "  where: stdout\n"
        "  next:  send it where there is room; a run that is done is not run again\n"
    )


@pytest.mark.parametrize(
    ("progress", "stderr"), [("auto", "closed"), ("log", "full"), ("log", "unread"), ("bar", "full")]
)
def test_progress_that_nobody_can_read_ends_no_run(jobs: Jobs, progress: str, stderr: str):
    jobs.write("in/a.csv", csv_rows(3))
    command = [*COMMAND, "run", str(jobs.job()), "--json", f"--progress={progress}"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as unread, Path("/dev/full").open("wb") as full:
        ran = subprocess.run(
            command,
            cwd=jobs.folder,
            env=jobs.environment,
            stdout=subprocess.PIPE,
            stderr=full if stderr == "full" else unread,
            preexec_fn=(lambda: os.close(2)) if stderr == "closed" else None,
            check=False,
        )

    assert (ran.returncode, len(jobs.records())) == (0, 3)
    assert json.loads(ran.stdout)["accounts"]["written"] == 3


def test_error_that_nobody_can_read_keeps_its_exit_code(jobs: Jobs):
    with Path("/dev/full").open("wb") as full:
        command = [*COMMAND, "run", str(jobs.job())]
        ran = subprocess.run(command, cwd=jobs.folder, env=jobs.environment, stderr=full, check=False)

    assert ran.returncode == 3


def test_working_directory_that_was_removed_is_told(jobs: Jobs, tmp_path: Path):
    jobs.write("in/a.csv", csv_rows(3))
    job = jobs.job()
    command = f'cd "{tmp_path}" && mkdir gone && cd gone && rmdir ../gone && {" ".join(COMMAND)} run "{job}"'
    ran = subprocess.run(["sh", "-c", command], env=jobs.environment, capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (
        2, "error: the working directory was removed\n  next:  change to one that exists: cd\n"
    )  # fmt: skip


def test_every_uri_of_a_list_must_match_something(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))
    path = jobs.job(input={"uri": ["in/*.csv", "in/b.csv"]})
    ran = jobs.run("run", path)
    allowed = jobs.run("run", path, "--set", "input.allow_empty=true")

    assert (ran.code, allowed.code) == (3, 0)
    assert "error: no input object matches 'in/b.csv'" in ran.err


@pytest.mark.parametrize("allow_empty", [False, True])
def test_web_server_that_cannot_be_reached_or_fails_is_no_empty_input(jobs: Jobs, allow_empty: bool):
    class Fails(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503 if "503" in self.path else 404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    told = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Fails) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://user:s3cr3t-pass@127.0.0.1:{server.server_port}"
        for uri in (f"{address}/503.csv", "http://127.0.0.1:9/x.csv", f"{address}/404.csv"):
            ran = jobs.run("run", jobs.job(input={"uri": uri, "allow_empty": allow_empty}))
            told.append((ran.code, ran.err.splitlines()[-2:] if ran.code else []))
        server.shutdown()

    (failed, why), (dead, refused), (missing, _) = told
    assert (failed, dead, missing) == (3, 3, 0 if allow_empty else 3)
    assert "error: cannot read 'http://127.0.0.1" in why[0]
    assert "503" in why[0]
    assert "error: cannot read 'http://127.0.0.1:9/x.csv': " in "".join(refused)
    assert "s3cr3t-pass" not in str(told)


@pytest.mark.parametrize(("closed", "rows", "code"), [(1, 3, 0), (2, 0, 3)])
def test_a_stream_that_is_closed_changes_no_exit_code(jobs: Jobs, closed: int, rows: int, code: int):
    if rows:
        jobs.write("in/a.csv", csv_rows(rows))
    command = [*COMMAND, "run", str(jobs.job()), "--progress=none"]

    ran = subprocess.run(
        command, cwd=jobs.folder, env=jobs.environment, check=False, preexec_fn=lambda: os.close(closed)
    )

    assert (ran.returncode, len(jobs.parts()) > 0) == (code, rows > 0)


def test_a_defect_says_how_to_see_where_it_is_whatever_the_command(jobs: Jobs):
    jobs.write("out/_batchpipe/manifest.json", "{}")

    told, shown = jobs.run("show", "out"), jobs.run("-v", "show", "out")

    assert (told.code, shown.code) == (1, 1)
    assert told.err.endswith("\n  next:  this is a defect of batchpipe; `batchpipe -v ...` shows where\n")
    assert ("Traceback" in told.err, "Traceback" in shown.err) == (False, True)


def test_a_failed_record_is_named_and_can_be_allowed_by_the_command_that_the_error_names(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))
    refused = jobs.run("run", jobs.job("stages:no_57", batch={"split_mb": 0.0002}))

    assert refused.code == 5
    assert "error: stage 'no_57' failed for 1 record, 0 allowed: AssertionError: no 57 (stages.py:" in refused.err
    assert "where: in/a.csv, line 59, byte 557; kept in out/_batchpipe/" in refused.err
    told = re.search(r"allow it and resume, (\d) of 5 splits are kept: batchpipe run job.yaml --set ", refused.err)
    assert told
    advised = refused.err.partition("are kept: batchpipe ")[2].split()
    allowed = jobs.run(*advised)

    assert allowed.code == 0, allowed.err
    assert f" kept={told[1]} " in allowed.err
    assert "99 written + 1 quarantined + 0 dropped" in allowed.out
    (quarantine,) = jobs.hidden("*/quarantine/*.jsonl")
    kept = pd.read_json(quarantine, lines=True).iloc[0]
    assert (kept.stage, kept.offset, json.loads(kept.payload)) == ("no_57", 557, {"n": 57, "text": "row 57"})
    assert jobs.run("verify", jobs.out).code == 0


def test_failures_of_reading_and_of_a_stage_are_told_side_by_side(jobs: Jobs):
    jobs.write("in/a.csv", "n,text\n1,a,x\n2,b,x\n57,c\n")
    told = jobs.run("run", jobs.job("stages:no_57"))

    assert told.code == 5
    assert re.search(
        r"error: \d records failed, 0 allowed; first of each: reading: Unparsable: has 3 fields, the header has 2;"
        r" stage 'no_57': AssertionError: no 57 \(stages.py:\d+ in no_57\)",
        told.err,
    ), told.err


def test_a_failed_record_whose_object_is_gone_is_told_without_its_line(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))
    told = jobs.run("run", jobs.job("stages:removes"))

    assert told.code == 5, told.err
    assert "error: stage 'removes' failed for the first records, and none is answered: ValueError: no (" in told.err
    assert "where: in/a.csv, record 0, byte 7; kept in out/_batchpipe/" in told.err


def test_G7_what_a_constructor_says_is_masked(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))
    job = jobs.job("stages:Leaky", storage_options={"s3": {"secret": "key=${TOKEN};x"}})
    told = jobs.run("run", job, TOKEN="wholesecret9876")

    assert told.code == 4
    assert "did not start: RuntimeError: cannot log in with ***" in told.err
    assert "wholesecret9876" not in told.err + told.out


def test_an_object_whose_name_is_not_utf_8_is_refused_by_name(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))
    (jobs.folder / "in/a.csv").rename(jobs.folder / "in" / os.fsdecode(b"caf\xe9.csv"))
    told = jobs.run("run", jobs.job())

    assert told.code == 3
    assert "error: the name of an input object is not UTF-8: " in told.err
    assert "caf\\\\xe9.csv" in told.err
    assert "next:  rename it" in told.err


def test_the_command_that_an_error_names_is_that_of_the_same_run(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))
    job = jobs.job("stages:no_57", output={"uri": "out/${part}", "format": "parquet"})
    given = ["--var", "part=a", "--run-id", "mine", "--set", "batch.split_mb=0.0002"]
    refused = jobs.run("run", job, *given)
    advised = refused.err.partition(": batchpipe ")[2].split()
    allowed = jobs.run(*advised)

    assert (refused.code, allowed.code) == (5, 0), refused.err + allowed.err
    assert advised == ["run", "job.yaml", "--set", "batch.split_mb=0.0002", "--var", "part=a", "--run-id", "mine",
                       "--set", "on_error.max_failed_records=1"]  # fmt: skip
    assert " run=mine " in allowed.err


def test_a_stage_that_was_asked_again_and_again_may_not_be_there(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))
    stage = {"endpoint": {"url": "http://127.0.0.1:9/"}, "content_type": "text/csv", "invocations_max_retries": 1}

    ran = jobs.run("run", jobs.job([stage], batch={"max_records": 1}))

    assert ran.code == 5, ran.err
    assert "next:  see that it answers and run again; or allow it: batchpipe run job.yaml --set" in ran.err


def test_a_budget_of_records_that_is_exceeded_is_5_again(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(60) + csv_rows(60, 57).partition("\n")[2])

    ran = jobs.run("run", jobs.job("stages:no_57", on_error={"max_failed_records": 1}))

    assert (ran.code, "failed for 2 records, 1 allowed" in ran.err) == (5, True), ran.err


def test_a_full_disk_is_7_and_the_run_resumes_when_there_is_room(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(20_000))
    jobs.out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=480k", "tmpfs", jobs.out], check=True)
    try:
        full = jobs.run("run", jobs.job(batch={"split_mb": 0.05}))
        subprocess.run(["mount", "-o", "remount,size=4m", jobs.out], check=True)
        resumed = jobs.run("run", jobs.job(batch={"split_mb": 0.05}))
        written = len(jobs.records())
    finally:
        subprocess.run(["umount", jobs.out], check=True)

    assert (full.code, "no space left on the device" in full.err) == (7, True), full.err
    assert "free some space there, then run the same command again: it resumes" in full.err
    assert (resumed.code, written) == (0, 20_000), resumed.err
    assert "kept=0" not in resumed.err


@pytest.mark.parametrize("size", ["8k", "192k"])
def test_a_full_temporary_folder_is_6_and_the_run_resumes_when_there_is_room(jobs: Jobs, size: str):
    """Full at the very start, and full of what the driver spools of settled splits."""
    jobs.write("in/a.csv", csv_rows(40_000))
    job = jobs.job(batch={"split_mb": 0.0005})
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", jobs.temporary], check=True)
    try:
        full = jobs.run("run", job)
        left = jobs.left()
        subprocess.run(["mount", "-o", "remount,size=8m", jobs.temporary], check=True)
        resumed = jobs.run("run", job)
    finally:
        subprocess.run(["umount", jobs.temporary], check=True)

    assert (full.code, left) == (6, []), full.err
    assert "error: the temporary folder is full: No space left on device\n  where: tmp on " in full.err
    assert "next:  make room there, or run the same command with TMPDIR=/a/larger/disk before it" in full.err
    assert (resumed.code, len(jobs.records())) == (0, 40_000), resumed.err
    assert ("kept=0" in resumed.err) is (size == "8k")


def test_where_there_is_no_temporary_folder_that_is_6(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    with pytest.raises(PoolError, match="there is no temporary folder: No such file") as error, open_host():
        pass

    assert error.value.where.startswith(str(tmp_path / "gone"))
    assert error.value.next == "make one, or run the same command with TMPDIR=/a/folder before it"


def test_a_summary_names_each_reason_of_the_failed_records_and_the_first_where_they_are_many(jobs: Jobs):
    wrong = ["1,a,b", "2,a,b", "x,a"]
    jobs.write("few/a.csv", csv_rows(9) + "\n".join(wrong) + "\n")
    many = jobs.write("many/a.csv", csv_rows(9) + "\n".join(wrong * 5) + "\n").parent
    job = jobs.job(input={"uri": "few", "types": {"n": "int64"}}, on_error={"max_failed_records": 100})

    of_few = jobs.run("run", job)
    of_many = jobs.run("run", job, f"--set=input.uri={many}", "--set=output.uri=other")
    one = jobs.write("one/a.csv", csv_rows(9) + wrong[0]).parent
    of_one = jobs.run("run", job, f"--set=input.uri={one}", "--set=output.uri=third")

    assert re.search(r"^  failed     3 records  2 Unparsable in read, 1 WrongType in read  out/", of_few.out, re.M)
    assert re.search(r"^  failed    15 records  first: Unparsable in read  other/", of_many.out, re.M)
    assert re.search(r"^  failed     1 record   Unparsable in read  third/", of_one.out, re.M), of_one.out


def test_a_summary_says_how_worker_time_is_meant(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(3))

    ran = jobs.run("run", jobs.job())

    assert re.search(r"^  time .*  \(1 worker, 2 splits at a time on each, \d+\.\d s over all splits\)$", ran.out, re.M)


def test_the_lines_of_a_log_are_told_below_one_another():
    log = tail("starts\n        deeper\nends", frozenset(), "logs/model.log")

    told = explain(StageStartError("stage 'model' did not start", log=log), Path("/"))

    assert told == (
        "error: stage 'model' did not start\n"
        "  log:   starts\n"
        "                 deeper\n"
        "         ends\n"
        "         (last 3 of 3 lines; all in logs/model.log)"
    )


def test_a_worker_of_another_version_is_refused(jobs: Jobs):
    place = Place(load_job(jobs.job()), "r1", "part-", "a1")

    with pytest.raises(PoolError, match=r"a worker runs batchpipe \S+, the driver 0\.0\.7") as caught:
        run_splits((), Orders(place, Schemas(), version="0.0.7"))
    assert caught.value.next == "install batchpipe 0.0.7 where the workers run"
