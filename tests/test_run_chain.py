"""Chains of servers through the real command line: what passes between stages, what does not fit, whose is what."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchpipe.errors import StageStartError
from batchpipe.jobfile import load_job
from batchpipe.manifest import SplitFailed, SplitResult
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.plan import list_inputs, make_plan
from batchpipe.transform import run_splits
from batchpipe.worker_chain import close_worker_chain
from batchpipe.workers import worker_count
from tests import images
from tests.jobs import Jobs, csv_rows, open_jobs, running, until
from tests.opened_stage import SERVER, make_job

STAGES = """
import pandas as pd
import resource

def double(frame: pd.DataFrame):
    return frame.assign(twice=2 * frame.n)

def named(frame: pd.DataFrame):
    return frame

def distinct(frame: pd.DataFrame):
    return frame.drop_duplicates("text")

def mixed(rows: list[dict]):
    return [{"n": row["n"] if row["n"] < 50 else str(row["n"])} for row in rows]

def ratio(frame: pd.DataFrame):
    return frame.assign(ratio=1 / frame.n)

def peak(lines: list[bytes]) -> list[bytes]:
    return [b"%d" % (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)] * len(lines)
"""
# Serves once the server of another stage has begun, and says that its own has.
MEETS = """
import sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
from tests.stage_server import start; start()
"""
ONE_BY_ONE: dict[str, Any] = {"max_records": 1, "max_concurrent_transforms": 4}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """A folder of jobs; the engine, if there is one, is the one of the tests."""
    with open_jobs(tmp_path / "jobs") as jobs:
        jobs.write("stages.py", STAGES)
        yield jobs


@pytest.fixture
def url() -> Iterator[str]:
    """A server that runs already."""
    environment = {**os.environ, "SAGEMAKER_BIND_TO_PORT": "0"}
    with running(SERVER, stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().split()[-1]}/invocations"


def process(name: str, command: list[str] = SERVER, **keys: Any) -> dict[str, Any]:
    environment = keys.pop("environment", {})
    return {"name": name, "process": {"command": command, "environment": environment}, **keys}


def write_job(jobs: Jobs, stages: list[dict[str, Any]], *rows: str, **blocks: Any) -> Path:
    """A job that sends these rows and writes the answers as they are."""
    jobs.write("in/a.csv", "".join(f"{row}\n" for row in rows))
    blocks = {"batch": ONE_BY_ONE, **blocks}
    return jobs.job(stages, input={"uri": "in", "header": False}, output={"uri": "out", "format": "raw"}, **blocks)


def answers(jobs: Jobs) -> list[str]:
    return [line for path in jobs.parts() for line in path.read_text().splitlines()]


def test_all_kinds_of_stages_are_mixed_freely_in_one_chain(jobs: Jobs, engine: str, url: str):
    jobs.write("in/a.csv", csv_rows(300))
    stages = [
        {"callable": "stages:double"},
        process("process", content_type="application/jsonlines"),
        {"container": {"image": images.stage_image(engine)}},
        {"callable": "stages:named"},
        {"endpoint": {"url": url}, "content_type": "application/json"},
    ]

    ran = jobs.run("run", jobs.job(stages))

    assert ran.code == 0, ran.err
    assert jobs.records() == [{"n": n, "text": f"row {n}", "twice": 2 * n} for n in range(300)]
    assert jobs.is_released()


def test_csv_in_another_encoding_goes_as_it_is_but_for_its_encoding(jobs: Jobs):
    rows = ['00123,1.50,"Zoé",NA', "7,,x,"]
    stages = [process("echo", content_type="text/csv")]
    path = write_job(jobs, stages, *rows)
    jobs.write("in/a.csv", "".join(f"{row}\n" for row in rows).encode("latin-1"))

    ran = jobs.run("run", path, "--set", "input.encoding=latin-1")

    assert ran.code == 0, ran.err
    assert answers(jobs) == rows


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("!as application/json nonsense", "JSON records are not of one type: "),
        ("!as text/csv \\x22open", "the first CSV record cannot be read"),
    ],
)
def test_answer_that_the_output_cannot_hold_is_told_by_the_first_mini_batch(
    jobs: Jobs, verb: str, answer: str, why: str
):
    path = write_job(jobs, [process("model")], answer)

    ran = jobs.run(verb, path, "--set", "output.format=parquet")

    assert ran.code == 5, ran.err
    assert f"an answer does not fit the output: {why}" in ran.err
    assert "a.csv, record 0, byte 0" in ran.err
    assert "next:  mend what the last stage answers; or state output.format: raw" in ran.err


@pytest.mark.parametrize(
    ("stage", "where", "why"),
    [
        ({"content_type": "text/csv; charset=latin-1"}, "content_type", "charset latin-1 cannot be: records are sent"),
        ({"headers": {"Content-Type": "a/b"}}, "headers", "is stated by the stage's content_type"),
    ],
)
def test_what_a_request_says_of_itself_cannot_be_stated_otherwise(
    jobs: Jobs, stage: dict[str, Any], where: str, why: str
):
    endpoint = {"url": "http://127.0.0.1:1/", "headers": stage.pop("headers", {})}
    refused = jobs.run("run", write_job(jobs, [{"endpoint": endpoint, **stage}], "1"))

    assert (refused.code, where in refused.err, why in refused.err) == (2, True, True), refused.err


def test_the_answers_content_type_is_the_next_requests(jobs: Jobs):
    answer = "!as application/jsonlines;charset=utf-8 !headers"

    ran = jobs.run("run", write_job(jobs, [process("first"), process("second")], answer))

    assert ran.code == 0, ran.err
    assert "content-type=application/jsonlines," in answers(jobs)[0]


def test_answers_come_in_the_order_of_the_input_whichever_are_slow(jobs: Jobs):
    rows = [f"!slow {0.1 * (n % 3 == 0) + 0.02 * (n % 2)} {n}" for n in range(120)]
    batch = {"max_records": 1, "max_concurrent_transforms": 8, "split_mb": 0.0005}

    ran = jobs.run("run", write_job(jobs, [process("a"), process("b")], *rows, batch=batch))

    assert ran.code == 0, ran.err
    assert answers(jobs) == rows


@pytest.mark.parametrize("verb", ["run", "check"])
def test_content_types_that_do_not_fit_are_found_at_the_start_with_both_stages(jobs: Jobs, verb: str):
    stages = [process("first"), process("second", content_type="application/json")]

    ran = jobs.run(verb, write_job(jobs, stages, *["1,2"] * 1000, on_error={"max_failed_percent": 100}))

    assert ran.code == 4
    assert "stage 'second' takes application/json, and what stage 'first' gives does not fit: " in ran.err
    assert "text/csv cannot be sent as application/json without being parsed" in ran.err
    assert "next:  state content_type or accept of the stages on both sides" in ran.err
    assert not jobs.parts()
    assert jobs.is_released()


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_header_that_the_stage_before_does_not_answer_is_found_at_the_start(jobs: Jobs, verb: str):
    stages = [process("first"), process("second", header=True)]

    ran = jobs.run(verb, write_job(jobs, stages, *["1,2"] * 100, on_error={"max_failed_percent": 100}))

    assert ran.code == 4
    assert "stage 'second' takes text/csv, and what stage 'first' gives does not fit: a header is wanted" in ran.err
    assert jobs.is_released()


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_callable_that_asks_for_what_the_stage_before_does_not_answer_is_found_at_the_start(jobs: Jobs, verb: str):
    stages = [process("model"), {"callable": "stages:named"}]
    rows = ["!as image/png x"] * 100

    ran = jobs.run(verb, write_job(jobs, stages, *rows, on_error={"max_failed_percent": 100}))

    assert ran.code == 5
    text = "stage 'named' asks for pandas.DataFrame, but the records are bytes (image/png), without columns; "
    assert text + "they come from stage 'model'" in ran.err
    assert not jobs.parts()
    assert jobs.is_released()


@pytest.mark.parametrize("max_records", [1, 10])
def test_an_answer_of_another_content_type_costs_its_record_alone(jobs: Jobs, max_records: int):
    rows = [f"{n}" for n in range(100)]
    rows[50] = "!as text/html <p>sorry</p>"
    stages = [process("first"), process("second", content_type="text/csv")]
    batch = {**ONE_BY_ONE, "max_records": max_records}

    ran = jobs.run("run", write_job(jobs, stages, *rows, batch=batch, on_error={"max_failed_records": 1}))

    assert ran.code == 0, ran.err
    assert answers(jobs) == rows[:50] + rows[51:]
    assert [(one["record"], one["stage"], one["reason"]) for one in jobs.quarantined()] == [
        (50, "first", "WrongAnswer")
    ]
    if max_records == 1:
        assert jobs.quarantined()[0]["message"] == "answered text/html; the next stage takes text/csv"


@pytest.mark.parametrize("odd", ['{"n": 1, "n": 2}', "{}"])
def test_an_answer_that_is_no_row_for_the_callable_behind_costs_its_record_alone(jobs: Jobs, odd: str):
    rows = [f'{{"n": {n}}}' for n in range(20)]
    jobs.write("in/a.txt", "\n".join([*rows[:7], odd, *rows[7:]]) + "\n")
    first = process("first", content_type="application/jsonlines")
    stages = [first, {"callable": "stages:double", "name": "second"}]
    job = jobs.job(
        stages,
        input={"uri": "in", "format": "lines"},
        batch={"max_records": 1, "max_concurrent_transforms": 4},
        on_error={"max_failed_records": 1},
    )

    ran = jobs.run("run", job)

    assert (ran.code, len(jobs.records())) == (0, 20), ran.err
    (failed,) = jobs.quarantined()
    assert (failed["record"], failed["stage"], failed["reason"]) == (7, "second", "ContentError")
    assert failed["message"].endswith("; it comes from stage 'first'")


@pytest.mark.parametrize(("longest_s", "count"), [(0.0, 1), (60.0, 4)])
def test_a_task_that_takes_long_returns_what_it_has(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_s: float, count: int
):
    monkeypatch.setattr("batchpipe.transform.LONGEST_TASK_S", longest_s)
    for name in "abcd":
        jobs.write(f"in/{name}.csv", "n\n1\n")
    job, run_id = load_job(jobs.job("stages:peak", output={"format": "raw", "layout": "mirror"})), jobs.run_id
    splits = tuple(make_plan(list_inputs(job.input, tmp_path), job))
    try:
        done = run_splits(splits, Orders(Place(job, run_id, "part-", "1"), Schemas(is_proved=True)))
    finally:
        close_worker_chain(run_id)

    assert [(result.split, type(result)) for result in done] == [(index, SplitResult) for index in range(count)]
    assert len(splits) == 4


@pytest.mark.parametrize("is_proved", [True, False])
def test_another_content_type_is_a_records_fault_on_every_worker_once_the_first_mini_batch_has_fitted(
    jobs: Jobs, url: str, tmp_path: Path, is_proved: bool
):
    stages = [{"name": name, "endpoint": {"url": url}, "content_type": "text/csv"} for name in ("first", "second")]
    in_turn = {"max_records": 1, "max_concurrent_transforms": 1}
    rows = ["!as text/html <p>sorry</p>", "2"]
    path = write_job(jobs, stages, *rows, batch=in_turn, on_error={"max_failed_records": 1})
    job, run_id = load_job(path), jobs.run_id
    splits = tuple(make_plan(list_inputs(job.input, tmp_path), job))
    try:
        [done] = run_splits(splits, Orders(Place(job, run_id, "part-", "1"), Schemas(is_proved=is_proved)))
    finally:
        close_worker_chain(run_id)

    if is_proved:
        assert isinstance(done, SplitResult)
        assert [(failed.ordinal, failed.stage) for failed in done.failures] == [(0, "first")]
    else:
        assert isinstance(done, SplitFailed)
        assert isinstance(done.error, StageStartError)


@pytest.mark.parametrize(
    "stage",
    [
        {"callable": "stages:distinct"},
        process("served", ["batchpipe", "serve", "stages:distinct"], content_type="application/jsonlines"),
    ],
    ids=["in the worker", "served"],
)
def test_G8_a_stage_that_answers_fewer_records_ends_the_run_wherever_it_runs(jobs: Jobs, stage: dict[str, Any]):
    jobs.write("in/a.csv", "n,text\n" + "".join(f"{n},{n % 7}\n" for n in range(50)))

    ran = jobs.run("run", jobs.job([stage], on_error={"max_failed_percent": 100}))

    assert ran.code == 5, ran.err
    assert "stage 'distinct' answered 7 records for 50 sent; to drop records state may_drop: true" in ran.err
    assert not jobs.parts()


def test_G8_answers_whose_types_differ_end_the_run(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(100))

    ran = jobs.run("run", jobs.job([{"callable": "stages:mixed"}], on_error={"max_failed_percent": 100}))

    assert ran.code == 5, ran.err
    assert "stage 'mixed' answered some records with other types than others: " in ran.err
    assert "where: in/a.csv, record 0, byte 7 and the 99 sent with it" in ran.err


def test_a_value_that_a_content_type_has_no_word_for_costs_its_record_alone(jobs: Jobs):
    jobs.write("in/a.csv", "n\n" + "".join(f"{abs(n)}\n" for n in range(-50, 50)))
    stages = [{"callable": "stages:ratio"}, process("model", content_type="application/json")]

    ran = jobs.run("run", jobs.job(stages, on_error={"max_failed_records": 1}))

    assert (ran.code, len(jobs.records())) == (0, 99), ran.err
    [one] = jobs.quarantined()
    assert (one["record"], one["stage"], one["reason"]) == (50, "model", "CannotBeSent")
    text = "stage 'model' takes application/json, and what stage 'ratio' gives does not fit: a table cannot be sent as"
    assert one["message"].startswith(text)


def test_stages_of_a_chain_start_side_by_side(jobs: Jobs):
    here = [str(jobs.folder / name) for name in ("a", "b")]
    command = [sys.executable, "-c", MEETS]
    stages = [process("a", [*command, *here]), process("b", [*command, *reversed(here)])]
    path = {"python_path": [str(Path(__file__).parent.parent)]}

    ran = jobs.run("run", write_job(jobs, stages, "1", **path))

    assert ran.code == 0, ran.err


def test_G6_the_peak_of_a_worker_does_not_grow_with_what_servers_answer(jobs: Jobs):
    """Ten times the input, 60 MB more of it, may cost 24 MB, the noise of the allocators."""
    stages = [process("model"), {"callable": "stages:peak"}]
    batch = {"max_payload_mb": 0.5, "max_concurrent_transforms": 4, "split_mb": 64}
    peaks = []
    for factor in (1, 10):
        job = write_job(jobs, stages, *["x" * 1000] * 6500 * factor, batch=batch)
        ran = jobs.run("run", job, "--set", f"output.uri={jobs.folder / str(factor)}", "--json")
        assert (ran.code, ran.manifest["splits"]) == (0, 1), ran.err
        jobs.out = jobs.folder / str(factor)
        peaks.append(max(map(int, answers(jobs))))

    assert peaks[1] - peaks[0] < 24


def test_a_record_over_the_limit_is_that_records_failure(jobs: Jobs):
    rows = ["1", "x" * 2000, "3"]
    batch = {"max_payload_mb": 1 / 1024}

    ran = jobs.run("run", write_job(jobs, [process("model")], *rows, batch=batch, on_error={"max_failed_records": 1}))

    assert ran.code == 0, ran.err
    assert answers(jobs) == ["1", "3"]
    assert "2,001 bytes of 1 record, over the limit of 1,024 (max_payload_mb)" in (
        jobs.hidden("*/quarantine/*.jsonl")[0].read_text()
    )


@pytest.mark.parametrize(
    ("kinds", "workers", "count"),
    [("pp", "auto", 1), ("pp", 3, 3), ("pc", "auto", 2), ("pp", {"minimum": 0, "maximum": 2}, 2)],
)
def test_chains_of_servers_alone_have_one_worker_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: str, workers: object, count: int
):
    monkeypatch.setattr("batchpipe.workers.available_cores", lambda: 2)
    stages = {"p": process(""), "c": {"callable": "stages:named"}}
    named = [{**stages[kind], "name": f"s{place}"} for place, kind in enumerate(kinds)]

    assert worker_count(make_job(tmp_path, *named, compute={"workers": workers}), splits=100) == count


# --- whose containers are whose ---


def containers(engine: str, run_id: str) -> set[str]:
    return set(images.run(engine, "ps", "-aq", f"--filter=label=batchpipe.run={run_id}").split())


@pytest.fixture
def two(jobs: Jobs, tmp_path: Path, engine: str) -> tuple["subprocess.Popen[str]", "subprocess.Popen[str]"]:
    """Two runs of a container each, at work; their ids are the folder's with -1 and -2."""
    stage = {"name": "model", "container": {"image": images.stage_image(engine)}}
    job = write_job(jobs, [stage], *["!slow 0.5"] * 80)
    runs = [
        jobs.start("run", job, "--run-id", f"{tmp_path.name}-{n}", "--set", f"output.uri={jobs.folder / f'out{n}'}")
        for n in (1, 2)
    ]
    until(lambda: all(containers(engine, f"{tmp_path.name}-{n}") for n in (1, 2)), 60)
    return runs[0], runs[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_G5_a_run_that_ends_leaves_the_containers_of_another_one_alone(
    two: tuple["subprocess.Popen[str]", "subprocess.Popen[str]"], jobs: Jobs, tmp_path: Path, engine: str, number: int
):
    theirs = containers(engine, f"{tmp_path.name}-2")

    two[0].send_signal(number)

    until(lambda: not containers(engine, f"{tmp_path.name}-1"))
    assert containers(engine, f"{tmp_path.name}-2") == theirs
    _, err = two[1].communicate(timeout=90)
    assert two[1].returncode == 0, err
    jobs.out = jobs.folder / "out2"
    assert len(answers(jobs)) == 80
    assert not containers(engine, f"{tmp_path.name}-2")


def test_containers_that_a_power_cut_left_are_listed_and_removed_and_those_at_work_are_not(
    two: tuple["subprocess.Popen[str]", "subprocess.Popen[str]"], jobs: Jobs, tmp_path: Path, engine: str
):
    (left,) = containers(engine, f"{tmp_path.name}-1")
    name = images.run(engine, "inspect", "--format={{.Name}}", left).strip().lstrip("/")
    cut_power(two[0])

    listed = jobs.run("ps").out.splitlines()
    cleaned = jobs.run("clean")

    (line,) = [line for line in listed if name in line]
    assert line.split()[:3] == ["container", "orphan", f"{tmp_path.name}-1"]
    assert "in" in [line.split()[1] for line in listed if f" {tmp_path.name}-2 " in line and "container" in line]
    assert [line for line in cleaned.out.splitlines() if line.startswith("removed container") and name in line]
    assert not containers(engine, f"{tmp_path.name}-1")
    assert containers(engine, f"{tmp_path.name}-2")
    two[1].send_signal(signal.SIGTERM)
    assert two[1].wait(20) == 143


def cut_power(driver: "subprocess.Popen[str]") -> None:
    """Kill every process of one run at once, its watchers among them."""
    mine = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none must see another one's end
        for each in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, number)
    driver.wait()
