"""The benchmarks still measure what they say: run on little data, nothing is asserted on seconds."""

import subprocess
import sys

import pytest

from benchmarks import flights, measure, stage_server, worker_side
from benchmarks.scratch import ROOT
from tests.opened_stage import make_job


def test_the_handwritten_loop_answers_as_the_job_does(tmp_path):
    folder, ours, theirs = ROOT / "sample_data" / "flights", tmp_path / "ours", tmp_path / "theirs"

    measure.time_command(flights.ours_command(folder, ours))
    measure.time_command(flights.theirs_command(folder, theirs))

    flights.same_or_raise(ours, theirs)


def test_a_worker_without_dask_answers_every_record(tmp_path):
    (tmp_path / "in.csv").write_text("7,0.5\n" * 1000)
    with stage_server.open_server() as url:
        stage = {"name": "stage", "endpoint": {"url": url}, "content_type": "text/csv"}
        keys = {"input": {"uri": "in.csv", "header": False}, "output": {"uri": "out", "format": "raw"}}
        job = make_job(tmp_path, stage, **keys, batch={"max_records": 10})

        for answers in (tmp_path / "first", tmp_path / "second"):
            worker_side.transform_here(job.path, answers)

            pieces = [path for path in answers.rglob("*") if path.is_file() and path.suffix != ".spool"]
            assert sum(path.read_bytes().count(b"1\n") for path in pieces) == 1000


def test_a_watched_command_shows_the_memory_of_its_children():
    child = "x = b'1' * 50_000_000; import time; time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    done = measure.watch([sys.executable, "-c", parent])

    assert max(seen.peak_mb for seen in done.processes) > 50 > done.driver.peak_mb


def test_a_failing_command_is_no_measurement():
    with pytest.raises(subprocess.CalledProcessError):
        measure.time_command([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_unknown_benchmark_is_named(capsys):
    from benchmarks.__main__ import main

    assert main(["speed"]) == 2
    assert "no benchmark 'speed'" in capsys.readouterr().err
