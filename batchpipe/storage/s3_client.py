"""The calls to an S3 store: on s3fs's client and loop, with one policy for retries and one table of errors.

Throttling, 5xx answers and broken connections are retried by botocore ("standard": five attempts with a growing,
random pause, some ten seconds in all); what a retry cannot change (credentials, a missing bucket) fails at once.
``config_kwargs: {retries: ...}`` in the storage options changes that.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.handlers import add_expect_header
from s3fs import S3FileSystem

from batchpipe.errors import BatchpipeError, InputError, JobError
from batchpipe.redact import clean_uri
from batchpipe.storage.explain import READING, Doing
from batchpipe.storage.store import ObjectMissingError, PendingLostError, StaleError

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

DEFAULT_CONFIG = {
    "retries": {"mode": "standard", "total_max_attempts": 5},
    "connect_timeout": 5,
    "read_timeout": 60,
    "max_pool_connections": 32,
}
BODY_ATTEMPTS = 5
"""A body that breaks off while it is read is asked for again this often."""

CONFLICT_PAUSES_S = (0.1, 0.3, 1.0)

BODY_ERRORS = (aiohttp.ClientError, HTTPClientError, ResponseStreamingError, asyncio.TimeoutError, OSError)

_IDENTITY = "check storage_options.s3: profile, or key and secret"
_REASONS = {
    "InvalidAccessKeyId": ("the store does not know this access key", _IDENTITY),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", _IDENTITY),
    "ExpiredToken": ("the credentials have expired", "get new ones, then run the same command again: it resumes"),
    "InvalidToken": ("the session token is not valid", _IDENTITY),
    "AccessDenied": (
        "access denied",
        "this identity may not {verb} there: ask for the right, or see storage_options.s3",
    ),
    "403": ("access denied", "this identity may not {verb} there: ask for the right, or see storage_options.s3"),
    "NoSuchBucket": (
        "the bucket {bucket!r} does not exist",
        "check its name, and the endpoint in storage_options.s3: client_kwargs.endpoint_url",
    ),
    "InvalidBucketName": ("{bucket!r} is no bucket's name", "write s3://BUCKET/KEY"),
    "PermanentRedirect": ("the bucket is in another region", "set storage_options.s3: client_kwargs.region_name"),
    "AuthorizationHeaderMalformed": (
        "the bucket is in another region",
        "set storage_options.s3: client_kwargs.region_name",
    ),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock"),
    "SlowDown": ("the store asks us to slow down, and did so again after each pause", "use fewer workers"),
    "NotImplemented": ("the store cannot do this", "conditional puts and multipart uploads are needed"),
}


class S3Client:
    """One S3 store with one identity. Safe to use from several threads: all calls run on fsspec's own loop."""

    def __init__(self, options: dict[str, Any]) -> None:
        config = {**DEFAULT_CONFIG, **options.get("config_kwargs", {})}
        # A second layer of retries, s3fs's own, would make minutes of the seconds above: it is one attempt.
        with _understood():
            self._filesystem = S3FileSystem(**{**options, "config_kwargs": config}, skip_instance_cache=True)
        self._filesystem.retries = 1
        self._connecting = asyncio.Lock()

    def call(self, doing: Doing, method: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """Call one S3 operation on an object (or folder) and give its answer; errors are ours."""
        return self.wait(self.start(self.call_async(doing, method, uri, **parameters)))

    async def call_async(self, doing: Doing, method: str, uri: str, **parameters: Any) -> dict[str, Any]:
        bucket, key = split_uri(uri)
        if not method.startswith("list_") and method != "delete_objects":
            parameters["Key"] = key
        try:
            with _understood():
                async with self._connecting:  # else each of several first calls would open a client of its own
                    client = await self._filesystem.set_session()
                    # A client that waits to be told to go on with a body has no timeout for it: it would wait for ever.
                    client.meta.events.unregister("before-call.s3", add_expect_header)
            return await self._call_until_settled(method, Bucket=bucket, **parameters)
        except (OSError, BotoCoreError) as exc:
            if code_of(exc) == "403" and method.startswith("head_"):
                # The answer to a HEAD has no body, so no reason in it. A listing of nothing much tells.
                await self.call_async(doing, "list_objects_v2", uri, Prefix=key, MaxKeys=1)
            raise _explain(exc, doing, uri) from exc

    async def _call_until_settled(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Again while the store says that another writer of the same key is just being served."""
        for pause_s in CONFLICT_PAUSES_S:
            try:
                return cast("dict[str, Any]", await self._filesystem._call_s3(method, **parameters))
            except OSError as exc:
                if code_of(exc) != "ConditionalRequestConflict":
                    raise
                await asyncio.sleep(pause_s)
        return cast("dict[str, Any]", await self._filesystem._call_s3(method, **parameters))

    async def read_async(self, uri: str, **parameters: Any) -> tuple[bytes, dict[str, Any]]:
        """An object's bytes (or the ``Range`` of them) and the answer that carried them."""
        attempt = 0
        while True:
            answer = await self.call_async(READING, "get_object", uri, **parameters)
            try:
                async with answer["Body"] as body:
                    return await body.read(), answer
            except BODY_ERRORS as exc:
                attempt += 1
                if attempt == BODY_ATTEMPTS:
                    raise _explain(exc, READING, uri) from exc
            await asyncio.sleep(0.2 * 2**attempt)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin in the background."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)

    def wait(self, future: "Future[T]") -> T:
        """The outcome of what was begun; what an interrupt leaves behind is cancelled."""
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


@contextmanager
def _understood() -> Iterator[None]:
    """What s3fs and botocore do not understand of the storage options is the job's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as exc:
        raise JobError(
            f"storage_options.s3 is not understood: {clean_uri(str(exc))}",
            next="see the parameters of s3fs.S3FileSystem; what it hands on to botocore stands under client_kwargs",
        ) from exc


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket:
        raise InputError(f"{clean_uri(uri)!r} names no bucket", next="write s3://BUCKET/KEY")
    return bucket, key


def code_of(error: BaseException) -> str:
    """The store's code for an error (``NoSuchKey``), or its HTTP status where it gave no code, or nothing."""
    refusal = error if isinstance(error, ClientError) else error.__cause__
    return str(refusal.response["Error"].get("Code", "")) if isinstance(refusal, ClientError) else ""


def _explain(error: Exception, doing: Doing, uri: str) -> BatchpipeError:
    code = code_of(error)
    if code in ("NoSuchKey", "404", "NotFound"):
        return ObjectMissingError(f"cannot {doing.verb} {clean_uri(uri)!r}: there is nothing", next="check the name")
    if code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
        return StaleError(f"cannot {doing.verb} {clean_uri(uri)!r}: it was changed by somebody else")
    if code == "NoSuchUpload":
        return PendingLostError(f"cannot {doing.verb} {clean_uri(uri)!r}: its pending upload is gone")
    if code in _REASONS:
        why, check = _REASONS[code]
        why = why.format(bucket=split_uri(uri)[0])
        shown = f"{why} ({code})" if not code.isdigit() else why
        return doing.failed(uri, shown, check.format(verb=doing.verb))
    return doing.failed(uri, *_explain_transport(error, code))


def _explain_transport(error: Exception, code: str) -> tuple[str, str]:
    """Why, and what to check, where the store did not answer or said something unforeseen."""
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return "no credentials were found", (
            "set storage_options.s3: profile, or key and secret (anon: true for a public bucket), or AWS_PROFILE"
        )
    if isinstance(error, ProfileNotFound):
        return str(error), "check storage_options.s3: profile, and ~/.aws/config"
    if isinstance(error, (NoConnectionError, HTTPClientError)):
        endpoint = clean_uri(str(error.kwargs.get("endpoint_url", "the store")))
        return f"no answer from {endpoint} ({type(error).__name__})", (
            "check the network, and the endpoint in storage_options.s3: client_kwargs.endpoint_url"
        )
    return f"{clean_uri(str(error))[:300] or type(error).__name__}{f' ({code})' if code else ''}", ""
