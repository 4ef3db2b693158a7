"""`batchpipe serve module:attr`: any callable stage as a server of the contract, so that one line makes it an image.

The same conversions and the same `CallableStage` as in a run: what it computes is the same by construction.
"""

import errno
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from aiohttp import web
from pydantic import ValidationError

from batchpipe import content
from batchpipe.batch import ByteRecords, Records
from batchpipe.content import ARROW, CSV, JSON, JSON_LINES, ContentError
from batchpipe.errors import JobError, StageStartError
from batchpipe.job import Job
from batchpipe.specs.spec import MB
from batchpipe.specs.stage import PORT
from batchpipe.stages import InvocationFailed, Remedy
from batchpipe.stages.callable import CallableStage, open_callable
from batchpipe.stages.contract import NO_REMEDY, PAYLOAD
from batchpipe.stages.tables import behind_header, can_be_table, to_table

_WEIGHT = re.compile(r";\s*q=[^;]*", re.IGNORECASE)
MAX_WAITING = 100
"""Requests that may wait for the callable; the next one is told to come back (503)."""
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
"""What a container must listen on to be reached from outside."""
DEFAULT_PORT = 8080
MAX_PAYLOAD_MB = 100.0
ADVISED_PAYLOAD_MB = 6.0


@dataclass(frozen=True, slots=True)
class _Asked:
    """How a request wants to be answered."""

    content_type: str
    """As it came."""
    media_type: str
    accept: str
    """What to answer as, with parameters; empty for any."""
    is_bare: bool
    """Whether the request was one JSON document that is no array: so is its answer."""


def serve(
    reference: str,
    params: Mapping[str, Any],
    columns: Sequence[str] = (),
    *,
    threads: int = 1,
    host: str = LOOPBACK,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve a callable on an address until SIGTERM or SIGINT, then finish what was begun.

    ``columns`` names the fields of CSV that comes without a header; ``threads`` may enter the callable at once;
    ``say`` is told in a line when the server listens. The port and the largest payload are the contract's variables,
    8080 and 100 MB where these are not set.
    Raises JobError where it cannot be imported, StageStartError where its constructor raises or the port is taken.
    """
    port, max_payload_mb = int(_number(PORT, DEFAULT_PORT)), _number(PAYLOAD, MAX_PAYLOAD_MB)
    stage = open_for_serving(reference, params, threads)
    app = make_app(stage, columns=tuple(columns), max_payload_mb=max_payload_mb)
    line = f"serving {reference} on http://{host}:{port} (another port: {PORT}; Ctrl-C ends it)"
    announce = (lambda _: say(line)) if say else None  # aiohttp prints its own line once it listens
    try:
        web.run_app(app, host=host, port=port, print=announce, access_log=None)
    except (OSError, OverflowError) as exc:
        raise _cannot_listen(f"{host}:{port}", exc, f"{PORT}={port + 1} batchpipe serve {reference} ...") from exc


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    advice = f"{variable}={default:g} batchpipe serve ..., or leave it unset for {default:g}"
    raise JobError(f"the environment variable {variable} is {text!r}, which is no number", next=advice)


def _cannot_listen(address: str, error: OSError | OverflowError, other_port: str) -> StageStartError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        msg = f"cannot listen on {address}: another program has the port"
        return StageStartError(msg, next=f"choose another one: {other_port}")
    advice = f"choose another address by --host, or another port by {PORT}"
    return StageStartError(f"cannot listen on {address}: {error}", next=advice)


def open_for_serving(reference: str, params: Mapping[str, Any], threads: int = 1) -> CallableStage:
    """Open a callable as the only stage of a job, its module looked for in the working directory first."""
    stage = {"callable": reference, "params": dict(params), "thread_safe": threads > 1}
    stage["max_concurrent_transforms"] = threads
    blocks = {"input": {"uri": "-"}, "output": {"uri": "served"}, "python_path": [str(Path.cwd())]}
    try:
        job = Job.model_validate({"stages": [stage], **blocks})
    except ValidationError as exc:
        advice = f"batchpipe serve {reference.partition(':')[0] or 'MODULE'}:ATTRIBUTE"
        raise JobError(f"cannot serve {reference!r}: it must be module:attribute", next=advice) from exc
    return open_callable(job.stages[0], job)


def make_app(
    stage: CallableStage, *, columns: tuple[str, ...] = (), max_payload_mb: float = MAX_PAYLOAD_MB
) -> web.Application:
    """The server of an open callable: /ping, /execution-parameters and /invocations. Closes the stage when it ends."""
    server = _Server(stage, columns, max_payload_mb)
    app = web.Application(client_max_size=int(max_payload_mb * MB))
    app.router.add_get("/ping", server.ping)
    app.router.add_get("/execution-parameters", server.execution_parameters)
    app.router.add_post("/invocations", server.invoke)

    async def close(_: web.Application) -> None:
        stage.close()

    app.on_cleanup.append(close)
    return app


class _Server:
    def __init__(self, stage: CallableStage, columns: tuple[str, ...], max_payload_mb: float) -> None:
        self._stage = stage
        self._columns = columns
        self._max_payload_mb = max_payload_mb
        self._waiting: list[web.Request] = []

    async def ping(self, _: web.Request) -> web.Response:
        """Not ready while every thread may be in a call that nobody waits for any more: one of them may never end."""
        given_up = sum(request.transport is None or request.transport.is_closing() for request in self._waiting)
        return web.Response(status=503 if given_up >= self._stage.concurrency else 200)

    async def execution_parameters(self, _: web.Request) -> web.Response:
        advice: dict[str, object] = {
            # One more than can be worked on, so that the next one is there when the callable is free.
            "MaxConcurrentTransforms": self._stage.concurrency + 1,
            "BatchStrategy": "MULTI_RECORD",
            "MaxPayloadInMB": max(1, int(min(self._max_payload_mb, ADVISED_PAYLOAD_MB))),
        }
        if self._stage.takes_table and not self._columns:
            advice["TableContentType"] = ARROW  # it alone says the names and types of columns
        return web.json_response(advice)

    async def invoke(self, request: web.Request) -> web.Response:
        if len(self._waiting) >= MAX_WAITING:
            return web.Response(status=503, text="too many requests wait already", headers={"Retry-After": "1"})
        self._waiting.append(request)
        try:
            return await self._answer(request)
        except ContentError as exc:
            return web.Response(status=400, text=str(exc))
        except InvocationFailed as exc:
            where = f" ({exc.location})" if exc.location else ""
            headers = {NO_REMEDY: "1"} if exc.remedy is Remedy.NONE else {}
            return web.Response(
                status=503 if exc.remedy is Remedy.RETRY else 400, text=f"{exc}{where}", headers=headers
            )
        finally:
            self._waiting.remove(request)

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        asked = _asked(request, body)
        if not body:
            return web.Response(status=204)
        records = (await self._stage.invoke(self._read(body, asked))).records
        accept = asked.accept or _natural_type(records, asked)
        try:
            answer = _write(records, accept, asked)
        except ContentError as exc:
            return web.Response(status=406, text=str(exc))
        return web.Response(body=answer, headers={"Content-Type": accept})

    def _read(self, body: bytes, asked: _Asked) -> Records:
        """The request's records, as a table where the callable takes one and there are columns."""
        if asked.is_bare:
            records: Records = ByteRecords.of([body.strip() + b"\n"], JSON)
        else:
            records = content.decode(body, asked.content_type)
        if isinstance(records, pa.Table):
            return records
        names = self._columns
        if asked.media_type == CSV and content.has_header(asked.content_type):
            names, records = (), behind_header(records)
        return to_table(records, names) if self._stage.takes_table and can_be_table(records) else records


def _asked(request: web.Request, body: bytes) -> _Asked:
    content_type = request.headers.get("Content-Type", "application/octet-stream")
    media_type, _ = content.parse_content_type(content_type)
    # Of several types the first one counts that can be written: a caller of this contract states one.
    accepts = [_WEIGHT.sub("", accept).strip() for accept in request.headers.get("Accept", "").split(",")]
    any_other = "" if any("*" in accept for accept in accepts) else accepts[0]
    accept = next((accept for accept in accepts if content.holds_many(accept)), any_other)
    is_bare = media_type == JSON and body.lstrip()[:1] not in (b"[", b"")
    return _Asked(content_type, media_type, content.in_utf8(accept), is_bare)


def _natural_type(records: Records, asked: _Asked) -> str:
    """What to answer as where nobody asks: as the request came; bytes as what they are."""
    if asked.media_type == ARROW and isinstance(records, ByteRecords):
        return CSV  # the type of lines: a stream holds nothing but a table
    if asked.media_type in content.TABULAR:
        has_names = isinstance(records, pa.Table) and content.has_header(asked.content_type)
        return content.named(CSV) if has_names else asked.media_type
    return JSON_LINES if isinstance(records, pa.Table) else records.content_type


def _write(records: Records, accept: str, asked: _Asked) -> content.Body:
    if asked.is_bare and content.parse_content_type(accept)[0] == JSON and len(records) == 1:
        return content.encode_one(records, JSON)
    return content.encode(records, accept, header=content.has_header(accept))
