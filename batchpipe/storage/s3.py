"""Objects on S3 and on what speaks its language: versions are ETags, every promise is a conditional put."""

import secrets
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from batchpipe.redact import clean_uri
from batchpipe.split import WHOLE
from batchpipe.storage.address import Pattern, has_wildcard, is_data, join, resolve
from batchpipe.storage.explain import LISTING, READING, WRITING
from batchpipe.storage.listing import sorted_by_uri
from batchpipe.storage.pending import Pending, PendingWriter
from batchpipe.storage.s3_client import S3Client, split_uri
from batchpipe.storage.s3_lock import S3Lock
from batchpipe.storage.s3_pending import ATTEMPT, MultipartSink, abort, complete
from batchpipe.storage.s3_read import S3RangeReader
from batchpipe.storage.store import (
    Found,
    ObjectExistsError,
    ObjectFile,
    ObjectMissingError,
    PendingLostError,
    StaleError,
)

BUFFER_BYTES = 128 << 10
PAGE = 1_000
"""What S3 lists and deletes at once."""

TOKEN = "batchpipe-put"
"""The metadata by which a put recognizes its own object when an answer was lost and the repetition was refused."""


class S3Store:
    """The objects that one identity sees at one endpoint. URIs are ``s3://bucket/key``."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._client = S3Client(options)

    def find(self, uri: str) -> Iterator[Found]:
        if has_wildcard(uri):
            pattern = Pattern.of(resolve(uri))
            listing = self._list(pattern.folder, pattern.literal_start, is_one_level=pattern.is_one_level)
            return sorted_by_uri(found for name, found in listing if is_data(name) and pattern.matches(name))
        return self._find_literal(uri)

    def _find_literal(self, uri: str) -> Iterator[Found]:
        place = resolve(uri)
        if split_uri(place)[1] and not uri.endswith("/"):
            try:
                yield self.stat(place)
                return
            except ObjectMissingError:
                pass  # then it is a folder, or nothing
        yield from sorted_by_uri(found for name, found in self._list(place) if is_data(name))

    def iter_folder(self, folder: str) -> Iterator[Found]:
        return sorted_by_uri(found for _, found in self._list(resolve(folder)))

    def stat(self, uri: str) -> Found:
        answer = self._client.call(READING, "head_object", resolve(uri))
        return Found(resolve(uri), answer["ContentLength"], _version(answer))

    def exists(self, uri: str) -> bool:
        try:
            self.stat(uri)
        except ObjectMissingError:
            return False
        return True

    def open(self, uri: str, *, size: int, version: str, stop: int = WHOLE) -> ObjectFile:
        return ObjectFile(S3RangeReader(self._client, resolve(uri), size, version, stop), BUFFER_BYTES)

    def read(self, uri: str) -> bytes:
        return self.read_with_version(uri)[0]

    def read_with_version(self, uri: str) -> tuple[bytes, str]:
        data, answer = self._client.wait(self._client.start(self._client.read_async(resolve(uri))))
        return data, _version(answer)

    def create(self, uri: str, data: bytes) -> str:
        try:
            return self._put(uri, data, IfNoneMatch="*")
        except StaleError as exc:
            raise ObjectExistsError(f"cannot create {clean_uri(uri)!r}: it exists already") from exc

    def replace(self, uri: str, data: bytes, version: str) -> str:
        try:
            return self._put(uri, data, IfMatch=f'"{version}"')
        except (StaleError, ObjectMissingError) as exc:
            raise StaleError(f"cannot replace {clean_uri(uri)!r}: it was changed by somebody else") from exc

    def put(self, uri: str, data: bytes) -> str:
        return self._put(uri, data)

    def _put(self, uri: str, data: bytes, **condition: str) -> str:
        token = secrets.token_hex(8)
        place = resolve(uri)
        try:
            return _version(
                self._client.call(WRITING, "put_object", place, Body=data, Metadata={TOKEN: token}, **condition)
            )
        except StaleError:
            there = self._head(place)
            if there and there["Metadata"].get(TOKEN) == token:
                return _version(there)
            raise

    def delete(self, uris: Iterable[str]) -> None:
        waiting = iter(uris)
        while page := [resolve(uri) for uri in islice(waiting, PAGE)]:
            buckets = {split_uri(uri)[0] for uri in page}
            for bucket in buckets:
                self._delete_page([uri for uri in page if split_uri(uri)[0] == bucket])

    def _delete_page(self, uris: list[str]) -> None:
        objects = [{"Key": split_uri(uri)[1]} for uri in uris]
        answer = self._client.call(WRITING, "delete_objects", uris[0], Delete={"Objects": objects, "Quiet": True})
        for refused in answer.get("Errors", []):
            if refused.get("Code") not in ("NoSuchKey", "404"):
                where = f"s3://{split_uri(uris[0])[0]}/{refused.get('Key', '')}"
                raise WRITING.failed(
                    where, f"it could not be removed ({refused.get('Code')})", "check the right to delete"
                )

    def remove_folder(self, folder: str) -> None:
        self.delete(found.uri for found in self.iter_folder(folder))

    def open_pending(self, uri: str, *, staging: str, attempt: str) -> PendingWriter:  # noqa: ARG002 - part of Store
        return PendingWriter(MultipartSink(self._client, resolve(uri), attempt))

    def publish(self, pending: Pending, *, replaces: str | None = None) -> str:
        """By completing the upload, unless something is there.

        A late publisher is always refused. Two in the same instant are told apart by AWS, but not by every store
        (SeaweedFS 4.48 let several of sixteen through): the run's lock, a conditional put, is what keeps them apart.
        """
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": f'"{replaces}"'}
        try:
            return complete(self._client, pending, **condition)
        except (StaleError, ObjectMissingError, PendingLostError) as exc:
            there = self._head(pending.uri)
            if there and _is_of(pending, there):
                return _version(there)
            if there and _version(there) != replaces:
                raise ObjectExistsError(f"cannot publish {clean_uri(pending.uri)!r}: another object is there") from exc
            if isinstance(exc, PendingLostError) or replaces is None:
                raise PendingLostError(
                    f"cannot publish {clean_uri(pending.uri)!r}: its pending upload is gone"
                ) from exc
        return self.publish(pending)  # what was to be replaced is gone: the place is free

    def holds(self, pending: Pending) -> bool:
        there = self._head(pending.uri)
        return there is not None and _is_of(pending, there)

    def discard(self, pending: Pending) -> None:
        abort(self._client, pending.uri, pending.upload_id)

    def iter_pending(self, folder: str, *, staging: str) -> Iterator[Pending]:  # noqa: ARG002 - part of Store
        bucket, prefix = split_uri(join(resolve(folder), ""))
        markers: dict[str, str] = {}
        while True:
            page = self._client.call(
                LISTING, "list_multipart_uploads", folder, Prefix=prefix, MaxUploads=PAGE, **markers
            )
            for upload in page.get("Uploads", []):
                yield Pending(f"s3://{bucket}/{upload['Key']}", attempt="", upload_id=upload["UploadId"])
            before = markers
            names = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
            markers = {name: page[source] for name, source in names.items() if page.get(source)}
            if not page.get("IsTruncated") or markers == before:
                return

    def lock(self, uri: str, owner: Mapping[str, Any], *, ttl_s: float = 30) -> S3Lock:
        return S3Lock(self._client, resolve(uri), owner, ttl_s)

    def supports_conditional_put(self, folder: str) -> bool:
        probe = join(folder, f".probe-{secrets.token_hex(8)}")
        self.create(probe, b"")
        try:
            self.create(probe, b"")
        except ObjectExistsError:
            return True
        finally:
            self.delete([probe])
        return False

    def _head(self, uri: str) -> dict[str, Any] | None:
        try:
            return self._client.call(READING, "head_object", uri)
        except ObjectMissingError:
            return None

    def _list(self, folder: str, start: str = "", *, is_one_level: bool = False) -> Iterator[tuple[str, Found]]:
        """Objects below a folder whose name begins with `start`, each with that name; without directory markers."""
        bucket, prefix = split_uri(join(folder, ""))
        more = {"Delimiter": "/"} if is_one_level else {}
        while True:
            page = self._client.call(LISTING, "list_objects_v2", folder, Prefix=prefix + start, MaxKeys=PAGE, **more)
            for entry in page.get("Contents", []):
                key = entry["Key"]
                if not key.endswith("/"):
                    yield key[len(prefix) :], Found(f"s3://{bucket}/{key}", entry["Size"], _version(entry))
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]


def _is_of(pending: Pending, there: Mapping[str, Any]) -> bool:
    return bool(there["Metadata"].get(ATTEMPT) == pending.attempt)


def _version(answer: Mapping[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')
