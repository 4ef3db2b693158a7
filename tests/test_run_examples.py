"""The three jobs under jobs/, as a newcomer runs them: in a bare environment, twice, and then read by other tools."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.dataset as ds
import pytest

from tests.jobs import Jobs, Result, open_jobs

HERE = Path(__file__).parent.parent
NAMES = ["flight_delays", "rain_soon", "digits"]


@dataclass
class Ran:
    """An example's job, run once."""

    job: Path
    jobs: Jobs
    first: Result

    def again(self, verb: str, *arguments: str | Path) -> Result:
        return self.jobs.run(verb, *arguments)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ran]]:
    """Every example, run as under `env -i`: no terminal, a HOME that cannot be written."""
    with open_jobs(tmp_path_factory.mktemp("examples")) as jobs:
        yield {name: _run(jobs, name) for name in NAMES}


def _run(jobs: Jobs, name: str) -> Ran:
    job = HERE / "jobs" / f"{name}.yaml"
    return Ran(job, jobs, jobs.run("run", job, "--set", f"output.uri={jobs.folder / name}"))


@pytest.fixture(params=NAMES)
def ran(request: pytest.FixtureRequest, examples: dict[str, Ran]) -> Ran:
    return examples[request.param]


def test_the_job_ends_well_and_its_accounts_hold(ran: Ran):
    assert ran.first.code == 0, ran.first.err
    assert f"{ran.job.stem} " in ran.first.out.splitlines()[0]
    shown = ran.again("show", ran.jobs.folder / ran.job.stem, "--json").manifest
    accounts = shown["accounts"]
    assert accounts["read"] == accounts["written"] > 0
    assert accounts["quarantined"] == accounts["dropped"] == 0


def test_running_again_is_a_no_op_that_says_so(ran: Ran):
    output = ran.jobs.folder / ran.job.stem
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    again = ran.again("run", ran.job, "--set", f"output.uri={output}")

    assert again.code == 0
    assert "nothing to do" in again.out
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


def test_verify_finds_the_output_as_published(ran: Ran):
    verified = ran.again("verify", ran.jobs.folder / ran.job.stem)

    assert (verified.code, verified.out.splitlines()[0]) == (0, "verified: every part is as it was published")


def test_nothing_is_left_of_the_runs(ran: Ran):
    assert ran.jobs.is_released()


def test_every_flight_has_an_answer_and_other_tools_read_the_folder(examples: dict[str, Ran]):
    folder = str(examples["flight_delays"].jobs.folder / "flight_delays")
    rows = sum(len(path.read_text().splitlines()) - 1 for path in (HERE / "sample_data" / "flights").glob("*.csv"))

    assert ds.dataset(folder).count_rows() == len(pd.read_parquet(folder)) == rows
    import dask.dataframe as dd

    assert len(dd.read_parquet(folder)) == rows


def test_json_lines_are_read_by_pandas_and_dask(examples: dict[str, Ran]):
    import dask.dataframe as dd

    folder = examples["rain_soon"].jobs.folder / "rain_soon"
    frames = [pd.read_json(path, lines=True) for path in sorted(folder.glob("*.jsonl"))]

    assert sum(map(len, frames)) == len(dd.read_json(str(folder / "*.jsonl"))) > 0
    assert ds.dataset(str(folder), format=ds.JsonFileFormat()).count_rows() == sum(map(len, frames))


def test_each_picture_has_one_answer_that_names_it(examples: dict[str, Ran]):
    lines = [
        json.loads(line)
        for path in sorted((examples["digits"].jobs.folder / "digits").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    pictures = sorted(str(path) for path in (HERE / "sample_data" / "digits").glob("*.png"))

    assert [line["_object"] for line in lines] == pictures


def test_plan_and_check_say_what_a_run_would_do_and_leave_nothing(tmp_path: Path):
    with open_jobs(tmp_path) as jobs:
        out = f"output.uri={jobs.out}"
        plan = jobs.run("plan", HERE / "jobs" / "rain_soon.yaml", "--set", out)
        check = jobs.run("check", HERE / "jobs" / "rain_soon.yaml", "--set", out)

        assert (plan.code, check.code) == (0, 0), plan.err + check.err
        assert "chain     features -> model" in plan.out
        assert "stages    features, model: opened, one mini-batch went through" in check.out
        assert not jobs.out.exists()
        assert jobs.is_released()
