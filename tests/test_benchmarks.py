"""The benchmarks still measure what they say: run on little data, nothing is asserted on seconds."""

import subprocess
import sys

import pytest

from benchmarks import flights, measure
from benchmarks.scratch import ROOT


def test_the_handwritten_loop_answers_as_the_job_does(tmp_path):
    folder, ours, theirs = ROOT / "sample_data" / "flights", tmp_path / "ours", tmp_path / "theirs"

    measure.time_command(flights.ours_command(folder, ours))
    measure.time_command(flights.theirs_command(folder, theirs))

    flights.same_or_raise(ours, theirs)


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
