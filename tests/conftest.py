"""Fixtures that every test may ask for: a clean environment, a real S3 store, a container engine."""

import functools
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.jobs import hear_signals
from tests.s3_server import S3Server, start_s3_server

# Time says nothing here: the cores are shared, and a property is no benchmark.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

ENGINES = ["docker", "podman"]

# The engine that CI insists on, where a skip is a failure. Read before `clean_environ` takes it away.
REQUIRED = os.environ.get("BATCHPIPE_REQUIRE", "")


hear_signals()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks for an engine, so that `-m "not container"` needs no marks by hand."""
    for item in items:
        if "engine" in getattr(item, "fixturenames", ()):
            item.add_marker("container")
        if item.get_closest_marker("container"):
            # One process builds the images, and the others need not wait for it.
            item.add_marker(pytest.mark.xdist_group("container"))


class FailuresToldAtOnce:
    """Prints what failed where it fails, too: who ends a suite that hangs never sees the summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.nodeid} ({report.when}) failed:\n{report.longreprtext}", red=True)


@pytest.hookimpl(trylast=True)  # once there is a terminal reporter; a process that only runs tests has none of its own
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresToldAtOnce(terminal))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip here and not in a fixture: all such skips then share one line of the report."""
    if not item.get_closest_marker("container") or find_engine():
        return
    if REQUIRED:
        pytest.fail(f"BATCHPIPE_REQUIRE={REQUIRED}, but no such engine answers its `info`", pytrace=False)
    pytest.skip("no container engine answers `docker info` or `podman info`; start one to run these tests")


@pytest.fixture(scope="session", autouse=True)
def clean_environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No settings, credentials or caches of whoever runs the tests; to set a variable, a test uses monkeypatch."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "BATCHPIPE_"))]:
            patch.delenv(name)
        named = Path(os.environ.get("DOCKER_CONFIG", Path.home() / ".docker"))
        if (named / "config.json").exists():  # podman refuses a folder without one
            patch.setenv("DOCKER_CONFIG", str(named))  # which engine the command speaks to
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # without credentials botocore would ask the network
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 store, started once: see `S3Server` for its endpoint, identities and helpers."""
    with start_s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[str]:
    """The name of a fresh, empty bucket."""
    name = f"test-{uuid.uuid4().hex}"
    s3_server.make_bucket(name)
    yield name
    s3_server.remove_bucket(name)


@pytest.fixture(scope="session")
def engine() -> str:
    """The command of an engine that answers: docker or podman."""
    found = find_engine()
    assert found, "pytest_runtest_setup lets no test come here without one"
    return found


@functools.cache
def find_engine() -> str | None:
    """The first engine that answers. With BATCHPIPE_REQUIRE=docker (or podman) only that one will do."""
    wanted = [REQUIRED] if REQUIRED else ENGINES
    return next((name for name in wanted if _answers(name)), None)


def _answers(name: str) -> bool:
    if not shutil.which(name):
        return False
    try:
        return subprocess.run([name, "info"], capture_output=True, check=False, timeout=30).returncode == 0
    except subprocess.TimeoutExpired:
        return False
