"""SageMaker's inference contract from the caller's side: what a stage's server is told, asked and waited for."""

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchpipe import content
from batchpipe.specs.stage import PORT

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

PING_TIMEOUT_S = 2.0
LONGEST_PAUSE_S = 0.25
ADVICE_S = 10.0
"""How long a server that answers its ping may take to say what it advises, before it counts as saying nothing."""
ADVICE_ERRORS = 3
"""Times that it may fail at it, but by saying that it is busy."""
BUSY = frozenset({408, 429, 503})
ADVICE_BYTES = 1 << 16
MOST_CONCURRENT = 1_000
"""So many requests at once at most where a server advises it: each is worth memory and a connection here."""
PAYLOAD = "SAGEMAKER_MAX_PAYLOAD_IN_MB"
NO_REMEDY = "x-batchpipe-broken"
"""A header of `batchpipe serve`: the callable breaks its contract, so that sending less at once would hide it (G8)."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What a server says of itself on ``/execution-parameters``; what it does not say is None."""

    max_payload_mb: float | None = None
    max_concurrent_transforms: int | None = None
    single_record: bool | None = None
    table_type: str | None = None
    """What it wants tables sent as. A key of ours, which `batchpipe serve` states and other readers pass over."""

    @classmethod
    def of(cls, document: object) -> "Advice":
        """Read both spellings, ``MaxPayloadInMB`` and ``MAX_PAYLOAD_IN_MB``; what makes no sense was not said."""
        said = {_plain(key): value for key, value in document.items()} if isinstance(document, Mapping) else {}
        payload, concurrency = (_positive(said.get(key)) for key in ("maxpayloadinmb", "maxconcurrenttransforms"))
        strategies = {"singlerecord": True, "multirecord": False}
        return cls(
            payload,
            None if concurrency is None else min(math.ceil(concurrency), MOST_CONCURRENT),
            strategies.get(_plain(str(said.get("batchstrategy", "")))),
            _tabular(said.get("tablecontenttype")),
        )

    def as_document(self) -> dict[str, object]:
        """The same in the documented spelling, fit for a journal; `of` reads it back."""
        strategy = {True: "SINGLE_RECORD", False: "MULTI_RECORD", None: None}[self.single_record]
        said = {
            "MaxPayloadInMB": self.max_payload_mb,
            "MaxConcurrentTransforms": self.max_concurrent_transforms,
            "BatchStrategy": strategy,
            "TableContentType": self.table_type,
        }
        return {key: value for key, value in said.items() if value is not None}


def _plain(text: str) -> str:
    return text.replace("_", "").lower()


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _tabular(value: Any) -> str | None:
    """A media type that can hold a table; without parameters, which would promise what nobody then does."""
    media_type, _ = content.parse_content_type(value) if isinstance(value, str) else ("", {})
    return media_type if media_type in content.TABULAR else None


def contract_environment(stage: "StageSpec", job: "Job", port: int, safe_range: str) -> dict[str, str]:
    """The variables a server of the contract is started with; limits only where the job states them, as AWS does."""
    payload_mb = stage.max_payload_mb or job.batch.max_payload_mb
    concurrency = stage.max_concurrent_transforms or job.batch.max_concurrent_transforms
    stated = {
        PAYLOAD: None if payload_mb is None else math.ceil(payload_mb),
        "SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": concurrency,
    }
    return {
        "SAGEMAKER_BATCH": "true",
        "SAGEMAKER_BATCH_STRATEGY": "SINGLE_RECORD" if job.batch.max_records == 1 else "MULTI_RECORD",
        PORT: str(port),
        "SAGEMAKER_SAFE_PORT_RANGE": safe_range,
        **{name: str(value) for name, value in stated.items() if value is not None},
    }


DEVICES = "CUDA_VISIBLE_DEVICES"


def callables_devices(job: "Job", copy: int) -> dict[str, str]:
    """The variable that tells a worker's callables which devices are theirs; nothing where none of them wants any."""
    devices = {device for stage in job.stages if stage.callable for device in devices_of(stage, copy)}
    return {DEVICES: ",".join(map(str, sorted(devices)))} if devices else {}


def devices_of(stage: "StageSpec", copy: int) -> list[int]:
    """The GPUs of one copy of the chain: copy i has devices i*g to i*g+g-1."""
    return list(range(copy * stage.gpus, (copy + 1) * stage.gpus))


def wait_until_ready(
    host: str, port: int, timeout_s: float, check: Callable[[], None], *, each_s: float = PING_TIMEOUT_S
) -> None:
    """Ping until the answer is 200, each time for some seconds. ``check`` is called in between, and ends it by raising.

    Raises TimeoutError, saying what the last answer was.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.01
    while True:
        check()
        try:
            status, _ = _get(host, port, "/ping", max(LONGEST_PAUSE_S, min(each_s, deadline - time.monotonic())))
            last = f"HTTP {status}"
        except (OSError, http.client.HTTPException) as exc:
            status, last = 0, f"{type(exc).__name__}: {exc}"
        if status == 200:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"no 200 from /ping within {timeout_s:g} s (startup_timeout_s), at last {last}")
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_S)


def answers_ping(host: str, port: int, within_s: float) -> bool:
    """Whether ``/ping`` is answered with 200 in time."""
    try:
        wait_until_ready(host, port, within_s, lambda: None, each_s=within_s)
    except TimeoutError:
        return False
    return True


def ask_advice(host: str, port: int, check: Callable[[], None]) -> Advice:
    """Ask ``/execution-parameters``, which a server need not have; one that is busy or broken for now is asked again.

    ``check`` is called in between, and ends the asking by raising.
    """
    deadline, errors = time.monotonic() + ADVICE_S, 0
    while (left := deadline - time.monotonic()) > 0 and errors < ADVICE_ERRORS:
        check()
        try:
            status, body = _get(host, port, "/execution-parameters", left, ADVICE_BYTES, check)
        except (OSError, http.client.HTTPException):
            status, body = 0, b""
        if status == http.HTTPStatus.OK:
            return advice_in(body)
        if 0 < status < 500 and status not in BUSY:
            break
        errors += status not in BUSY
        time.sleep(LONGEST_PAUSE_S)
    return Advice()


def advice_in(body: bytes) -> Advice:
    """What an answer of ``/execution-parameters`` says; nothing, where it is not JSON."""
    try:
        return Advice.of(json.loads(body))
    except (ValueError, RecursionError):
        return Advice()


def _get(
    host: str, port: int, path: str, timeout_s: float, most_bytes: int = 0, check: Callable[[], None] = lambda: None
) -> tuple[int, bytes]:
    """The status and the beginning of the body, within this time even where the server sends a byte now and then.

    Given up too where ``check`` raises, which is called now and then meanwhile. Raises OSError, HTTPException.
    """
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    connection.connect()
    assert connection.sock
    done, cut = threading.Event(), threading.Event()
    arguments = (connection.sock, time.monotonic() + timeout_s, check, done, cut)
    threading.Thread(target=_cut_when_due, args=arguments, name="cut", daemon=True).start()
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(most_bytes)
        if cut.is_set():
            raise TimeoutError(f"no complete answer within {timeout_s:g} s")
        return answer.status, body
    finally:
        done.set()
        connection.close()


def _cut_when_due(
    sock: socket.socket, deadline: float, check: Callable[[], None], done: threading.Event, cut: threading.Event
) -> None:
    """Shut a connection down at a moment, or once nobody waits for it any more."""
    while not done.wait(min(LONGEST_PAUSE_S, max(0.0, deadline - time.monotonic()))):
        if time.monotonic() >= deadline or _raises(check):
            cut.set()
            with suppress(OSError):  # it has ended just now
                sock.shutdown(socket.SHUT_RDWR)
            return


def _raises(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception:  # noqa: BLE001 - whatever it is, the one who waits hears it next
        return True
    return False
