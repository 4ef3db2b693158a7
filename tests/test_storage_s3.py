"""What only S3 promises, against a real one."""

import json
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from batchpipe.errors import BatchpipeError, InputError, JobError, OutputError
from batchpipe.storage import Found, ObjectExistsError, Pending, PendingLostError, Store, open_store, s3
from tests.s3_server import S3Server

MB = 1 << 20


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return open_store("s3://", {"s3": s3_server.storage_options})


def write_pending(store: Store, uri: str, size: int = 4, attempt: str = "run-1") -> Pending:
    with store.open_pending(uri, staging="", attempt=attempt) as piece:
        while piece.tell() < size:
            piece.write(bytes(min(MB, size - piece.tell())))
        return piece.finish()


def test_a_store_is_opened_once_for_its_options(s3_server: S3Server, store: Store):
    assert open_store("s3a://x/y", {"s3": s3_server.storage_options, "gs": {}}) is store
    assert open_store("s3://x/y", {"s3": s3_server.read_only_storage_options}) is not store


def test_an_upload_is_what_a_pending_piece_is(s3_server: S3Server, store: Store, bucket: str):
    pending = write_pending(store, f"s3://{bucket}/out/p", 20 * MB)
    assert s3_server.list_keys(bucket) == []
    assert s3_server.list_uploads(bucket) == [("out/p", pending.upload_id)]
    assert len(pending.etags) == 3
    store.discard(pending)
    assert s3_server.list_uploads(bucket) == []


def test_a_published_object_tells_whose_attempt_it_is(s3_server: S3Server, store: Store, bucket: str):
    version = store.publish(write_pending(store, f"s3://{bucket}/p", attempt="91c07be2-7-1"))
    there = s3_server.client.head_object(Bucket=bucket, Key="p")
    assert there["Metadata"] == {"batchpipe-attempt": "91c07be2-7-1"}
    assert there["ETag"] == f'"{version}"'


def test_a_publish_by_a_process_that_died_is_recognized(s3_server: S3Server, store: Store, bucket: str):
    pending = write_pending(store, f"s3://{bucket}/p")
    program = (
        "import json, os, sys; from batchpipe.storage import *; p, options = map(json.loads, sys.argv[1:]);"
        "open_store('s3://', options).publish(Pending.from_json(p)); os.kill(os.getpid(), 9)"
    )
    options = json.dumps({"s3": s3_server.storage_options})
    killed = subprocess.run([sys.executable, "-c", program, json.dumps(pending.to_json()), options], check=False)
    assert killed.returncode == -9
    assert store.publish(pending) == store.stat(pending.uri).version


def test_an_upload_that_somebody_aborted_is_lost(s3_server: S3Server, store: Store, bucket: str):
    pending = write_pending(store, f"s3://{bucket}/p")
    s3_server.client.abort_multipart_upload(Bucket=bucket, Key="p", UploadId=pending.upload_id)
    with pytest.raises(PendingLostError, match=r"cannot publish 's3://.*/p': its pending upload is gone"):
        store.publish(pending)


def test_an_aborted_upload_under_another_s_object_is_refused(s3_server: S3Server, store: Store, bucket: str):
    pending = write_pending(store, f"s3://{bucket}/p")
    store.discard(pending)
    store.put(pending.uri, b"theirs")
    with pytest.raises(ObjectExistsError, match="another object is there"):
        store.publish(pending)


@pytest.mark.parametrize("size", [0, 5, 8 * MB])
def test_a_small_piece_costs_two_requests_and_one_to_publish(store: Any, bucket: str, size: int):
    write_pending(store, f"s3://{bucket}/warm")
    calls: list[str] = []
    store._client._filesystem.s3.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    store.publish(write_pending(store, f"s3://{bucket}/p", size))
    assert calls == ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]


def test_an_object_that_is_opened_ahead_is_asked_for_before_it_is_read(store: Any, bucket: str):
    version = store.put(f"s3://{bucket}/x", b"rows")
    calls: list[str] = []
    store._client._filesystem.s3.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    with store.open(f"s3://{bucket}/x", size=4, version=version) as file:
        file.prefetch()
        store.stat(f"s3://{bucket}/x")
        assert (file.read(), calls) == (b"rows", ["GetObject", "HeadObject"])


def test_memory_is_bounded_whatever_is_written_and_read(store: Store, bucket: str):
    tracemalloc.start()
    version = store.publish(write_pending(store, f"s3://{bucket}/p", 128 * MB))
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with store.open(f"s3://{bucket}/p", size=128 * MB, version=version) as file:
        while file.read(MB):
            pass
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (written < 64 * MB, read < 32 * MB) == (True, True), (written, read)


def test_more_keys_than_a_page_are_listed_in_order_and_removed(s3_server: S3Server, store: Store, bucket: str):
    names = [f"{'a-' if number % 3 else 'a/'}{number:04}" for number in range(1_100)]
    store.put(f"s3://{bucket}/in/_hidden", b"")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(f"s3://{bucket}/in/{name}", b""), names))
    assert [found.uri for found in store.find(f"s3://{bucket}/in")] == [
        f"s3://{bucket}/in/{name}" for name in sorted(names)
    ]
    assert len(list(store.find(f"s3://{bucket}/in/a/*"))) == 367
    store.remove_folder(f"s3://{bucket}/in")
    assert s3_server.list_keys(bucket) == []


def test_more_uploads_than_a_page_are_listed_and_only_below_the_folder(
    store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "PAGE", 2)
    uploads = {write_pending(store, f"s3://{bucket}/out/{number % 3}").upload_id for number in range(7)}
    write_pending(store, f"s3://{bucket}/outside")
    found = list(store.iter_pending(f"s3://{bucket}/out", staging=""))
    assert {one.upload_id for one in found} == uploads
    assert len(found) == 7


def test_folder_markers_are_not_data(s3_server: S3Server, store: Store, bucket: str):
    s3_server.client.put_object(Bucket=bucket, Key="in/", Body=b"")
    s3_server.client.put_object(Bucket=bucket, Key="in/b/", Body=b"")
    store.put(f"s3://{bucket}/in/a", b"")
    assert [found.uri for found in store.find(f"s3://{bucket}/in")] == [f"s3://{bucket}/in/a"]
    assert [found.uri for found in store.iter_folder(f"s3://{bucket}/in")] == [f"s3://{bucket}/in/a"]


def test_a_bucket_is_a_folder_too(store: Store, bucket: str):
    store.put(f"s3://{bucket}/x.csv", b"")
    for uri in (f"s3://{bucket}", f"s3://{bucket}/", f"s3a://{bucket}/*.csv"):
        assert [found.uri for found in store.find(uri)] == [f"s3://{bucket}/x.csv"]


def test_an_object_that_is_replaced_while_it_is_read_is_refused(store: Store, bucket: str):
    store.publish(write_pending(store, f"s3://{bucket}/p", 20 * MB))
    found = store.stat(f"s3://{bucket}/p")
    with store.open(found.uri, size=found.size, version=found.version) as file:
        file.read(10)
        store.put(found.uri, bytes(20 * MB))
        with pytest.raises(InputError, match="it changed since it was listed"):
            file.read()


def attempts(store: Store, bucket: str) -> dict[str, Any]:
    """What a run does first, to read and to write."""
    uri = f"s3://{bucket}/in/x"
    return {
        "find": lambda: list(store.find(uri)),
        "glob": lambda: list(store.find(f"s3://{bucket}/in/*")),
        "stat": lambda: store.stat(uri),
        "read": lambda: store.read(uri),
        "open": lambda: store.open(uri, size=1, version="x").read(),
        "put": lambda: store.put(uri, b""),
        "create": lambda: store.create(uri, b""),
        "pending": lambda: write_pending(store, uri),
        "delete": lambda: store.delete([uri]),
        "lock": lambda: store.lock(uri, {}),
    }


READS = ["find", "glob", "stat", "read", "open"]
WRITES = ["put", "create", "pending", "lock"]


@pytest.mark.parametrize("name", READS + WRITES)
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"key": "wrongkey"}, "the store does not know this access key (InvalidAccessKeyId)"),
        ({"secret": "wrongsecret"}, "the secret key does not belong to the access key (SignatureDoesNotMatch)"),
        ({"key": None, "secret": None}, "no credentials were found"),
    ],
)
def test_wrong_credentials_are_told_at_once(
    s3_server: S3Server, bucket: str, name: str, options: dict[str, Any], why: str
):
    store = open_store("s3://", {"s3": s3_server.storage_options | options})
    error = InputError if name in READS else OutputError
    with pytest.raises(error) as told:
        attempts(store, bucket)[name]()
    assert f"'s3://{bucket}/in" in str(told.value)
    assert f": {why}\n  next:  " in str(told.value)
    assert "storage_options.s3: profile, or key and secret" in str(told.value)
    assert not {"wrongkey", "wrongsecret", s3_server.secret} & set(str(told.value).replace("'", " ").split())


@pytest.mark.parametrize("name", ["find", "glob", "read", *WRITES])
def test_a_missing_bucket_is_told_at_once(store: Store, name: str):
    with pytest.raises(InputError if name in READS else OutputError) as told:
        attempts(store, "no-such-bucket")[name]()
    assert "the bucket 'no-such-bucket' does not exist (NoSuchBucket)\n  next:  check its name" in str(told.value)


@pytest.mark.parametrize("name", [*WRITES, "delete"])
def test_an_identity_that_may_only_read_is_told_so(s3_server: S3Server, store: Store, bucket: str, name: str):
    store.put(f"s3://{bucket}/in/x", b"rows")
    reader = open_store("s3://", {"s3": s3_server.read_only_storage_options})
    assert reader.read(f"s3://{bucket}/in/x") == b"rows"
    with pytest.raises(OutputError, match=r"cannot write 's3://.*': .*\(?AccessDenied\)?\n  next:  .* right"):
        attempts(reader, bucket)[name]()


def test_a_request_is_tried_five_times_at_most(store: Any, bucket: str):
    store.put(f"s3://{bucket}/x", b"")
    assert store._client._filesystem.s3.meta.config.retries["total_max_attempts"] == 5


def test_an_endpoint_where_nobody_answers_is_told(s3_server: S3Server):
    options = {**s3_server.storage_options, "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}
    store = open_store("s3://", {"s3": options | {"config_kwargs": {"retries": {"total_max_attempts": 1}}}})
    text = r"no answer from http://127.0.0.1:1/bucket/x \(EndpointConnectionError\)\n  next:  check the network"
    with pytest.raises(InputError, match=text):
        list(store.find("s3://bucket/x"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"profil": "x"}, "storage_options.s3 is not understood: .*'profil'"),
        ({"client_kwargs": {"endpoint_url": "nonsense"}}, "storage_options.s3 is not understood: Invalid endpoint"),
    ],
)
def test_options_that_are_not_understood_are_the_job_s_fault(options: dict[str, Any], text: str):
    with pytest.raises(JobError, match=text):
        list(open_store("s3://", {"s3": options}).find("s3://bucket/x"))


def test_an_unknown_profile_is_told():
    with pytest.raises(InputError, match=r"profile \(nobody\) could not be found\n  next:  check storage_options"):
        list(open_store("s3://", {"s3": {"profile": "nobody"}}).find("s3://bucket/x"))


def test_a_uri_without_a_bucket_is_told(store: Store):
    with pytest.raises(BatchpipeError, match=r"'s3:///x' names no bucket\n  next:  write s3://BUCKET/KEY"):
        list(store.find("s3:///x"))


def test_an_empty_file_costs_one_look(store: Store, bucket: str):
    version = store.put(f"s3://{bucket}/x", b"")
    found = Found(f"s3://{bucket}/x", 0, version)
    with store.open(found.uri, size=0, version=version) as file:
        assert file.read() == b""
