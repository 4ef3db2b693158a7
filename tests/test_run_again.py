"""Running again: nothing visible before commit (G2), one result for any number of starts (G3), the same bytes (G4)."""

import hashlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import ECHO, GATE, Jobs, csv_rows, until
from tests.opened_stage import SERVER

STAGES = """
import pandas as pd

def square(frame: pd.DataFrame, power=2):
    return frame.assign(square=frame.n**power)

def slow(frame: pd.DataFrame):
    if frame.n.min() >= 600:
        (HERE / f"began-{frame.n.min()}").touch()
        wait_for("go")
    return frame.assign(square=frame.n**2)

def stuck_early(frame: pd.DataFrame):
    (HERE / f"ran-{frame.n.min()}-{os.getpid()}").touch()
    if 0 < frame.n.min() < 150:
        wait_for("go")
    return frame.assign(square=frame.n**2)

def fragile(frame: pd.DataFrame):
    assert not (HERE / "broken").exists(), "the server is down"
    if frame.n.min() == 0:
        if (HERE / "tried").exists():
            wait_for("go")
        (HERE / "tried").touch()
    return frame
"""
SPLITS: dict[str, Any] = {"batch": {"split_mb": 0.001}, "output": {"format": "parquet"}}


def make(folder: Path) -> Jobs:
    jobs = Jobs(folder)
    jobs.write("stages.py", GATE + ECHO + STAGES)
    jobs.write("in/a.csv", csv_rows(600))
    jobs.write("in/b.csv", csv_rows(600, 600))
    return jobs


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = make(tmp_path)
    yield jobs
    jobs.end()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A finished run of `square` on one worker."""
    jobs = make(tmp_path_factory.mktemp("done"))
    ran = jobs.run("run", jobs.job("stages:square", **SPLITS), "--run-id", "first")
    assert ran.code == 0, ran.err
    yield jobs
    jobs.end()


def content(jobs: Jobs) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in jobs.part_bytes().items()}


def begun(jobs: Jobs) -> bool:
    """Whether half of the splits are settled and journaled, and the others wait for the file ``go``."""
    return any(jobs.folder.glob("began-*")) and len(entries(jobs, "split")) >= 4


def entries(jobs: Jobs, type_: str) -> list[dict[str, Any]]:
    """What the journal says of this type."""
    lines = [line for path in jobs.hidden("*/journal/0*.jsonl") for line in path.read_text().splitlines()]
    return [entry for entry in map(json.loads, lines) if entry["type"] == type_]


def test_G2_nothing_is_visible_while_a_run_goes_on_and_all_of_it_afterwards(jobs: Jobs):
    run = jobs.start("run", jobs.job("stages:slow", **SPLITS))
    until(lambda: begun(jobs), within_s=60)

    assert jobs.parts() == []
    assert not jobs.hidden("manifest.json")
    assert jobs.hidden("lock")
    jobs.write("go", "")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert jobs.parts()
    assert not jobs.hidden("lock")
    assert not jobs.hidden("*/pending") + jobs.hidden("*/journal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_G4_a_run_that_was_stopped_resumes_to_the_same_bytes(done: Jobs, jobs: Jobs, number: signal.Signals):
    job = jobs.job("stages:slow", **SPLITS)
    run = jobs.start("run", job)  # one worker: of two, one could get an early split behind one that waits
    until(lambda: begun(jobs), within_s=60)
    run.send_signal(number)
    run.communicate(timeout=10)
    until(lambda: not jobs.processes())
    assert jobs.parts() == []

    jobs.write("go", "")
    again = jobs.run("run", job, "--json", "--workers", "2")

    assert again.code == 0, again.err
    kept = int(again.err.partition("kept=")[2].split()[0])
    assert 4 <= kept < again.manifest["splits"]
    assert content(jobs) == content(done)


def test_G4_what_is_done_behind_a_range_that_hangs_is_not_done_again_after_a_kill(done: Jobs, jobs: Jobs):
    job = jobs.job("stages:stuck_early", **SPLITS)
    run = jobs.start("run", job, "--workers", "2")
    until(lambda: len(entries(jobs, "held")) >= 3, within_s=60)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=10)
    until(lambda: not jobs.processes())
    kept = {entry["split"] for type_ in ("held", "split") for entry in entries(jobs, type_)}
    before = set(jobs.folder.glob("ran-*"))

    jobs.write("go", "")
    again = jobs.run("run", job, "--workers", "2", "--json")

    assert again.code == 0, again.err
    firsts = {path.name.split("-")[1] for path in set(jobs.folder.glob("ran-*")) - before}
    assert len(kept) >= 3
    # The first record shows that the stage answers; its split may have waited behind one that hangs, too.
    assert len(firsts - {"0"}) == len(set(range(again.manifest["splits"])) - kept - {0})
    assert content(jobs) == content(done)


def test_a_start_whose_stage_is_broken_leaves_no_quarantine_with_what_was_held_back(jobs: Jobs):
    """Its first records fail, in splits that an earlier start has done: these are not what is quarantined."""
    jobs.write("in/b.csv", "n,text\n")
    jobs.write("in/a.csv", "n,text\n" + "".join(f"{n},{'x' * 100}\n" for n in range(200)))
    job = jobs.job("stages:fragile", **SPLITS, on_error={"max_failed_records": 1_000})
    run = jobs.start("run", job, "--workers", "2")
    until(lambda: len(entries(jobs, "held")) >= 2, within_s=60)  # the second split may be behind the first
    run.kill()
    run.communicate(timeout=10)
    until(lambda: not jobs.processes())
    jobs.write("go", "")

    jobs.write("broken", "")
    broken = jobs.run("run", job)
    (jobs.folder / "broken").unlink()
    again = jobs.run("run", job, "--json")

    assert (broken.code, again.code) == (5, 0), again.err
    assert "also for a record that it answered before: AssertionError: the server is down" in broken.err
    assert again.manifest["accounts"]["quarantined"] == 0
    assert jobs.hidden("*/quarantine/*") + jobs.hidden("*/logs/tracebacks/*") == []


def test_G1_a_resume_with_more_requests_in_flight_cuts_the_input_as_it_was_begun(jobs: Jobs):
    """How large splits are follows from it, but a run keeps its own: else its splits would be taken for others."""
    rows = {name: [f"{name}{n},{'x' * 90}" for n in range(80_000)] for name in "ab"}
    rows["b"][0] = "!status 400"  # the first record of a request is an order
    for name, each in rows.items():
        jobs.write(f"in/{name}.csv", "".join(f"{row}\n" for row in each))
    job = jobs.job(
        [{"name": "echo", "process": {"command": SERVER}, "content_type": "text/csv"}],
        input={"uri": "in", "header": False},
        batch={"max_payload_mb": 0.1, "max_concurrent_transforms": 2},
        output={"uri": "out", "format": "raw"},
    )
    settings = ["--set", "batch.max_concurrent_transforms=16", "--set", "on_error.max_failed_records=1"]

    began = jobs.run("run", job)
    kept = len(entries(jobs, "split"))
    replanned = jobs.run("plan", job, *settings)
    again = jobs.run("run", job, *settings, "--json")

    assert (began.code, again.code) == (5, 0), again.err
    assert 0 < kept < again.manifest["splits"]
    assert f"{again.manifest['splits']} splits" not in replanned.out
    assert again.manifest["accounts"] == {"read": 160_000, "written": 159_999, "quarantined": 1, "dropped": 0}
    assert b"".join(jobs.part_bytes().values()).decode().splitlines() == rows["a"] + rows["b"][1:]


@pytest.mark.parametrize(
    ("written", "said"), [(r'"splits":1\1', r"\d+ splits"), ('"unsaid":0', "other splits")], ids=["other", "unsaid"]
)
def test_a_run_that_was_cut_otherwise_is_not_resumed(jobs: Jobs, written: str, said: str):
    run = jobs.start("run", jobs.job("stages:slow", **SPLITS))
    until(lambda: begun(jobs), within_s=60)
    run.kill()
    run.communicate(timeout=10)
    until(lambda: not jobs.processes())
    [first] = [path for path in jobs.hidden("*/journal/0*.jsonl") if '"type":"start"' in path.read_text()]
    first.write_text(re.sub(r'"splits":(\d+)', written, first.read_text()))
    jobs.write("go", "")

    refused = jobs.run("run", jobs.job("stages:slow", **SPLITS))
    anew = jobs.run("run", jobs.job("stages:slow", **SPLITS), "--restart")

    assert (refused.code, anew.code) == (7, 0), refused.err
    assert re.search(rf"the unfinished run was cut into {said}, and would be cut into \d+ now", refused.err)
    assert "next:  resume it with the batchpipe that began it; or add --restart" in refused.err


@pytest.mark.parametrize("workers", ["2", "3"])
def test_G4_any_number_of_workers_writes_the_same_bytes(done: Jobs, jobs: Jobs, workers: str):
    ran = jobs.run("run", jobs.job("stages:square", **SPLITS), "--workers", workers)

    assert ran.code == 0, ran.err
    assert len(content(done)) > 8
    assert content(jobs) == content(done)


def test_G3_the_same_job_under_its_run_id_is_a_no_op(done: Jobs):
    before = content(done)

    again = done.run("run", "job.yaml", "--run-id", "first")

    assert (again.code, content(done)) == (0, before)
    assert "job first: done already at " in again.out
    assert "nothing to do" in again.out


def test_G3_another_job_under_a_finished_run_id_is_refused(done: Jobs):
    again = done.run("run", "job.yaml", "--run-id", "first", "--set", "stages.square.params.power=3")

    assert again.code == 2
    assert "error: run first is finished, and its job, inputs, code, images or models have changed since" in again.err
    assert "choose another --run-id, or leave it out" in again.err


def test_another_finished_run_in_the_output_is_not_overwritten_unasked(done: Jobs):
    again = done.run("run", "job.yaml", "--set", "stages.square.params.power=3")

    assert again.code == 7
    assert "error: the output holds the finished run first of " in again.err
    assert "choose another output.uri, or set output.if_exists: replace" in again.err


def test_G3_an_unfinished_run_of_another_job_names_what_changed_and_how_to_drop_it(jobs: Jobs):
    job = jobs.job("stages:slow", **SPLITS)
    run = jobs.start("run", job)
    until(lambda: begun(jobs), within_s=60)
    busy = jobs.run("run", job)
    run.kill()
    run.communicate()
    until(lambda: not jobs.processes())
    jobs.write("go", "")

    other = jobs.run("run", job, "--set", "batch.max_records=7")
    restarted = jobs.run("run", job, "--set", "batch.max_records=7", "--restart", "--json")

    assert busy.code == 75
    assert f"pid {run.pid}, since " in busy.err
    assert "--wait 600" in busy.err
    assert other.code == 2
    assert "of another job or input" in other.err
    assert "changed: job.batch.max_records was " in other.err
    assert "add --restart to drop it and begin anew" in other.err
    assert (restarted.code, restarted.manifest["accounts"]["written"]) == (0, 1200), restarted.err
    assert [path.name for path in jobs.hidden("*") if path.is_dir()] == [restarted.manifest["run_id"]]


def test_G3_changed_input_is_another_run(jobs: Jobs):
    job = jobs.job("stages:slow", **SPLITS)
    run = jobs.start("run", job, "--run-id", "nightly")
    until(lambda: begun(jobs), within_s=60)
    run.kill()
    run.communicate()
    until(lambda: not jobs.processes())
    jobs.write("in/c.csv", csv_rows(3))

    again = jobs.run("run", job, "--run-id", "nightly")

    assert again.code == 2
    assert "changed: inputs.objects was 2, is 3" in again.err
    assert re.search(
        r"changed: input: an object came, went or was written again \(listing was \w{12}, is \w{12}\)", again.err
    )


def test_waiting_for_the_lock_takes_over_when_the_other_run_has_ended(jobs: Jobs):
    job = jobs.job("stages:slow", **SPLITS)
    first = jobs.start("run", job)
    until(lambda: begun(jobs), within_s=60)
    second = jobs.start("run", job, "--wait", "60", "--json")

    jobs.write("go", "")
    first.communicate(timeout=60)
    out, err = second.communicate(timeout=60)

    assert (first.returncode, second.returncode) == (0, 0), err
    assert json.loads(out)["accounts"]["written"] == 1200


def test_replace_keeps_the_old_parts_until_the_new_manifest_names_others(done: Jobs, jobs: Jobs):
    job = jobs.job("stages:square", **{**SPLITS, "output": {"format": "parquet", "if_exists": "replace"}})
    first = jobs.run("run", job, "--json")
    old = set(content(jobs))

    second = jobs.run("run", job, "--set", "stages.square.params.power=3", "--json")

    assert (first.code, second.code) == (0, 0), second.err
    assert all(name.startswith(f"part-{second.manifest['run_id']}-") for name in content(jobs))
    assert old.isdisjoint(content(jobs))
    assert [path.name for path in jobs.hidden("*") if path.is_dir()] == [second.manifest["run_id"]]
    assert jobs.run("verify", jobs.out).code == 0


def spoil_missing(jobs: Jobs) -> str:
    jobs.parts()[3].unlink()
    return "part-00000003.parquet is missing"


def spoil_cut(jobs: Jobs) -> str:
    part = jobs.parts()[-1]
    size = part.stat().st_size
    part.write_bytes(part.read_bytes()[:-1])
    return f"{part.name} has {size - 1:,} bytes, published were {size:,}"


def spoil_table(jobs: Jobs) -> str:
    """As an unpublishing leaves it that was stopped just before its end."""
    for part in jobs.parts():
        part.unlink()
    (table,) = jobs.hidden("*/parts.jsonl")
    table.unlink()
    return f"{table.relative_to(jobs.out)} is missing"


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_cut, spoil_table])
def test_a_finished_output_that_lost_something_is_not_done_and_made_anew_when_told_to(
    done: Jobs, jobs: Jobs, spoil: Callable[[Jobs], str]
):
    job = jobs.job("stages:square", **SPLITS)
    assert jobs.run("run", job).code == 0
    damage = spoil(jobs)

    refused = jobs.run("run", job)
    restarted = jobs.run("run", job, "--restart")

    assert refused.code == 7
    assert re.search(rf"^error: the output is not what run \w+ published: {damage}\n  where: out\n", refused.err)
    next_ = f"put it back, or run the job again in its place: batchpipe run {job.name} --restart"
    assert f"  next:  {next_}\n" in refused.err
    assert (restarted.code, content(jobs)) == (0, content(done)), restarted.err
    assert "nothing to do" in jobs.run("run", job).out
    assert len([path for path in jobs.hidden("*") if path.is_dir()]) == 1


def test_a_finished_output_that_may_be_replaced_and_lost_a_part_is_told_too(jobs: Jobs):
    job = jobs.job("stages:square", **{**SPLITS, "output": {"format": "parquet", "if_exists": "replace"}})
    assert jobs.run("run", job).code == 0
    jobs.parts()[0].unlink()

    refused, restarted = jobs.run("run", job), jobs.run("run", job, "--restart", "--json")

    assert (refused.code, "-00000000.parquet is missing\n" in refused.err) == (7, True), refused.err
    assert (restarted.code, restarted.manifest["replaces"]) == (0, ""), restarted.err
    assert jobs.run("verify", jobs.out).code == 0


def test_an_output_that_lost_a_part_is_left_as_it_is_where_others_have_put_files(jobs: Jobs):
    job = jobs.job("stages:square", **SPLITS)
    assert jobs.run("run", job).code == 0
    jobs.parts()[0].unlink()
    jobs.write("out/notes.txt", "mine")
    before = content(jobs)

    refused = jobs.run("run", job, "--restart")

    assert (refused.code, content(jobs)) == (7, before)
    assert "error: the output folder holds 'notes.txt', which no manifest names" in refused.err
    assert jobs.hidden("manifest.json")


def test_a_folder_with_files_of_others_is_refused(jobs: Jobs):
    jobs.write("out/notes.txt", "mine")

    ran = jobs.run("run", jobs.job("stages:square", **SPLITS))

    assert ran.code == 7
    assert "error: the output folder holds 'notes.txt', which no manifest names" in ran.err
    assert [path.name for path in jobs.out.iterdir()] == ["notes.txt"]
