"""Runs from and to a real S3 store: what is visible when, what is left whatever ends a run, what people are told."""

import hashlib
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as ds
import pytest
import s3fs
import yaml

from batchpipe.cli import run_command_line
from batchpipe.storage import open_store
from tests.jobs import ECHO, GATE, NO_ENGINE, Jobs, Result, open_jobs, until
from tests.s3_proxy import open_proxy
from tests.s3_server import S3Server

if TYPE_CHECKING:
    import subprocess

HERE = Path(__file__).parent.parent

# "big" is more than the 8 MiB that an upload sends at once, so that its upload has begun while "wait" still waits.
WORK = (
    GATE
    + """
def work(rows: list[dict]):
    for row in rows:
        if row["what"] == "wait":
            (HERE / "waiting").touch()
            wait_for("gate")
            if (HERE / "broken").exists():
                raise RuntimeError("broken")
    return [{"what": row["what"] * (3_000_000 if row["what"] == "big" else 1)} for row in rows]
"""
)
FOUR = {"a": "one\n", "b": "two\n", "c": "three\n", "d": "big\nwait\n"}


@dataclass
class Place:
    """A bucket with its inputs, the jobs that run on it, and another road to look at it."""

    server: S3Server
    bucket: str
    jobs: Jobs

    @property
    def environment(self) -> dict[str, str]:
        """How to reach the store without a word in the job file."""
        keys = {"AWS_ACCESS_KEY_ID": self.server.key, "AWS_SECRET_ACCESS_KEY": self.server.secret}
        return {**keys, "AWS_ENDPOINT_URL": self.server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    def put(self, **files: str) -> None:
        """Put CSV files of one column into ``in/``."""
        for name, rows in files.items():
            self.server.client.put_object(Bucket=self.bucket, Key=f"in/{name}.csv", Body=f"what\n{rows}".encode())

    def put_many(self, count: int, every: int) -> None:
        """Put so many objects into ``in/``, of which every tenth (or so) holds a record and the others nothing."""
        store = open_store("s3://", {"s3": self.server.storage_options})
        texts = {f"{number:04}": b"" if number % every else f"what\n{number}\n".encode() for number in range(count)}
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda name: store.put(f"s3://{self.bucket}/in/{name}.csv", texts[name]), texts))

    def job(self, name: str = "job.yaml", options: dict[str, Any] | None = None, **blocks: Any) -> Path:
        """A job on the bucket's inputs, a split for each object, a mini-batch for each record."""
        self.jobs.write("work.py", WORK)
        places = {"input": {"uri": f"s3://{self.bucket}/in"}, "output": {"uri": f"s3://{self.bucket}/out"}}
        blocks = {**places, "compute": {"workers": 1}, "batch": {"max_records": 1, "split_mb": 0.000016}, **blocks}
        storage = {"s3": self.server.storage_options if options is None else options}
        return self.jobs.job("work:work", name, storage_options=storage, **blocks)

    def start(self, job: Path, endpoint: str) -> "subprocess.Popen[str]":
        """Start a job that leaves the store to the environment, through another endpoint."""
        return self.jobs.start("run", job, **{**self.environment, "AWS_ENDPOINT_URL": endpoint})

    def run(self, job: Path, *arguments: str) -> Result:
        """Run such a job to its end."""
        return self.jobs.run("run", job, *arguments, timeout=60, **self.environment)

    def kill(self, process: "subprocess.Popen[str]") -> bool:
        """Kill a run; false, for nothing of it goes on."""
        process.kill()
        return False

    def read(self, key: str) -> bytes:
        return bytes(self.server.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self, pattern: str = "out/") -> list[str]:
        """Keys that begin with the pattern."""
        return [key for key in self.server.list_keys(self.bucket) if re.match(pattern, key)]

    def visible(self) -> list[str]:
        """What somebody sees who lists the output folder, by his own tools."""
        return self.keys("out/(?!_)")

    def sha256(self) -> dict[str, str]:
        """Name and digest of every part."""
        return {key.removeprefix("out/"): hashlib.sha256(self.read(key)).hexdigest() for key in self.visible()}

    def begin_upload(self, key: str) -> str:
        """Begin an upload that is none of ours."""
        return str(self.server.client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"])

    def abort(self, key: str) -> bool:
        """Abort the upload to a key, as a bucket's lifecycle rule does; true when it is done."""
        for found, upload_id in self.server.list_uploads(self.bucket):
            if found == key:
                self.server.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
        return True

    def uploads(self) -> set[str]:
        return {upload_id for _, upload_id in self.server.list_uploads(self.bucket)}

    def journaled(self) -> set[str]:
        """The uploads that the journal names."""
        lines = b"".join(self.read(key) for key in self.keys("out/_batchpipe/[^/]+/journal/")).splitlines()
        splits = [entry for entry in map(json.loads, lines) if entry["type"] == "split"]
        return {entry["piece"]["upload_id"] for entry in splits if entry["piece"]}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        yield jobs


@pytest.fixture
def place(s3_server: S3Server, bucket: str, jobs: Jobs) -> Place:
    return Place(s3_server, bucket, jobs)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a local run makes of the four objects: name and digest of each part."""
    with open_jobs(tmp_path_factory.mktemp("expected")) as jobs:
        for name, rows in FOUR.items():
            jobs.write(f"in/{name}.csv", f"what\n{rows}")
        jobs.write("work.py", WORK)
        jobs.write("gate", "")
        job = jobs.job("work:work", compute={"workers": 1}, batch={"max_records": 1, "split_mb": 0.000016})
        ended = jobs.run("run", job)
        assert ended.code == 0, ended.err
        yield {name: hashlib.sha256(data).hexdigest() for name, data in jobs.part_bytes().items()}


class Blocked:
    """A run that has journaled all that it can and waits in the stage, with an upload begun that nobody journaled."""

    def __init__(self, place: Place) -> None:
        place.put(**FOUR)
        self.job = place.job(on_error={"no_progress_timeout_s": 45})  # with it, it would say what it waits for
        self.process = place.jobs.start("run", self.job)
        until(lambda: self.is_blocked(place), 60)

    def is_blocked(self, place: Place) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        return len(place.journaled()) >= 2 and place.uploads() > place.journaled()

    def end(self, how: str, jobs: Jobs) -> int:
        """End the run, and say how it ended."""
        match how:
            case "kill":
                self.process.kill()
            case "terminate":
                self.process.terminate()
            case "fail":
                jobs.write("broken", "")
                jobs.write("gate", "")
        with self.process:  # reads nothing: it prints less than a pipe holds
            return self.process.wait(30)


@pytest.fixture
def blocked(place: Place) -> Iterator[Blocked]:
    run = Blocked(place)
    yield run
    run.end("kill", place.jobs)


# --- from and to S3 ---


@pytest.fixture(scope="module")
def flights(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The flight job from and to S3, run once, its storage options in its job file."""
    s3_server.make_bucket("flights")
    with open_jobs(tmp_path_factory.mktemp("flights")) as jobs:
        place = Place(s3_server, "flights", jobs)
        for file in sorted((HERE / "sample_data" / "flights").glob("*.csv")):
            s3_server.client.put_object(Bucket="flights", Key=f"in/{file.name}", Body=file.read_bytes())
        job = yaml.safe_load((HERE / "jobs" / "flight_delays.yaml").read_text())
        job["output"]["uri"] = "s3://flights/out"
        job |= {"python_path": [str(HERE / "jobs")], "storage_options": {"s3": s3_server.storage_options}}
        ran = jobs.run("run", jobs.write("job.yaml", yaml.safe_dump(job)), "--set", "input.uri=s3://flights/in/*.csv")
        assert ran.code == 0, ran.err
        jobs.write("printed", ran.out + ran.err)
        yield place
    s3_server.remove_bucket("flights")


def test_the_flight_job_gives_the_same_bytes_as_a_local_run_g4(flights: Place):
    local = flights.jobs.run("run", HERE / "jobs" / "flight_delays.yaml", "--set", f"output.uri={flights.jobs.out}")

    assert local.code == 0, local.err
    parts = flights.jobs.part_bytes()
    assert flights.sha256() == {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    assert flights.uploads() == set()


def test_other_tools_read_the_folder_as_it_is(flights: Place):
    files = s3fs.S3FileSystem(**flights.server.storage_options, skip_instance_cache=True)

    assert ds.dataset("flights/out", filesystem=files).count_rows() == 30_354


def test_no_secret_is_printed_or_written_g7(flights: Place):
    texts = {"printed": (flights.jobs.folder / "printed").read_bytes()}
    texts |= {key: flights.read(key) for key in flights.keys("out/_batchpipe")}

    assert "out/_batchpipe/manifest.json" in texts
    assert [name for name, text in texts.items() if re.search(b"testsecret|testkey", text)] == []


def verify(place: Place) -> int:
    return run_command_line(["verify", str(place.jobs.folder / "job.yaml")])


@contextmanager
def tampered(place: Place, key: str, how: str) -> Iterator[None]:
    """An object of the output, changed by another road than ours and then put right."""
    data, where = place.read(key), {"Bucket": place.bucket, "Key": key}
    if how == "missing":
        place.server.client.delete_object(**where)
    else:
        place.server.client.put_object(**where, Body=data[:50] + bytes([data[50] ^ 1]) + data[51:])
    yield
    place.server.client.put_object(**where, Body=data)


@pytest.mark.parametrize(("how", "text"), [("flipped", "was changed: its SHA-256"), ("missing", "is missing")])
def test_verify_finds_a_part_that_is_not_as_published(
    flights: Place, how: str, text: str, capsys: pytest.CaptureFixture[str]
):
    key = flights.visible()[3]
    with tampered(flights, key, how):
        assert verify(flights) == 7

    assert f"{key.removeprefix('out/')} {text}" in capsys.readouterr().err
    assert verify(flights) == 0


def test_verify_finds_a_foreign_part_also_by_uri_and_environment(flights: Place):
    flights.server.client.put_object(Bucket="flights", Key="out/part-9.parquet", Body=b"")
    found = flights.jobs.run("verify", "s3://flights/out", timeout=60, **flights.environment)
    flights.server.client.delete_object(Bucket="flights", Key="out/part-9.parquet")

    assert (found.code, "part-9.parquet is no part of this run" in found.err) == (7, True), found.err


def test_many_small_objects_are_few_splits_and_the_environment_suffices(place: Place):
    place.put_many(1_100, every=10)
    place.jobs.write("stages.py", ECHO)
    uris: dict[str, Any] = {
        "input": {"uri": f"s3://{place.bucket}/in/*.csv"},
        "output": {"uri": f"s3://{place.bucket}/out"},
    }
    ran = place.run(place.jobs.job(**uris), "--json")

    assert ran.code == 0, ran.err
    assert (ran.manifest["inputs"]["rows"], ran.manifest["splits"]) == (1_100, 2)
    lines = b"".join(map(place.read, place.visible())).splitlines()
    assert [json.loads(line)["what"] for line in lines] == list(range(0, 1_100, 10))


# --- while it runs ---


def test_nothing_is_seen_before_it_is_published_and_a_second_run_is_sent_away_g2(place: Place, blocked: Blocked):
    second = place.jobs.run("run", blocked.job)

    assert place.visible() == []
    assert len(place.uploads()) >= 3
    assert second.code == 75
    told = rf"error: run \w{{8}} on .*, pid {blocked.process.pid}, since .* holds this output\n  where: s3://"
    assert re.match(told, second.err), second.err


@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("terminate", 143), ("fail", 5)])
def test_a_run_that_ends_early_leaves_what_its_journal_names_and_resumes_g5(
    place: Place, blocked: Blocked, expected: dict[str, str], how: str, code: int
):
    assert blocked.end(how, place.jobs) == code
    until(lambda: place.uploads() == place.journaled() and place.jobs.is_released())
    assert len(place.journaled()) >= 2
    (place.jobs.folder / "broken").unlink(missing_ok=True)
    place.jobs.write("gate", "")
    resumed = place.jobs.run("run", blocked.job)

    assert resumed.code == 0, resumed.err
    assert (place.sha256(), place.uploads()) == (expected, set())


def test_a_killed_run_s_lock_is_taken_over_at_once_and_restart_drops_its_uploads(place: Place, blocked: Blocked):
    keys = ("out/theirs.bin", "out/theirs.out", "out/part-00000-7d1f.c000.snappy.parquet")
    theirs = {place.begin_upload(key) for key in keys}
    place.jobs.write("gate", "")
    blocked.end("kill", place.jobs)
    other = ["run", str(blocked.job), "--set", "batch.max_records=2"]
    refused = place.jobs.run(*other)
    restarted = place.jobs.run(*other, "--restart")

    assert (refused.code, "batch.max_records was 1, is 2" in refused.err, "--restart" in refused.err) == (2, True, True)
    assert restarted.code == 0, restarted.err
    assert place.uploads() == theirs
    assert run_command_line(["verify", str(blocked.job)]) == 0


@pytest.mark.parametrize(
    ("layout", "late", "other"),
    [("parts", "part-00000000.jsonl", "theirs.out"), ("mirror", "a.csv.out", "theirs.bin")],
)
def test_a_run_that_is_done_discards_what_a_late_writer_left_and_no_upload_of_others_g5(
    place: Place, layout: str, late: str, other: str
):
    place.put(a="one\n")
    job = place.job(output={"uri": f"s3://{place.bucket}/out", "layout": layout})
    first = place.jobs.run("run", job)
    assert (first.code, place.uploads()) == (0, set()), first.err
    place.begin_upload(f"out/{late}")
    theirs = place.begin_upload(f"out/{other}")

    again = place.jobs.run("run", job)

    assert (again.code, "nothing to do" in again.out) == (0, True), again.err
    assert place.uploads() == {theirs}


def test_clean_discards_the_uploads_that_a_power_cut_left_and_those_of_the_run_only_if_told_g5(
    place: Place, blocked: Blocked
):
    processes = place.jobs.processes()
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none must see another one's end
        for process in processes:
            process.send_signal(number)
    until(lambda: not place.jobs.processes())
    kept = place.journaled()
    assert place.uploads() > kept

    output = [str(blocked.job), "--unfinished"]
    listed = place.jobs.run("ps", output[0], PATH=NO_ENGINE)
    first = place.jobs.run("clean", output[0], PATH=NO_ENGINE)
    left = place.uploads()
    second = place.jobs.run("clean", *output, PATH=NO_ENGINE)

    assert f"s3://{place.bucket}/out/part-" in listed.out, listed.err
    assert (first.code, left) == (0, kept), first.err
    assert (second.code, place.uploads()) == (0, set()), second.err


def test_a_lost_worker_s_upload_is_given_back_at_the_end_g5(place: Place, blocked: Blocked, expected: dict[str, str]):
    for worker in place.jobs.processes("batchpipe.worker"):
        worker.kill()
    place.jobs.write("gate", "")

    assert blocked.process.wait(60) == 0
    assert (place.sha256(), place.uploads()) == (expected, set())


def test_a_run_that_is_killed_while_it_publishes_rolls_forward_g2(place: Place, expected: dict[str, str]):
    place.put(**FOUR)
    place.jobs.write("gate", "")
    job = place.job(options={})
    with open_proxy(place.server.endpoint) as proxy, place.start(job, proxy.endpoint) as process:
        proxy.after_completions(2, act=lambda: place.kill(process))
        assert process.wait(60) == -signal.SIGKILL
    assert (len(place.visible()), place.keys("out/_batchpipe/manifest.json")) == (2, [])
    ended = place.run(job)

    assert ended.code == 0, ended.err
    assert (place.sha256(), place.uploads()) == (expected, set())


def test_a_piece_that_somebody_removed_before_it_was_published_is_made_anew(place: Place, expected: dict[str, str]):
    place.put(**FOUR)
    place.jobs.write("gate", "")
    job = place.job(options={})
    with open_proxy(place.server.endpoint) as proxy, place.start(job, proxy.endpoint) as process:
        proxy.after_completions(0, act=lambda: place.abort("out/part-00000002.jsonl"))
        _, err = process.communicate(timeout=60)
    assert (process.returncode, len(place.visible())) == (7, 3), err
    assert re.search("^error: somebody removed 1 of the pending pieces before they were published$", err, re.M)
    ended = place.run(job)

    assert ended.code == 0, ended.err
    assert (place.sha256(), place.uploads()) == (expected, set())


def test_an_object_that_is_overwritten_during_the_run_is_named(place: Place):
    place.put(a="wait\n", b="one\n", c="two\n")
    with place.jobs.start("run", place.job()) as process:
        until((place.jobs.folder / "waiting").exists, 60)
        place.put(c="six\n")
        place.jobs.write("gate", "")
        _, err = process.communicate(timeout=60)

    assert (process.returncode, place.uploads() - place.journaled()) == (3, set())
    assert f"cannot read 's3://{place.bucket}/in/c.csv': it changed since it was listed" in err


def test_a_store_that_goes_away_is_told_in_one_line(place: Place):
    place.put(**FOUR)
    patience = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    job = place.job(options=patience)
    with open_proxy(place.server.endpoint) as proxy, place.start(job, proxy.endpoint) as process:
        until(lambda: len(place.journaled()) >= 2 and place.uploads() > place.journaled(), 60)
        proxy.may_pass = lambda _: False
        place.jobs.write("gate", "")
        _, err = process.communicate(timeout=60)

    assert (process.returncode, len(told(err))) == (7, 1), err
    assert re.match(rf"error: cannot write 's3://{place.bucket}/out/.*': no answer from ", told(err)[0])


def told(err: str) -> list[str]:
    """The errors in what a run printed beside its progress."""
    assert "Traceback" not in err, err
    return re.findall(r"^error: .*$", err, re.M)


def test_a_finished_output_is_replaced_when_the_job_says_so(place: Place):
    place.put(a="one\n", b="two\n")
    first = place.jobs.run("run", place.job())
    before = place.visible()
    place.put(b="three\n")
    second = place.jobs.run("run", place.job(output={"uri": f"s3://{place.bucket}/out", "if_exists": "replace"}))

    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert b"".join(map(place.read, place.visible())) == b'{"what":"one"}\n{"what":"three"}\n'
    assert set(before).isdisjoint(place.visible())
    assert run_command_line(["verify", str(place.jobs.folder / "job.yaml")]) == 0


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_finished_output_that_lost_something_is_not_done_and_made_anew_when_told_to(place: Place, how: str):
    place.put(a="one\n", b="two\n", c="three\n")
    job = place.job()
    assert place.jobs.run("run", job).code == 0
    assert "nothing to do" in place.jobs.run("run", job).out
    sound, key = place.sha256(), place.visible()[1]
    if how == "missing":
        place.server.client.delete_object(Bucket=place.bucket, Key=key)
    else:
        place.server.client.put_object(Bucket=place.bucket, Key=key, Body=place.read(key)[:-1])

    refused, restarted = place.jobs.run("run", job), place.jobs.run("run", job, "--restart")

    said = {"missing": "is missing", "cut": "has 14 bytes, published were 15"}[how]
    assert refused.code == 7
    assert re.search(rf"run \w+ published: part-00000001.jsonl {said}\n  where: s3://{place.bucket}/out\n", refused.err)
    assert (restarted.code, place.sha256()) == (0, sound), restarted.err
    assert "nothing to do" in place.jobs.run("run", job).out


# --- what people are told ---


def wrong(place: Place, what: str) -> tuple[str, dict[str, Any]]:
    """A bucket and storage options, one of which is wrong."""
    options = place.server.storage_options
    nobody = {"endpoint_url": "http://127.0.0.1:1", "region_name": "us-east-1"}
    patience = {"retries": {"total_max_attempts": 2}}
    return {
        "no such key": (place.bucket, {**options, "key": "nobodykey"}),
        "wrong secret": (place.bucket, {**options, "secret": "wrongsecret"}),
        "no bucket": ("no-such-bucket", options),
        "read-only": (place.bucket, place.server.read_only_storage_options),
        "nobody there": (place.bucket, {**options, "client_kwargs": nobody, "config_kwargs": patience}),
    }[what]


TOLD = {
    "no such key": "the store does not know this access key",
    "wrong secret": "the secret key does not belong to the access key",
    "no bucket": "the bucket 'no-such-bucket' does not exist",
    "read-only": "access denied",
    "nobody there": "no answer from http://127.0.0.1:1",
}


@pytest.mark.parametrize(
    ("side", "what"),
    [(side, what) for side in ("input", "output") for what in TOLD if (side, what) != ("input", "read-only")],
)
def test_what_is_wrong_with_the_store_is_one_line_and_the_right_exit_code(
    place: Place, side: str, what: str, capsys: pytest.CaptureFixture[str]
):
    bucket, options = wrong(place, what)
    place.put(a="one\n")
    blocks: dict[str, Any] = {side: {"uri": f"s3://{bucket}/x", "storage_options": {"s3": options}}}
    code = run_command_line(["run", str(place.job(**blocks)), "-q"])

    out, err = capsys.readouterr()
    expected = 3 if side == "input" else 7
    assert (code, out, len(told(err))) == (expected, "", 1), err
    assert re.match(rf"error: cannot \w+ 's3://{bucket}/x.*': {TOLD[what]}", err), err
    assert not re.search("nobodykey|wrongsecret|testsecret|readsecret", err)
