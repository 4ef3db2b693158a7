"""Fixtures that every test may ask for: a clean environment, a real S3 store, a container engine."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from tests.s3_server import S3Server, start_s3_server

# Read before `clean_environ` takes it away: a comma-separated list of what may not be skipped.
REQUIRED = os.environ.get("BATCHPIPE_REQUIRE", "").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks for an engine, so that `-m "not container"` needs no marks by hand."""
    for item in items:
        if "engine" in getattr(item, "fixturenames", ()):
            item.add_marker("container")


@pytest.fixture(scope="session", autouse=True)
def clean_environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No settings, credentials or caches of whoever runs the tests; to set a variable, a test uses monkeypatch."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "BATCHPIPE_"))]:
            patch.delenv(name)
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
    """The command of an engine that answers: docker or podman. With BATCHPIPE_REQUIRE=docker a skip is a failure."""
    for name in ("docker", "podman"):
        if name in REQUIRED and not _answers(name):
            pytest.fail(f"BATCHPIPE_REQUIRE={name}, but `{name} info` does not answer", pytrace=False)
    for name in ("docker", "podman"):
        if _answers(name):
            return name
    pytest.skip("no container engine answers `docker info` or `podman info`; start one to run these tests")


@pytest.fixture(autouse=True)
def _container_needs_engine(request: pytest.FixtureRequest) -> None:
    """A test marked `container` needs the engine also when it does not ask for its name."""
    if request.node.get_closest_marker("container"):
        request.getfixturevalue("engine")


def _answers(engine: str) -> bool:
    if not shutil.which(engine):
        return False
    try:
        return subprocess.run([engine, "info"], capture_output=True, check=False, timeout=30).returncode == 0
    except subprocess.TimeoutExpired:
        return False
