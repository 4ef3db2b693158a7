"""After a first error: the mended job runs without more ado, and what cannot be done yet is refused, not left out."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.jobs import ECHO, Jobs, csv_rows, open_jobs

RAISES = """
from pathlib import Path

def broken(frame: pd.DataFrame):
    return frame.assign(square=frame.m**2)

def picky(frame: pd.DataFrame):
    if (Path(__file__).parent / "gone").exists():
        gone = ConnectionError("the model server is gone")
        gone.retry = True
        raise gone
    assert not (frame.n % 10 == 7).any(), "seven"
    return frame
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
    assert "stages.py:10 in broken" in first.err

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


class Ranged(Quiet):
    """A file server that gives the part of a file that it is asked for."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def url(jobs: Jobs, request: pytest.FixtureRequest) -> Iterator[str]:
    handler = partial(getattr(request, "param", Quiet), directory=str(jobs.folder / "in"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.csv"
        server.shutdown()


def test_input_may_be_any_url_that_fsspec_reads(jobs, url):
    answered = jobs.run("run", jobs.job(input={"uri": url}), "--json")

    assert answered.code == 0, answered.err
    assert answered.manifest["accounts"]["written"] == 20


@pytest.mark.parametrize("url", [Ranged], indirect=True)
def test_G7_a_password_in_the_url_of_an_input_is_written_nowhere_and_its_records_can_be_redriven(jobs, url):
    secret = url.replace("http://", "http://user:s3cr3t-pass@")
    stages = [{"callable": "stages:picky", "invocations_max_retries": 1}]
    job = jobs.job(stages, input={"uri": secret}, on_error={"max_failed_records": 2})

    told = [jobs.run("run", job, "--set", "input.columns=[nothing]"), jobs.run("run", job)]
    jobs.write("gone", "")
    told.append(jobs.run("redrive", job))

    assert [one.code for one in told] == [3, 0, 5], told
    assert "s3cr3t-pass" not in str(told)
    assert f"which is not a column of '{url}'" in told[0].err
    assert "fails for whatever it is sent, also for a record that it answered before" in told[2].err
    written = [path for path in jobs.out.rglob("*") if path.is_file()]
    assert not [path for path in written if b"s3cr3t-pass" in path.read_bytes()]


def test_a_server_that_cannot_give_a_part_of_a_large_object_is_3(jobs, url):
    jobs.write("in/a.csv", csv_rows(500_000))

    answered = jobs.run("run", jobs.job(input={"uri": url}))

    assert answered.code == 3
    assert f"cannot read '{url}'" in answered.err
    assert "range requests" in answered.err
