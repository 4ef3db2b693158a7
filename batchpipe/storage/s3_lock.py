"""The lock of an S3 folder: an object put only if absent, renewed only if still ours, stale by the store's own clock.

Each renewal writes another content, so that another ETag, and whoever takes a stale lock over replaces the very ETag
that was stale: of several who try one succeeds, and a holder that comes back finds its lock lost.
"""

import secrets
import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

from batchpipe.errors import BatchpipeError, OutputError
from batchpipe.redact import clean_uri
from batchpipe.storage import owner as owners
from batchpipe.storage.explain import WRITING
from batchpipe.storage.s3_client import S3Client
from batchpipe.storage.store import ObjectMissingError, StaleError

RENEWALS_PER_TTL = 6
MOST_TRIES = 5
"""Each further try means that another contender was faster, or that the holder has just let go."""


class S3Lock:
    """Held from construction until `release`; a small thread renews it six times in its time to live."""

    def __init__(self, client: S3Client, uri: str, owner: Mapping[str, Any], ttl_s: float) -> None:
        self._client, self._uri, self._ttl_s = client, uri, ttl_s
        self._token = secrets.token_hex(8)
        self._owner = {**owners.this_process(owner), "token": self._token}
        self._renewals = 0
        self._writing = threading.Lock()
        self._released = threading.Event()
        self._etag = self._acquire()
        self._thread = threading.Thread(target=self._keep, name="batchpipe-lock", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        with self._writing:
            try:
                self._etag = self._put(IfMatch=self._etag)
            except (StaleError, ObjectMissingError) as exc:
                raise OutputError(
                    f"the lock {clean_uri(self._uri)!r} was lost: another run has taken it, or it was removed",
                    next="see that no other run writes here, then run the same command again: it resumes",
                ) from exc

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with self._writing, suppress(StaleError, ObjectMissingError):
            if self._etag and self._read()[0].get("token") == self._token:
                self._client.call(WRITING, "delete_object", self._uri, IfMatch=self._etag)
            self._etag = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the run has failed already, that is what to tell; a lock that could not be given back lapses.
        with suppress(BatchpipeError) if error is not None else nullcontext():
            self.release()

    def _keep(self) -> None:
        while not self._released.wait(self._ttl_s / RENEWALS_PER_TTL):
            # Whatever is wrong, `renew` says it to the run's own thread before anything is published.
            with suppress(BatchpipeError):
                self.renew()

    def _acquire(self) -> str:
        holder: dict[str, Any] = {}
        for _ in range(MOST_TRIES):
            with suppress(StaleError):
                return self._put(IfNoneMatch="*")
            with suppress(ObjectMissingError, StaleError):
                holder, etag, age_s = self._read()
                if age_s <= self._ttl_s and not owners.is_dead(holder):
                    break
                return self._put(IfMatch=etag)
        raise owners.locked(
            self._uri,
            holder,
            "try again when it has ended; run and redrive wait for it: --wait 600; "
            f"if it is dead its lock lapses {self._ttl_s:g} s after its last sign of life",
        )

    def _put(self, **condition: str) -> str:
        """Write the lock; a refused repetition of our own write, whose answer was lost, counts as written."""
        self._renewals += 1
        content = owners.to_bytes({**self._owner, "renewals": self._renewals})
        try:
            answer = self._client.call(WRITING, "put_object", self._uri, Body=content, **condition)
            return str(answer["ETag"])
        except StaleError:
            there, etag, _ = self._read()
            if (there.get("token"), there.get("renewals")) == (self._token, self._renewals):
                return etag
            raise

    def _read(self) -> tuple[dict[str, Any], str, float]:
        """The holder, the ETag, and the age in seconds: Last-Modified against that answer's Date, both the store's."""
        data, answer = self._client.wait(self._client.start(self._client.read_async(self._uri)))
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return owners.from_bytes(data), str(answer["ETag"]), (now - answer["LastModified"]).total_seconds()
