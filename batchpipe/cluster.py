"""The Dask cluster of a run: this machine's workers or those that the job names, connected, leased and let go.

One of the two doors to Dask; `pool` streams tasks through the client that is opened here.
"""

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import dask
from distributed import Client, LocalCluster, Security
from distributed.exceptions import WorkerStartTimeoutError

from batchpipe.errors import JobError, PoolError
from batchpipe.job import ClusterByAddress, ClusterByClass, ComputeSpec, WorkerRange
from batchpipe.processes import QUIET_DASK, WorkerProcesses


class _Closable(Protocol):
    def close(self) -> object: ...


Opened = TypeVar("Opened", bound=_Closable)
WORKERS_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
LEASE_RENEWED_S = 2.0
RELEASE_TIMEOUT_S = 20.0
LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Lease:
    """How workers that outlive the driver know that it lives: `renew(*args)` runs on each of them every few seconds.

    A worker whose lease lapses releases by itself what it holds for the run; `end` makes it do so at once.
    """

    renew: Callable[..., None]
    end: Callable[..., None]
    args: tuple[Any, ...]
    is_for_local_workers: bool
    """Whether also local workers must end it before they are killed: they hold processes that want to be asked."""


@contextlib.contextmanager
def open_client(
    compute: ComputeSpec, processes: WorkerProcesses | None, lease: Lease, scratch: Path
) -> Iterator[Client]:
    """Connect to the job's workers: the local `processes`, or the cluster that the job names.

    Raises PoolError if no worker comes, JobError if the cluster's class cannot be imported.
    """
    with contextlib.ExitStack() as release:
        # A scheduler makes a folder too and leaves it: in our scratch it goes with the rest.
        release.enter_context(dask.config.set({"temporary-directory": str(scratch)}))
        if processes is not None:
            client = _open_local(processes, release)
            if lease.is_for_local_workers:
                release.callback(_end, client, lease)
        else:
            client = _open_foreign(compute, release)
        _wait_for_worker(client, processes)
        if processes is None:
            release.enter_context(_renewing(client, lease))
        yield client


def _open_local(processes: WorkerProcesses, release: contextlib.ExitStack) -> Client:
    security = Security.temporary()
    settings = {
        **QUIET_DASK,
        "distributed.scheduler.http.routes": [],
        # A death is reported at once: the window counts them itself (see `Pool.stream`).
        "distributed.scheduler.allowed-failures": 0,
        "distributed.comm.timeouts.connect": "10s",
    }
    release.enter_context(dask.config.set(settings))
    release.enter_context(_quiet_dask())
    cluster = release.enter_context(
        let_open(
            LocalCluster,
            n_workers=0,
            processes=True,
            security=security,
            silence_logs=logging.CRITICAL,
            # The HTTP server cannot be left out, only its routes: a free port, so that runs do not collide.
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        )
    )
    tls = security.get_tls_config_for_role("worker")
    pem = {"tls_ca_file": tls["ca_file"], "tls_worker_cert": tls["cert"], "tls_worker_key": tls["key"]}
    processes.join_cluster(cluster.scheduler_address, pem)
    client: Client = release.enter_context(let_open(Client, cluster, set_as_default=False))
    release.callback(processes.stop)
    return client


def let_open(class_: Callable[..., Opened], *args: Any, **options: Any) -> Opened:
    """Construct something of Dask's. A signal waits until that is done, and closes it again.

    Dask's own thread would go on meanwhile, and leave temporary files where our program ends.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="open") as thread:
        opening = thread.submit(class_, *args, **options)
        try:
            return opening.result()
        except BaseException:
            with contextlib.suppress(Exception):
                opening.result().close()
            raise


def _open_foreign(compute: ComputeSpec, release: contextlib.ExitStack) -> Client:
    if isinstance(compute.cluster, ClusterByAddress):
        address = compute.cluster.address
        try:
            client: Client = release.enter_context(Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            msg = f"no Dask scheduler answers at {address}: {error}"
            raise PoolError(msg, next="compute.cluster.address must name a running scheduler") from error
        return client
    assert isinstance(compute.cluster, ClusterByClass)
    module, _, name = compute.cluster.class_.replace(":", ".").rpartition(".")
    try:
        class_ = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        msg = f"compute.cluster.class: cannot import {compute.cluster.class_!r}: {error}"
        raise JobError(msg) from error
    cluster = release.enter_context(class_(**compute.cluster.options))
    match compute.workers:
        case int(count):
            cluster.scale(count)
        case WorkerRange(minimum=minimum, maximum=maximum):
            cluster.adapt(minimum=minimum, maximum=maximum)
    connected: Client = release.enter_context(Client(cluster, set_as_default=False))
    return connected


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Dask logs every closed connection of a worker that we killed ourselves; what went wrong is in our own errors."""
    handlers = logging.getLogger("distributed").handlers
    before = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in zip(handlers, before, strict=False):
            handler.setLevel(level)


@contextlib.contextmanager
def _renewing(client: Client, lease: Lease) -> Iterator[None]:
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_RENEWED_S):
            with contextlib.suppress(OSError, TimeoutError):
                client.run(lease.renew, *lease.args, on_error="ignore")

    # Before the first task: a chain that is opened without a lease would be held for ever if we were killed.
    client.run(lease.renew, *lease.args, on_error="ignore")
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _end(client, lease)


def _end(client: Client, lease: Lease) -> None:
    """End the lease on every worker that answers in time; the watchers of the others release what they hold."""
    asking = threading.Thread(
        target=client.run, args=(lease.end, *lease.args), kwargs={"on_error": "ignore"}, daemon=True
    )
    asking.start()
    asking.join(RELEASE_TIMEOUT_S)


def _wait_for_worker(client: Client, processes: WorkerProcesses | None) -> None:
    deadline = time.monotonic() + WORKERS_TIMEOUT_S
    while time.monotonic() < deadline:
        if processes is not None and processes.error:
            raise processes.error
        with contextlib.suppress(WorkerStartTimeoutError, TimeoutError):
            client.wait_for_workers(1, timeout=LOOK_S)
            return
    log = processes.log_tail() if processes else ""
    raise PoolError(
        f"no worker came within {WORKERS_TIMEOUT_S:.0f} s", log=log, next="compute.cluster names the workers"
    )
