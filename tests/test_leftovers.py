"""What a power cut or an obstacle leaves: listed by `ps`, removed by `clean`, finished by whoever runs next."""

import contextlib
import fcntl
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchpipe.journal import open_journal
from batchpipe.leftovers import clean_output, find_in_output
from batchpipe.runs import RunFolder, iter_pending
from batchpipe.storage import Store, open_store
from tests.jobs import ECHO, GATE, NO_ENGINE, Jobs, csv_rows, stop_at_an_obstacle, until
from tests.s3_server import S3Server

STAGES = """
import pandas as pd

def gated(frame: pd.DataFrame):
    if frame.n.min() >= 600:
        (HERE / "began").touch()
        wait_for("go")
    return frame

def negated(frame: pd.DataFrame):
    return gated(frame).assign(n=frame.n.where(frame.n < 600, -frame.n))
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path)
    jobs.write("stages.py", GATE + ECHO + STAGES)
    jobs.write("in/a.csv", csv_rows(600))
    jobs.write("in/b.csv", csv_rows(600, 600))
    yield jobs
    jobs.write("go", "")
    jobs.end()


def gated_job(jobs: Jobs, **output: str) -> Path:
    return jobs.job("stages:gated", batch={"split_mb": 0.001}, output=output)


def cut_power(jobs: Jobs) -> None:
    """Kill every process of the run at once, its watcher among them."""
    jobs.start("run", gated_job(jobs))
    until((jobs.folder / "began").exists)
    for process in jobs.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    until(lambda: not jobs.processes())


def test_what_a_power_cut_leaves_is_listed_cleaned_and_the_run_resumes(jobs):
    cut_power(jobs)

    listed = jobs.run("ps", "out", PATH=NO_ENGINE).out
    assert "scratch    orphan" in listed
    assert re.search(r"^run        unfinished \w{8} ", listed, re.M)
    assert "in use" not in listed
    cleaned = jobs.run("clean", "out", PATH=NO_ENGINE)

    assert "removed scratch" in cleaned.out
    assert jobs.is_released()
    assert jobs.hidden("*/journal/*")
    jobs.write("go", "")
    assert jobs.run("run", gated_job(jobs)).code == 0


def test_clean_drops_unfinished_runs_only_when_told_to(jobs):
    cut_power(jobs)

    cleaned = jobs.run("clean", "out", "--unfinished", PATH=NO_ENGINE)

    assert cleaned.code == 0
    assert re.search(r"^removed run        unfinished \w{8} ", cleaned.out, re.M)
    assert "in use" not in cleaned.out
    assert list(jobs.out.iterdir()) == []
    assert jobs.run("clean", "out", PATH=NO_ENGINE).out == "nothing to clean\n"


def test_where_there_is_nothing_that_is_said_and_nothing_made(jobs):
    listed, cleaned = jobs.run("ps", "out", PATH=NO_ENGINE), jobs.run("clean", "out", PATH=NO_ENGINE)

    assert (listed.out, cleaned.out, jobs.out.exists()) == ("nothing held\n", "nothing to clean\n", False)


def test_clean_removes_the_folder_that_a_late_writer_made_for_its_pieces(jobs):
    jobs.write("out/_batchpipe/late/pending/piece", "late")

    cleaned = jobs.run("clean", "out", PATH=NO_ENGINE)

    assert "removed piece      orphan" in cleaned.out
    assert list(jobs.out.iterdir()) == []


def test_clean_leaves_the_uploads_that_an_unfinished_run_names_whatever_a_late_writer_left(
    s3_server: S3Server, bucket: str
):
    root = f"s3://{bucket}/out"
    store, mine, late = (
        open_store(root, {"s3": s3_server.storage_options}),
        RunFolder(root, "mine"),
        f"{root}/_batchpipe/late",
    )
    with store.open_pending(f"{root}/part-00000000.csv", staging=mine / "pending", attempt="mine-1") as writer:
        writer.write(b"x")
        piece = writer.finish()
    journal = open_journal(store, mine / "journal")
    journal.append("split", split=0, piece=piece.to_json())
    journal.flush()
    store.put(f"{late}/pieces/split-0.csv", b"late")

    clean_output(store, root, drops_unfinished=False)

    assert [each.upload_id for each in iter_pending(store, mine)] == [piece.upload_id]
    assert list(store.iter_folder(late)) == []


def test_a_run_at_work_is_in_use_and_its_output_locked(jobs):
    jobs.start("run", gated_job(jobs))
    until((jobs.folder / "began").exists)

    listed = jobs.run("ps", "out", PATH=NO_ENGINE).out
    assert "scratch    in use" in listed
    assert "run        in use" in listed
    refused = jobs.run("clean", "out", PATH=NO_ENGINE)

    assert refused.code == 75
    assert "holds this output" in refused.err


def begun(root: str, options: dict[str, Any]) -> Store:
    """An output with the unfinished run `mine`."""
    store = open_store(root, options)
    journal = open_journal(store, RunFolder(root, "mine") / "journal")
    journal.append("start")
    journal.flush()
    return store


def states(store: Store, root: str) -> list[str]:
    return [found.state for found in find_in_output(store, root)]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_run_is_in_use_while_its_own_process_holds_the_output(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    root, options = str(tmp_path), dict[str, Any]()
    if kind == "s3":
        root = f"s3://{request.getfixturevalue('bucket')}/out"
        options = {"s3": request.getfixturevalue("s3_server").storage_options}
    store = begun(root, options)

    with store.lock(f"{root}/_batchpipe/lock", {"run": "mine"}):
        mine = states(store, root)
    with store.lock(f"{root}/_batchpipe/lock", {"run": "other"}):
        other = states(store, root)

    assert (mine, other, states(store, root)) == (["in use"], ["unfinished"], ["unfinished"])


def test_of_a_process_that_cannot_be_seen_the_lock_tells_whether_it_lives(tmp_path: Path):
    """As of one in a container, which has processes of its own."""
    root, lock = str(tmp_path), f"{tmp_path}/_batchpipe/lock"
    store = begun(root, {})
    store.put(lock, b'{"run": "mine", "host": "elsewhere"}')

    with Path(lock).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        alive = states(store, root)

    assert (alive, states(store, root)) == (["in use"], ["unfinished"])


def test_g2_a_run_that_had_begun_to_publish_is_finished_by_a_start_of_another_job(jobs):
    stop_at_an_obstacle(jobs, gated_job(jobs), "part-00000003.jsonl")

    second = jobs.run("run", gated_job(jobs), "--set", "output.format=csv")

    assert second.code == 7
    assert "the output holds the finished run" in second.err
    assert jobs.run("verify", "out").code == 0
    assert not jobs.hidden("*/journal/*")


def test_g2_a_run_that_had_begun_to_publish_is_finished_by_clean(jobs):
    stop_at_an_obstacle(jobs, gated_job(jobs), "part-00000003.jsonl")

    cleaned = jobs.run("clean", "out", "--unfinished", PATH=NO_ENGINE)

    assert (cleaned.code, cleaned.out) == (0, "nothing to clean\n")
    assert re.search(r"run \w{8} had begun to publish, and is finished$", cleaned.err, re.M)
    assert (jobs.run("verify", "out").code, len(jobs.records())) == (0, 1200)


@pytest.mark.parametrize("command", ["clean", "run --restart"])
def test_g2_a_run_that_lost_pieces_while_it_was_published_is_dropped_with_what_was(jobs, command: str):
    stop_at_an_obstacle(jobs, gated_job(jobs), "part-00000003.jsonl")
    lost = jobs.hidden("*/pending/*")
    assert lost
    assert len(jobs.parts()) > 3
    for piece in lost:
        piece.unlink()

    other = jobs.run("run", "job.yaml", "--set", "output.format=csv")
    if command == "clean":
        done = jobs.run("clean", "out", "--unfinished", PATH=NO_ENGINE)
        assert "pieces of it are gone: what it had published goes, too" in done.err
        assert not jobs.parts()
    else:
        done = jobs.run("run", "job.yaml", *command.split()[1:])

    assert (done.code, jobs.run("run", "job.yaml").code, len(jobs.records())) == (0, 0, 1200), done.err
    assert jobs.run("verify", "out").code == 0
    assert (other.code, "add --restart to drop it and begin anew" in other.err) == (2, True), other.err


def test_g2_of_objects_that_a_dropped_run_replaced_only_those_that_are_as_they_were_stay(jobs):
    jobs.write("in/c.csv", csv_rows(2))
    mirror = {"format": "csv", "layout": "mirror"}
    assert jobs.run("run", jobs.job(output=mirror)).code == 0
    before = jobs.part_bytes()
    jobs.write("in/d.csv", csv_rows(2))
    (jobs.folder / "began").unlink(missing_ok=True)
    job = jobs.job("stages:negated", output={**mirror, "if_exists": "replace"})
    stop_at_an_obstacle(jobs, job, "d.csv.out")
    assert jobs.part_bytes()["b.csv.out"] != before["b.csv.out"]
    for lost in jobs.hidden("*/pending/*"):
        lost.unlink()

    cleaned = jobs.run("clean", "out", "--unfinished", PATH=NO_ENGINE)

    assert (cleaned.code, "unfinished" in cleaned.out) == (0, True), cleaned.err
    assert jobs.part_bytes() == {name: before[name] for name in ("a.csv.out", "c.csv.out")}
    assert "b.csv.out is missing" in jobs.run("verify", "out").err
    assert (jobs.run("run", job).code, len(jobs.part_bytes())) == (0, 4)
    assert jobs.run("verify", "out").code == 0
