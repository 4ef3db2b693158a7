"""`on_error.placeholder`: row n of the output stays row n of the input, whatever fails and however it is cut."""

import gzip
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.chain import Chain, open_chain
from batchpipe.job import Job
from batchpipe.jobfile import load_job
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.plan import list_inputs, make_plan
from batchpipe.probe import infer_input
from batchpipe.stages import StageContext
from batchpipe.storage import Pending, open_store
from batchpipe.transform import run_split
from tests.jobs import GATE, Jobs, open_jobs, until

STAGES = """
import pandas as pd

def picky(frame: pd.DataFrame):
    assert not frame.text.isin(["fails"]).any(), "fails"
    return frame

def lines(frame: pd.DataFrame):
    assert not frame.text.isin(["fails"]).any(), "fails"
    return [f"row {n}".encode() for n in frame.n]

def even(frame: pd.DataFrame):
    kept = (frame.n % 2 == 0).to_numpy(bool)
    return frame[kept], kept

def slow(frame: pd.DataFrame):
    if frame.n.max() >= 300:
        (HERE / "began").touch()
        wait_for("go")
    return picky(frame)
"""
FATES = ("well", "fails", "unparsable")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + STAGES)
        yield jobs


def rows(fates: Sequence[str]) -> str:
    """A CSV in which row n meets the n-th fate."""
    lines = (f"{n},{fate}" if fate != "unparsable" else f"{n},has,more" for n, fate in enumerate(fates))
    return "n,text\n" + "".join(f"{line}\n" for line in lines)


def answers(fates: Sequence[str], line: str = '{n},"well"') -> list[str]:
    return [line.format(n=n) if fate == "well" else "ERROR,ERROR" for n, fate in enumerate(fates)]


def some_fail(count: int) -> list[str]:
    """Single ones, a whole stretch of splits, the very first and the very last."""
    fates = ["well"] * count
    fates[100:200] = ["fails"] * 100
    for place in (0, 7, 8, 250, 333, count - 1):
        fates[place] = FATES[1 + place % 2]
    return fates


@dataclass(frozen=True)
class Here:
    """A job whose splits are run in this process, one after the other."""

    job: Job
    chain: Chain
    folder: Path

    def lines(self) -> list[str]:
        """The lines of the parts, in order, without headers."""
        job, found = self.job, list[str]()
        store = open_store(job.output.uri, {})
        plan = make_plan(list_inputs(job.input, self.folder), job)
        schemas = Schemas(infer_input(plan, job), is_proved=True)
        orders = Orders(Place(job, "r1", "part-", "a1"), schemas)
        for split in plan:
            result = run_split(self.chain, split, orders)
            assert result.accounts.balanced
            if result.piece:
                pending = Pending.from_json(result.piece)
                store.publish(pending)
                found += Path(pending.uri).read_text().splitlines()
        return found


@contextmanager
def opened_here(folder: Path, fates: Sequence[str], **blocks: Any) -> Iterator[Here]:
    jobs = Jobs(folder)
    jobs.write("stages_here.py", STAGES)
    jobs.write("in/a.csv", rows(fates))
    on_error = {"placeholder": "ERROR,ERROR", "max_failed_percent": 100}
    types = {"types": {"n": "int64", "text": "string"}}
    job = load_job(jobs.job("stages_here:picky", input=types, on_error=on_error, **blocks))
    with open_chain(job, StageContext("r1", 0, folder, folder), None) as chain:
        yield Here(job, chain, folder)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(FATES), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sampled_from([0.00002, 0.0001, 1.0]),
)
def test_G4_whichever_records_fail_every_line_keeps_its_place(fates: list[str], max_records: int, split_mb: float):
    cut = {"max_records": max_records, "split_mb": split_mb}
    with (
        tempfile.TemporaryDirectory() as folder,
        opened_here(Path(folder), fates, batch=cut, output={"format": "csv"}) as here,
    ):
        assert here.lines() == answers(fates)


@pytest.mark.parametrize("output", [{"layout": "parts"}, {"layout": "mirror"}, {"compression": "gzip"}])
@pytest.mark.parametrize("workers", [1, 2])
def test_G4_a_run_with_placeholders_gives_the_same_lines_for_any_workers_and_is_verified(jobs: Jobs, output, workers):
    fates = some_fail(400)
    jobs.write("in/a.csv", rows(fates))
    on_error = {"placeholder": "ERROR,ERROR", "max_failed_records": 200}
    job = jobs.job(
        *("stages:lines",), output={"format": "raw", **output}, on_error=on_error, batch={"split_mb": 0.0005},
        compute={"workers": workers}, input={"types": {"n": "int64"}},
    )  # fmt: skip

    ran = jobs.run("run", job, "--json")

    assert ran.code == 0, ran.err
    failed = 400 - fates.count("well")
    assert ran.manifest["accounts"] == {"read": 400, "written": 400 - failed, "quarantined": failed, "dropped": 0}
    read = gzip.decompress if "compression" in output else bytes
    assert b"".join(map(read, jobs.part_bytes().values())).decode().splitlines() == answers(fates, "row {n}")
    assert sum(part["placeholders"] for part in jobs.table("parts")) == failed
    assert jobs.run("verify", jobs.out).code == 0


def test_G4_a_killed_run_with_placeholders_resumes_to_the_same_bytes(jobs: Jobs):
    fates = some_fail(400)
    jobs.write("in/a.csv", rows(fates))
    on_error = {"placeholder": "ERROR,ERROR", "max_failed_records": 200}
    types = {"types": {"n": "int64", "text": "string"}}
    job = jobs.job("stages:slow", output={"format": "csv"}, on_error=on_error, batch={"split_mb": 0.0005}, input=types)
    run = jobs.start("run", job)
    until((jobs.folder / "began").exists, within_s=60)
    until(lambda: jobs.hidden("*/journal/*"), within_s=60)
    run.kill()
    run.communicate()
    jobs.write("go", "")

    resumed = jobs.run("run", job, "--wait", "30")

    assert resumed.code == 0, resumed.err
    lines = [line for path in jobs.parts() for line in path.read_text().splitlines() if line != '"n","text"']
    assert lines == answers(fates)
    assert jobs.run("verify", jobs.out).code == 0


def test_a_dropped_record_has_no_placeholder(jobs: Jobs):
    jobs.write("in/a.csv", rows(["well", "well", "fails", "well", "well"]))
    stages: list[dict[str, Any]] = [{"callable": "stages:picky"}, {"callable": "stages:even", "may_drop": True}]
    job = jobs.job(stages, output={"format": "csv"}, on_error={"placeholder": "ERROR", "max_failed_records": 1})

    ran = jobs.run("run", job)

    assert ran.code == 0, ran.err
    assert jobs.parts()[0].read_text().splitlines() == ['"n","text"', '0,"well"', "ERROR", '4,"well"']


def test_without_added_newlines_a_placeholder_has_none(jobs: Jobs):
    jobs.write("in/a.csv", rows(["well", "fails", "well"]))
    output = {"format": "raw", "assemble_with": "none"}
    job = jobs.job("stages:lines", output=output, on_error={"placeholder": "<none>", "max_failed_records": 1})

    ran = jobs.run("run", job)

    assert (ran.code, jobs.parts()[0].read_text()) == (0, "row 0<none>row 2"), ran.err
