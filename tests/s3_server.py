"""A real S3 store for one test session: SeaweedFS on free loopback ports, in scratch, gone when the session is."""

import functools
import http.client
import json
import os
import random
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.config
import botocore.session

READY_WITHIN_S = 60
SERVICES = ("master", "volume", "filer", "s3", "admin")

# Waits until its input closes, which happens when this process asks for it and when it dies, however it dies.
# Then kills the server's group and removes its scratch folder and the sockets that it keeps under /tmp.
GUARD = """
read _
kill -9 "-$1"
rm -f $3
for try in 1 2 3 4 5; do rm -rf "$2" && break; sleep 0.2; done
"""


@dataclass(frozen=True)
class S3Server:
    """Where the store answers, and two identities: one that may do everything, one that may only read and list."""

    endpoint: str
    key: str = "testkey"
    secret: str = "testsecret"
    read_only_key: str = "readkey"
    read_only_secret: str = "readsecret"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What s3fs needs, and what a job file says under `storage_options: {s3: ...}`."""
        return {"key": self.key, "secret": self.secret, "client_kwargs": self._client_kwargs}

    @property
    def read_only_storage_options(self) -> dict[str, Any]:
        """The same for the identity that may only read and list."""
        return {"key": self.read_only_key, "secret": self.read_only_secret, "client_kwargs": self._client_kwargs}

    @property
    def _client_kwargs(self) -> dict[str, str]:
        return {"endpoint_url": self.endpoint, "region_name": "us-east-1"}

    def make_client(self, key: str, secret: str) -> Any:
        """A botocore client of its own, so that tests see the store by another road than the package takes."""
        return botocore.session.get_session().create_client(
            "s3",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=botocore.config.Config(proxies={}, retries={"total_max_attempts": 1}),
            **self._client_kwargs,
        )

    @functools.cached_property
    def client(self) -> Any:
        """The client of the identity that may do everything."""
        return self.make_client(self.key, self.secret)

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket; names have 3 to 63 characters."""
        self.client.create_bucket(Bucket=name)

    def remove_bucket(self, name: str) -> None:
        """Remove a bucket with its objects and uploads, which gives its disk volume back."""
        self.client.delete_bucket(Bucket=name)

    def empty_bucket(self, name: str) -> None:
        """Delete every object of a bucket and abort every upload."""
        for key in self.list_keys(name):
            self.client.delete_object(Bucket=name, Key=key)
        for key, upload_id in self.list_uploads(name):
            self.client.abort_multipart_upload(Bucket=name, Key=key, UploadId=upload_id)

    def list_keys(self, name: str) -> list[str]:
        """Every object's key, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=name)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def list_uploads(self, name: str) -> list[tuple[str, str]]:
        """Key and id of every upload that is neither completed nor aborted."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=name)
        return [(found["Key"], found["UploadId"]) for page in pages for found in page.get("Uploads", [])]


@contextmanager
def start_s3_server() -> Iterator[S3Server]:
    """Start the store, wait until it answers, leave nothing of it behind. Raises RuntimeError with its log's end."""
    scratch = Path(tempfile.mkdtemp(prefix="batchpipe-s3-"))
    ports = dict(zip(SERVICES, _find_free_ports(len(SERVICES)), strict=True))
    server = S3Server(f"http://127.0.0.1:{ports['s3']}")
    (scratch / "data").mkdir()
    (scratch / "s3.json").write_text(json.dumps(_identities(server)))
    with (scratch / "log").open("wb") as log:
        weed = subprocess.Popen(
            _weed_command(scratch, ports),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"HOME": str(scratch), "PATH": os.environ["PATH"]},  # it would take AWS_* and S3_BUCKET from ours
            start_new_session=True,
        )
    sockets = " ".join(f"/tmp/seaweedfs-*-{port + grpc}.sock" for port in ports.values() for grpc in (0, 10_000))
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "guard", str(weed.pid), str(scratch), sockets],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _wait_until_ready(weed, ports["s3"], scratch / "log")
        yield server
    finally:
        guard.communicate(timeout=30)  # closes its input
        weed.wait(timeout=30)


def _weed_command(scratch: Path, ports: dict[str, int]) -> list[str]:
    return [
        str(Path(sysconfig.get_path("scripts")) / "weed"),
        f"-logdir={scratch}",
        "-alsologtostderr=false",
        "mini",
        f"-dir={scratch / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{service}.port={port}" for service, port in ports.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={scratch / 's3.json'}",
        "-s3.autoCreateBucket=false",  # a missing bucket is an error here, as it is at AWS
        "-volume.max=100",  # one for each bucket that holds something; by default free disk decides
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
    ]


def _identities(server: S3Server) -> dict[str, Any]:
    def identity(name: str, key: str, secret: str, *actions: str) -> dict[str, Any]:
        return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}

    owner = identity("owner", server.key, server.secret, "Admin", "Read", "Write", "List", "Tagging")
    reader = identity("reader", server.read_only_key, server.read_only_secret, "Read", "List")
    return {"identities": [owner, reader]}


def _find_free_ports(count: int) -> list[int]:
    """Ports that are free and whose gRPC twin, 10,000 above, is free: both below the range for outgoing connections."""
    candidates = random.SystemRandom().sample(range(11_000, 21_000), 1_000)
    free = (port for port in candidates if _is_free(port) and _is_free(port + 10_000))
    return [next(free) for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(weed: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Ask until the store refuses an anonymous listing, which it does as soon as its identities are loaded."""
    deadline = time.monotonic() + READY_WITHIN_S
    while ask_status(port) != http.client.FORBIDDEN:
        if weed.poll() is not None or time.monotonic() > deadline:
            state = "still starts" if weed.poll() is None else f"exited with {weed.returncode}"
            raise RuntimeError(f"SeaweedFS {state} after at most {READY_WITHIN_S} s:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)


def ask_status(port: int) -> int | None:
    """The HTTP status with which 127.0.0.1:port answers a plain GET; None when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
