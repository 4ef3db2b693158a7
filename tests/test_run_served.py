"""Jobs whose stages are servers, processes and containers, through the real command line: run, failed, killed."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest

from batchpipe.specs.spec import MB
from tests import images
from tests.jobs import Jobs, open_jobs, until
from tests.opened_stage import SERVER

# Two stages whose columns are told by names and types alone, and answers with nulls and times.
CALLABLES = """
import pandas as pd

def parse(frame: pd.DataFrame):
    return frame.assign(per_year=frame.n * 12.5, at=pd.to_datetime(frame.text))

class Model:
    def __init__(self, by: int):
        self.by = by
    def __call__(self, frame: pd.DataFrame):
        return frame.assign(total=frame.per_year * self.by, later=frame["at"] + pd.Timedelta(days=1), twice=frame.n * 2)
"""
HERE = Path(__file__).parent.parent
Stage = Callable[..., dict[str, Any]]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """A folder of jobs; the engine, if there is one, is the one of the tests."""
    with open_jobs(tmp_path / "jobs") as jobs:
        yield jobs


@pytest.fixture(params=["process", pytest.param("container", marks=pytest.mark.container)])
def stage(request: pytest.FixtureRequest) -> Stage:
    """Make a stage that runs the stage server, as a process and as a container."""
    if request.param == "process":
        return process_stage
    image = images.stage_image(request.getfixturevalue("engine"))
    return lambda name, **block: {"name": name, "container": {"image": image, **block}}


@pytest.fixture
def servers(request: pytest.FixtureRequest, jobs: Jobs, stage: Stage) -> Callable[[], list[str]]:
    """The servers that this folder's runs started and that are still there."""
    if stage is process_stage:
        return lambda: [str(process.pid) for process in jobs.processes("stage_server.py")]
    engine = request.getfixturevalue("engine")
    return lambda: images.run(engine, "ps", "-aq", f"--filter=label=batchpipe.run={jobs.run_id}").split()


def process_stage(name: str, **block: Any) -> dict[str, Any]:
    return {"name": name, "process": {"command": SERVER, **block}}


def write_job(jobs: Jobs, stages: list[dict[str, Any]], *rows: str, **blocks: Any) -> Path:
    """A job that sends these rows, one a request, and writes the answers as they are."""
    jobs.write("in/a.csv", "".join(f"{row}\n" for row in rows))
    blocks = {"batch": {"max_records": 1, "max_concurrent_transforms": 4}, **blocks}
    return jobs.job(stages, input={"uri": "in", "header": False}, output={"uri": "out", "format": "raw"}, **blocks)


def answers(jobs: Jobs) -> list[str]:
    return [line for path in jobs.parts() for line in path.read_text().splitlines()]


def test_all_workers_send_what_the_first_mini_batch_was_sent_as(jobs: Jobs):
    """Each asks its own server what it advises, and here only the first one to be asked says anything."""
    says = {"STAGE_PARAMETERS": '{"TableContentType": "application/jsonlines"}', "STAGE_PARAMETERS_FOLDER": "."}
    jobs.write("in/a.csv", "n\n" + "".join(f"{n}\n" for n in range(4000)))
    job = jobs.job(
        [process_stage("one", environment=says)],
        output={"uri": "out", "format": "raw"},
        batch={"split_mb": 0.0005},
        compute={"workers": 3},
    )

    result = jobs.run("run", job)

    assert result.code == 0, result.err
    assert len(answers(jobs)) == 4000
    assert len({line.startswith("{") for line in answers(jobs)}) == 1


@pytest.mark.timeout(300)  # fifteen containers are started and stopped
def test_fifteen_stages_in_a_chain(jobs: Jobs, stage: Stage):
    rows = [f"{i},x" for i in range(200)]
    stages = [stage(f"s{number}") for number in range(15)]

    result = jobs.run("run", write_job(jobs, stages, *rows, batch={"max_concurrent_transforms": 4}), timeout=250)

    assert result.code == 0, result.err
    assert answers(jobs) == rows
    assert not jobs.left()


def test_G5_servers_stop_with_the_run_and_their_logs_are_kept(
    jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]
):
    result = jobs.run(
        "run", write_job(jobs, [stage("first"), stage("second")], "1", "!log hello", "3"), "--run-id", jobs.run_id
    )

    assert result.code == 0, result.err
    assert answers(jobs) == ["1", "!log hello", "3"]
    assert not servers()
    assert not jobs.left()
    assert "hello" in jobs.hidden("*/logs/second.log")[0].read_text()


def test_stage_that_does_not_start_ends_the_run_with_4_at_once(
    jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]
):
    stages = [
        stage("fine"),
        stage("broken", environment={"STAGE_EXIT": "3"}),
        stage("slow", environment={"STAGE_PING": "503"}),
    ]

    result = jobs.run("run", write_job(jobs, stages, "1"), "--run-id", jobs.run_id)

    assert result.code == 4
    assert "stage 'broken' did not start: " in result.err
    assert "exited with code 3 after" in result.err
    assert "log:   no model for None" in result.err
    assert not servers()
    assert not jobs.left()


def test_log_of_a_stage_that_did_not_start_lies_where_the_error_says(jobs: Jobs, stage: Stage):
    job = write_job(jobs, [stage("broken", environment={"STAGE_EXIT": "3", "STAGE_LINES": "2"})], "1")

    result = jobs.run("run", job)

    place = re.search(
        r"  log:   line 0\n         line 1\n         no model for None\n         \(last 3 of 3 lines; all in (\S+)\)\n",
        result.err,
    )
    assert place, result.err
    assert (jobs.folder / place[1]).read_text() == "line 0\nline 1\nno model for None\n"


def test_check_names_no_log_for_it_keeps_none(jobs: Jobs):
    result = jobs.run("check", write_job(jobs, [process_stage("broken", environment={"STAGE_EXIT": "3"})], "1"))

    assert result.code == 4
    assert "  log:   no model for None\n         (last 1 of 1 lines)\n" in result.err
    assert not jobs.hidden("**/*.log")


def test_record_that_kills_its_server_ends_the_run_with_5_by_default(
    jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]
):
    job = write_job(jobs, [stage("model")], "1", "2", "!exit 5", compute={"workers": 1})

    result = jobs.run("run", job, "--run-id", jobs.run_id)

    assert result.code == 5, result.err
    assert "stage 'model' failed for 1 record, 0 allowed: ServerDied: " in result.err
    assert "exited with code 5" in result.err
    assert "in/a.csv, line 3" in result.err
    assert not servers()


def test_record_that_kills_its_server_costs_itself_alone(jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]):
    rows = [f"{i},x" for i in range(100)]
    poison = [*rows[:40], "!exit 5", *rows[40:70], "!exit 6", *rows[70:]]
    job = write_job(jobs, [stage("model")], *poison, on_error={"max_failed_records": 2})

    result = jobs.run("run", job, "--run-id", jobs.run_id, timeout=110)

    assert result.code == 0, result.err
    assert answers(jobs) == rows
    assert "2 records  ServerDied in model" in result.out
    assert not servers()
    assert not jobs.left()


def test_server_killed_from_outside_costs_no_record(
    request: pytest.FixtureRequest, jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]
):
    rows = [f"!slow 0.1 {i}" for i in range(60)]
    run = jobs.start("run", write_job(jobs, [stage("model")], *rows), "--run-id", jobs.run_id)
    # Not before it has answered: one that ends while it starts is told at once.
    until(lambda: any('"schema"' in path.read_text() for path in jobs.hidden("*/journal/0*.jsonl")), 30)

    for server in servers():
        if stage is process_stage:
            psutil.Process(int(server)).kill()
        else:
            images.run(request.getfixturevalue("engine"), "kill", server)

    _, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert answers(jobs) == rows
    assert not servers()


def test_failing_record_is_quarantined_and_the_others_are_written(jobs: Jobs):
    job = write_job(jobs, [process_stage("model")], "1", "!status 400", "3", on_error={"max_failed_records": 1})

    result = jobs.run("run", job)

    assert result.code == 0, result.err
    assert answers(jobs) == ["1", "3"]
    assert "HTTP 400 in model" in result.out


def test_rows_of_csv_follow_their_header_unparsed(jobs: Jobs):
    rows = ['007,"x"', "1.50,", "5,too,many", "8,y"]
    jobs.write("in/a.csv", 'n,"a,b"\n' + "\n".join(rows))
    stage = process_stage("model", environment={"STAGE_HEADER": "1"}) | {"header": True, "max_payload_mb": 22 / MB}
    result = jobs.run("run", jobs.job([stage], output={"uri": "out", "format": "raw"}))

    assert result.code == 0, result.err
    assert answers(jobs) == rows
    log = jobs.hidden("*/logs/model.log")[0].read_text().splitlines()[1:]
    assert log == ['n,"a,b" before 14 bytes'] * 3  # the probe, and both requests filled to the byte


def test_server_that_fails_now_and_then_is_asked_again_with_the_same_bytes(jobs: Jobs):
    result = jobs.run("run", write_job(jobs, [process_stage("model")], "!flaky a 2", "2", "3"))

    assert result.code == 0, result.err
    assert answers(jobs) == ["!flaky a 2", "2", "3"]
    log = jobs.hidden("*/logs/model.log")[0].read_text()
    assert len(set(re.findall("a asked with .*", log))) == 1
    assert log.count("a asked with") > 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_G5_interrupted_run_leaves_no_server(
    jobs: Jobs, stage: Stage, servers: Callable[[], list[str]], number: int, code: int
):
    run = jobs.start("run", write_job(jobs, [stage("model")], *["!slow 1"] * 40), "--run-id", jobs.run_id)
    until(servers, 30)

    run.send_signal(number)

    _, err = run.communicate(timeout=20)
    assert run.returncode == code, err
    assert not servers()
    assert not jobs.left()


def test_G5_run_that_is_interrupted_while_a_stage_starts_ends_and_leaves_no_server(
    jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]
):
    job = write_job(jobs, [stage("model", environment={"STAGE_PING": "503"})], "1")
    run = jobs.start("run", job, "--run-id", jobs.run_id)
    until(servers, 30)

    run.send_signal(signal.SIGINT)

    _, err = run.communicate(timeout=15)
    assert run.returncode == 130, err
    assert not servers()
    assert not jobs.left()


def test_G5_killed_driver_leaves_no_server(jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]):
    run = jobs.start("run", write_job(jobs, [stage("a"), stage("b")], *["!slow 1"] * 40), "--run-id", jobs.run_id)
    until(lambda: len(servers()) == 2, 30)

    run.kill()

    until(lambda: not servers() and jobs.is_released())


def test_G5_killed_worker_loses_its_servers_and_the_run_goes_on(
    jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]
):
    rows = [f"!slow 0.1 {i}" for i in range(100)]
    job = write_job(jobs, [stage("model")], *rows, compute={"workers": 2}, batch={"max_records": 1, "split_mb": 0.0001})
    run = jobs.start("run", job, "--run-id", jobs.run_id)
    until(lambda: len(servers()) == 2, 30)
    first = set(servers())

    workers(jobs)[0].kill()

    until(lambda: len(first & set(servers())) == 1)
    _, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert answers(jobs) == rows
    assert not servers()


def test_four_workers_with_three_stages_each(jobs: Jobs, stage: Stage, servers: Callable[[], list[str]]):
    rows = [f"!slow 0.02 {i}" for i in range(60)]
    stages = [stage(name) for name in ("a", "b", "c")]
    job = write_job(jobs, stages, *rows, compute={"workers": 4}, batch={"max_records": 1, "split_mb": 0.0001})

    result = jobs.run("run", job, "--run-id", jobs.run_id, timeout=110)

    assert result.code == 0, result.err
    assert answers(jobs) == rows
    assert not servers()
    assert not jobs.left()


def workers(jobs: Jobs) -> list[psutil.Process]:
    return jobs.processes("batchpipe.worker")


def test_served_callable_gets_the_frame_it_gets_in_process_though_no_content_type_is_stated(jobs: Jobs):
    jobs.write("scoring.py", CALLABLES)
    jobs.write("in/a.csv", "n,text\n1,2024-01-31\n,2024-02-29T10:30:00\n-3,\n")
    parse: dict[str, Any] = {"callable": "scoring:parse"}
    served_parse = {"process": {"command": ["batchpipe", "serve", "scoring:parse"]}}
    served_model = {"process": {"command": ["batchpipe", "serve", "scoring:Model", "--param", "by=3"]}}
    chains = {
        "called": [parse, {"callable": "scoring:Model", "params": {"by": 3}}],
        "served": [parse, served_model],
        "served_both": [served_parse, served_model],
    }
    for name, stages in chains.items():
        result = jobs.run("run", jobs.job(stages, output={"uri": name, "format": "parquet"}))
        assert result.code == 0, result.err

    called, *served = (ds.dataset(jobs.folder / name, exclude_invalid_files=False).to_table() for name in chains)
    assert called.column_names == ["n", "text", "per_year", "at", "total", "later", "twice"]
    assert len(served) == 2
    assert all(each.equals(called) for each in served)


def test_record_that_takes_a_containers_memory_costs_itself_alone(jobs: Jobs, engine: str):
    stage = {"name": "model", "container": {"image": images.stage_image(engine), "memory_mb": 64}}
    job = write_job(jobs, [stage], "1", "!eat 500", "3", on_error={"max_failed_records": 1})

    result = jobs.run("run", job)

    assert result.code == 0, result.err
    assert answers(jobs) == ["1", "3"]
    kept = jobs.hidden("*/quarantine/*")[0].read_text()
    assert "exited with code 137 (out of memory, limit 64 MB)" in kept
    assert "stages.model.container.memory_mb=128" in kept


def test_flight_delays_as_images_answers_as_the_callables_do(jobs: Jobs, engine: str):
    base = images.job_base_image(engine)
    for name in ("features", "model", "decide"):
        images.build(engine, f"flight-delays-{name}", HERE, f"jobs/flight_delays/Dockerfile.{name}", BASE=base)

    for name in ("flight_delays", "flight_delays_containers"):
        result = jobs.run(
            "run", HERE / "jobs" / f"{name}.yaml", "--set", f"output.uri={jobs.folder / name}", timeout=110
        )
        assert result.code == 0, result.err

    tables = [
        ds.dataset(jobs.folder / name, format="parquet", exclude_invalid_files=False).to_table()
        for name in ("flight_delays", "flight_delays_containers")
    ]
    assert tables[0].num_rows > 30_000
    assert tables[0].equals(tables[1])


def test_run_whose_last_record_takes_every_attempt_is_not_stuck(jobs: Jobs):
    """Nothing moves but attempts, each shorter than the run waits, all of them longer."""
    stage = {**process_stage("model"), "invocations_timeout_s": 1, "invocations_max_retries": 0}
    limits = {"max_failed_records": 1, "no_progress_timeout_s": 4}
    job = write_job(jobs, [stage], "!slow 600", *map(str, range(15)), batch={}, on_error=limits)

    ran = jobs.run("run", job)

    assert (ran.code, answers(jobs)) == (0, [str(n) for n in range(15)]), ran.err
    assert "1 record   Timeout in model" in ran.out
