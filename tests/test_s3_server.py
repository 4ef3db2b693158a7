"""The S3 store that other tests stand on: does it refuse what S3 refuses, and does it go when it should?"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3fs
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.jobs import running
from tests.s3_proxy import open_proxy
from tests.s3_server import S3Server, ask_status, start_s3_server

ROOT = Path(__file__).parent.parent


def refusal(error: pytest.ExceptionInfo[ClientError]) -> tuple[str, int]:
    answer = error.value.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]


def test_bucket_is_fresh_and_takes_an_object(s3_server: S3Server, bucket: str):
    assert s3_server.list_keys(bucket) == []

    s3_server.client.put_object(Bucket=bucket, Key="a/b", Body=b"data")

    assert s3_server.list_keys(bucket) == ["a/b"]


def test_s3fs_works_with_the_storage_options(s3_server: S3Server, bucket: str):
    store = s3fs.S3FileSystem(**s3_server.storage_options)

    store.pipe_file(f"{bucket}/a", b"data")

    assert store.cat_file(f"{bucket}/a") == b"data"


def test_conditional_put_over_an_object_is_refused(s3_server: S3Server, bucket: str):
    s3_server.client.put_object(Bucket=bucket, Key="a", Body=b"first", IfNoneMatch="*")

    with pytest.raises(ClientError) as error:
        s3_server.client.put_object(Bucket=bucket, Key="a", Body=b"second", IfNoneMatch="*")

    assert refusal(error) == ("PreconditionFailed", 412)


def test_read_only_identity_reads_and_cannot_write(s3_server: S3Server, bucket: str):
    s3_server.client.put_object(Bucket=bucket, Key="a", Body=b"data")
    reader = s3_server.make_client(s3_server.read_only_key, s3_server.read_only_secret)

    assert reader.get_object(Bucket=bucket, Key="a")["Body"].read() == b"data"
    with pytest.raises(ClientError) as error:
        reader.put_object(Bucket=bucket, Key="b", Body=b"data")

    assert refusal(error) == ("AccessDenied", 403)


def test_wrong_secret_is_refused(s3_server: S3Server, bucket: str):
    with pytest.raises(ClientError) as error:
        s3_server.make_client(s3_server.key, "wrong").list_objects_v2(Bucket=bucket)

    assert refusal(error) == ("SignatureDoesNotMatch", 403)


def test_missing_bucket_is_not_made_by_a_put(s3_server: S3Server):
    with pytest.raises(ClientError) as error:
        s3_server.client.put_object(Bucket="never-made", Key="a", Body=b"data")

    assert refusal(error) == ("NoSuchBucket", 404)


def test_emptied_bucket_holds_no_objects_and_no_uploads(s3_server: S3Server, bucket: str):
    s3_server.client.put_object(Bucket=bucket, Key="a", Body=b"data")
    upload = s3_server.client.create_multipart_upload(Bucket=bucket, Key="b")
    assert s3_server.list_uploads(bucket) == [("b", upload["UploadId"])]

    s3_server.empty_bucket(bucket)

    assert (s3_server.list_keys(bucket), s3_server.list_uploads(bucket)) == ([], [])


def test_closed_server_leaves_no_scratch_no_sockets_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with start_s3_server() as server:
        assert list(tmp_path.iterdir())

    assert list(tmp_path.iterdir()) == []
    assert sockets_of(server.endpoint) == []
    with pytest.raises(EndpointConnectionError):
        server.make_client(server.key, server.secret).list_buckets()


def test_killed_session_takes_its_server_along(tmp_path: Path):
    code = "from tests.s3_server import *\nwith start_s3_server() as s: print(s.endpoint, flush=True); input()"
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(command, cwd=ROOT, env=environ, text=True, **pipes) as session:
        assert session.stdout is not None
        endpoint = session.stdout.readline().strip()
        assert sockets_of(endpoint)
        session.kill()
        session.stdout.read()  # ends when the guard, who holds it too, is done

    assert (list(tmp_path.iterdir()), sockets_of(endpoint)) == ([], [])
    deadline = time.monotonic() + 10  # an orphan is killed at once, and gone a moment later
    while ask_status(int(endpoint.rpartition(":")[2])):
        assert time.monotonic() < deadline, "the server outlived its session"


def sockets_of(endpoint: str) -> list[Path]:
    return list(Path("/tmp").glob(f"seaweedfs-*-{endpoint.rpartition(':')[2]}.sock"))


def test_a_line_to_the_store_closes_when_the_store_closes_it():
    with (
        socket.create_server(("127.0.0.1", 0)) as store,
        open_proxy(f"http://127.0.0.1:{store.getsockname()[1]}") as proxy,
        socket.create_connection(("127.0.0.1", int(proxy.endpoint.rpartition(":")[2])), timeout=10) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        upstream, _ = store.accept()
        upstream.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        assert client.recv(1000)
        upstream.close()

        assert client.recv(1000) == b""
