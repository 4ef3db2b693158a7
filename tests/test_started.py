"""What `ps` and `clean` see of a container engine that does not answer, or whose containers vanish meanwhile."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from batchpipe.leftovers import clean_host
from batchpipe.processes import OWNER_FILE, SCRATCH_PREFIX
from batchpipe.stages.engine import RUN_LABEL, Engine
from batchpipe.stages.leftovers import find_started
from batchpipe.storage import owner
from tests import images
from tests.jobs import Jobs

Script = Callable[[str], str]


@pytest.fixture
def docker(tmp_path: Path) -> Script:
    """Write a command that is named docker, as shell; give the folder it lies in."""

    def write(text: str) -> str:
        command = tmp_path / "bin" / "docker"
        command.parent.mkdir()
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
        return str(command.parent)

    return write


@pytest.mark.parametrize(("verb", "answer"), [("ps", "nothing held\n"), ("clean", "nothing to clean\n")])
def test_engine_that_does_not_answer_is_told(tmp_path: Path, docker: Script, verb: str, answer: str):
    folder = docker("echo 'Cannot connect to the daemon' >&2; exit 1")

    ran = Jobs(tmp_path).run(verb, PATH=folder)

    assert (ran.code, ran.out) == (0, answer)
    why = "no container engine answers: docker does not answer (Cannot connect to the daemon); podman is not installed"
    assert ran.err == f"note: containers were not looked at: {why}\n"


def test_what_cannot_be_removed_is_told_and_not_said_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    scratch = tmp_path / f"{SCRATCH_PREFIX}left"
    scratch.mkdir()
    gone = {**owner.this_process({"run": "r1"}), "pid": 2**22 - 1}
    (scratch / OWNER_FILE).write_bytes(owner.to_bytes(gone))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as where somebody else's files lie in it
    notes: list[str] = []

    assert clean_host(notes.append) == []

    [note] = notes
    assert note.startswith("not removed: scratch    orphan     r1 ")
    assert note.endswith(str(scratch))


@pytest.fixture
def two(engine: str) -> Iterator[list[str]]:
    """The names of two containers of a run."""
    names = [f"batchpipe-test-{uuid4().hex}" for _ in range(2)]
    for name in names:
        images.run(engine, "create", f"--name={name}", f"--label={RUN_LABEL}=r1", images.stage_image(engine))
    yield names
    for name in names:
        images.run(engine, "rm", "--force", name)


def test_container_that_vanishes_meanwhile_does_not_hide_the_others(
    engine: str, docker: Script, tmp_path: Path, two: list[str]
):
    real, flag = shutil.which(engine), tmp_path / "flag"
    flag.touch()
    vanish = f'[ "$2" = inspect ] && [ -e {flag} ] && rm {flag} && {real} rm --force {two[0]} >/dev/null'
    folder = docker(f'{vanish}\nexec {real} "$@"')

    found = find_started(Engine(engine, f"{folder}/docker"))

    assert [each.name for each in found if each.name in two] == [two[1]]
    assert not flag.exists()
