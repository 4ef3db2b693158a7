"""The house's own tools: do `make` and the shared fixtures say what a newcomer needs to know?"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_make(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env={**own, **environ}, capture_output=True, text=True, check=False
    )


def run_pytest(folder: Path, test: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one test under our conftest, in a process where no engine can be found and nothing else is set."""
    (folder / "test_inner.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = container\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-rs", *arguments, str(folder)],
        cwd=folder,
        env={"PATH": str(folder), "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plain_make_prints_every_target_and_what_it_does():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None

    listed = [line.split(maxsplit=1) for line in run_make().stdout.splitlines()]

    assert [name for name, _ in listed] == targets[1].split()


def test_make_names_the_remedy_for_a_missing_or_old_python(tmp_path: Path):
    done = run_make("run", "PYTHON=false", f"VENV={tmp_path}/venv")

    assert done.stderr.startswith("error: 'false' is not a Python >= 3.11; next: make PYTHON=/path/to/python3.11\n")


def test_make_names_the_remedy_for_a_python_without_venv(tmp_path: Path):
    (tmp_path / "ensurepip.py").write_text("raise ImportError")

    done = run_make("run", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv", PYTHONPATH=str(tmp_path))

    assert done.stderr.startswith(f"error: '{sys.executable}' has no venv module; next: apt install python3-venv\n")


def test_ci_scripts_are_valid_and_run_the_same_commands_as_people():
    script = ROOT / ".ci" / "run"

    for each in (script, ROOT / ".ci" / "podman"):
        subprocess.run(["bash", "-n", each], check=True)

    assert script.read_text().endswith("\nmake lint\nmake test\n")


ASKS_FOR_ENGINE = "def test_first(engine): pass\ndef test_second(engine): pass\n"


def test_container_tests_without_an_engine_are_skipped_in_one_line(tmp_path: Path):
    done = run_pytest(tmp_path, ASKS_FOR_ENGINE)

    skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skips) == 1
    assert re.search(r"\[2\] .*: no container engine answers `docker info` or `podman info`; start one", skips[0])


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_container_tests_without_a_required_engine_fail(tmp_path: Path, name: str):
    done = run_pytest(tmp_path, ASKS_FOR_ENGINE, BATCHPIPE_REQUIRE=name)

    assert f"BATCHPIPE_REQUIRE={name}, but no such engine answers its `info`" in done.stdout
    assert "2 errors" in done.stdout


def test_container_mark_asks_for_the_engine(tmp_path: Path):
    done = run_pytest(tmp_path, "import pytest\n@pytest.mark.container\ndef test_marked(): pass\n")

    assert "1 skipped" in done.stdout


def test_asking_for_the_engine_marks_a_test(tmp_path: Path):
    done = run_pytest(tmp_path, ASKS_FOR_ENGINE, "-m", "not container")

    assert "2 deselected" in done.stdout


def test_tests_see_no_settings_of_the_person_who_runs_them(tmp_path: Path):
    test = """
import os
def test_environ():
    assert "AWS_PROFILE" not in os.environ and "BATCHPIPE_HOME" not in os.environ
    assert "home" in os.environ["HOME"] and os.environ["HOME"] != "/home/someone"
"""
    done = run_pytest(tmp_path, test, AWS_PROFILE="mine", BATCHPIPE_HOME="mine", HOME="/home/someone")

    assert "1 passed" in done.stdout, done.stdout
