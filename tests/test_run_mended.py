"""After a first error: the mended job runs without more ado, and what cannot be done yet is refused, not left out."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.jobs import ECHO, Jobs, csv_rows, open_jobs

RAISES = """
def broken(frame: pd.DataFrame):
    return frame.assign(square=frame.m**2)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", ECHO + RAISES)
        jobs.write("in/a.csv", csv_rows(20))
        yield jobs


def test_a_stage_that_is_mended_before_anything_settled_needs_no_restart(jobs):
    job = jobs.job("stages:broken")
    first = jobs.run("run", job)
    assert first.code == 5
    assert "stages.py:8 in broken" in first.err

    jobs.write("stages.py", ECHO + RAISES.replace("frame.m", "frame.n"))
    again = jobs.run("run", job, "--json")

    assert again.code == 0, again.err
    assert again.manifest["accounts"]["written"] == 20


@pytest.mark.parametrize(
    ("blocks", "key"),
    [
        ({"data_processing": {"input_filter": "$[1:]"}}, "data_processing"),
    ],
)
def test_what_this_version_cannot_do_is_refused(jobs, blocks, key):
    refused = jobs.run("run", jobs.job(**blocks))

    assert refused.code == 2
    assert f"job.yaml: {key}: this version of batchpipe cannot do it yet" in refused.err


class Quiet(SimpleHTTPRequestHandler):
    """A file server that knows no ranges and keeps no log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url(jobs: Jobs) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(jobs.folder / "in"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.csv"
        server.shutdown()


def test_input_may_be_any_url_that_fsspec_reads(jobs, url):
    answered = jobs.run("run", jobs.job(input={"uri": url}), "--json")

    assert answered.code == 0, answered.err
    assert answered.manifest["accounts"]["written"] == 20


def test_a_server_that_cannot_give_a_part_of_a_large_object_is_3(jobs, url):
    jobs.write("in/a.csv", csv_rows(500_000))

    answered = jobs.run("run", jobs.job(input={"uri": url}))

    assert answered.code == 3
    assert f"cannot read '{url}'" in answered.err
    assert "range requests" in answered.err
