"""What a run's id follows from beside the job file: the images and models behind names. A resume says what changed."""

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchpipe.fingerprint import Fingerprint, make_fingerprint
from batchpipe.jobfile import load_job
from batchpipe.plan import list_inputs
from tests import images
from tests.jobs import Jobs, open_jobs, until
from tests.opened_stage import SERVER
from tests.s3_server import S3Server

SPLITS = {"max_records": 1, "split_mb": 0.0001}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """A folder of jobs; the engine, if there is one, is the one of the tests."""
    with open_jobs(tmp_path / "jobs") as jobs:
        jobs.write("in/a.csv", "".join(f"{n},x\n" for n in range(200)) + "!slow 60\n")
        yield jobs


@pytest.fixture
def tag(engine: str) -> Iterator[str]:
    """A name that can be given to images."""
    name = f"batchpipe-test-tag:{uuid.uuid4().hex[:12]}"
    yield name
    subprocess.run([engine, "rmi", "--force", name], capture_output=True, check=False)


def build(engine: str, tag: str, folder: Path, version: int) -> None:
    """Give the name to another image that serves alike."""
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text(f"FROM {images.stage_image(engine)}\nLABEL version={version}\n")
    images.build(engine, tag, folder)


def write_job(jobs: Jobs, *stages: dict[str, Any], **blocks: Any) -> Path:
    uri, where = {"uri": "in", "header": False}, {"uri": "out", "format": "raw"}
    return jobs.job(list(stages), input=uri, output=where, batch=SPLITS, **blocks)


def process(name: str, **block: Any) -> dict[str, Any]:
    return {"name": name, "process": {"command": SERVER, **block}}


def container(name: str, image: str) -> dict[str, Any]:
    return {"name": name, "container": {"image": image}}


def kill_half_way(jobs: Jobs, job: Path) -> None:
    run = jobs.start("run", job)
    until(lambda: any('"split"' in path.read_text() for path in jobs.hidden("*/journal/0*.jsonl")), within_s=60)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    until(jobs.is_released)


def fingerprint(jobs: Jobs, job: Path) -> Fingerprint:
    loaded = load_job(job)
    return make_fingerprint(loaded, list_inputs(loaded.input, jobs.folder))


def versions(jobs: Jobs, job: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = fingerprint(jobs, job).document["versions"]
    return found


def test_G3_resume_with_an_image_rebuilt_under_its_tag_is_refused_and_named(jobs: Jobs, engine: str, tag: str):
    build(engine, tag, jobs.folder / "context", 1)
    job = write_job(jobs, process("first"), container("model", tag))
    before = versions(jobs, job)["model"]["image"]
    kill_half_way(jobs, job)
    build(engine, tag, jobs.folder / "context", 2)

    again = jobs.run("run", job)

    after = versions(jobs, job)["model"]["image"]
    assert again.code == 2
    assert "of another job or input" in again.err
    assert f"changed: stage 'model': image was {before[:12]}, is {after[:12]}\n" in again.err
    assert again.err.count("changed: ") == 1
    assert "undo the change to resume it, or add --restart to drop it and begin anew" in again.err


def test_G3_resume_with_another_model_is_refused_and_named(jobs: Jobs):
    jobs.write("model/weights.bin", b"1")
    job = write_job(jobs, process("model", model_data="model"), process("last"))
    kill_half_way(jobs, job)
    jobs.write("model/weights.bin", b"22")

    again = jobs.run("run", job)

    assert again.code == 2
    assert "changed: stage 'model': model_data was " in again.err
    assert again.err.count("changed: ") == 1


def test_G3_a_finished_run_whose_model_changed_is_not_taken_for_done(jobs: Jobs):
    jobs.write("in/a.csv", "1\n")
    jobs.write("model/weights.bin", b"1")
    job = write_job(jobs, process("model", model_data="model"))
    assert jobs.run("run", job, "--run-id", "nightly").code == 0
    same = jobs.run("run", job, "--run-id", "nightly")
    jobs.write("model/weights.bin", b"22")

    other = jobs.run("run", job, "--run-id", "nightly")

    assert (same.code, other.code) == (0, 2)
    assert "error: run nightly is finished, and its job, inputs, code, images or models have changed since" in other.err


@pytest.mark.parametrize("where", ["folder", "archive", "s3 folder", "s3 archive"])
def test_a_model_is_told_from_another_one_of_the_same_size(jobs: Jobs, where: str, s3_server: S3Server, bucket: str):
    name = "model" if "folder" in where else "model.tar.gz"
    file = f"{name}/weights.bin" if "folder" in where else name
    uri, options = (f"s3://{bucket}/{name}", {"s3": s3_server.storage_options}) if "s3" in where else (name, {})

    def write(content: bytes) -> None:
        if "s3" in where:
            s3_server.client.put_object(Bucket=bucket, Key=file, Body=content)
        else:
            os.utime(jobs.write(file, content), ns=(0, content[0]))

    job = write_job(jobs, process("model", model_data=uri), storage_options=options)
    write(b"1")
    first, same = versions(jobs, job), versions(jobs, job)
    write(b"2")

    assert first == same
    assert first["model"]["model_data"] != versions(jobs, job)["model"]["model_data"]


def test_a_model_that_is_not_there_is_left_out(jobs: Jobs):
    assert versions(jobs, write_job(jobs, process("model", model_data="model"))) == {"model": {}}


@pytest.fixture
def asked(jobs: Jobs, engine: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The engine's commands from here on; its `pull` gives an image of ours the name."""
    log, real = jobs.folder / "asked", shutil.which(engine)
    image = images.stage_image(engine)
    script = f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = pull ] && exec {real} tag {image} "$3"\nexec {real} "$@"\n'
    jobs.write(f"bin/{engine}", script).chmod(0o755)
    monkeypatch.setenv("PATH", f"{jobs.folder / 'bin'}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_the_engine_is_asked_once_for_each_image(jobs: Jobs, engine: str, tag: str, asked: Callable[[], list[str]]):
    image = images.stage_image(engine)
    images.run(engine, "tag", image, tag)
    job = write_job(jobs, container("a", tag), container("b", tag), container("c", image))
    before = len(asked())

    found = versions(jobs, job)

    assert len({found[name]["image"] for name in "abc"}) == 1
    assert sorted(line.split()[0] for line in asked()[before:]) == ["image", "image", "version"]


def test_the_engine_is_not_asked_for_stages_of_other_kinds(jobs: Jobs, asked: Callable[[], list[str]]):
    versions(jobs, write_job(jobs, process("model")))

    assert asked() == []


def test_a_run_id_does_not_change_by_pulling_the_image(jobs: Jobs, tag: str, asked: Callable[[], list[str]]):
    job = write_job(jobs, container("model", tag))

    first = fingerprint(jobs, job).sha256

    assert any(line.startswith("pull ") for line in asked())
    assert first == fingerprint(jobs, job).sha256


def test_plan_does_not_pull(jobs: Jobs, tag: str, asked: Callable[[], list[str]]):
    assert jobs.run("plan", write_job(jobs, container("model", tag)), PATH=os.environ["PATH"]).code == 0

    assert any(line.startswith("image inspect ") for line in asked())
    assert not any(line.startswith("pull ") for line in asked())


def test_without_an_engine_an_image_is_known_by_its_name(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    job = write_job(jobs, container("model", "model:1"))
    monkeypatch.setenv("PATH", str(jobs.folder))

    assert versions(jobs, job) == {"model": {}}


def test_on_a_cluster_the_drivers_images_and_models_say_nothing(jobs: Jobs, asked: Callable[[], list[str]]):
    jobs.write("model/weights.bin", b"1")
    stages = [container("model", "model:1"), process("last", model_data="model")]
    job = write_job(jobs, *stages, compute={"cluster": {"address": "tcp://127.0.0.1:8786"}})

    assert versions(jobs, job) == {"model": {}, "last": {}}
    assert asked() == []
