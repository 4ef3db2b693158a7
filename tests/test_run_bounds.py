"""One big file for all workers (G4), memory that does not grow with it (G6), nothing secret told (G7)."""

import csv
import gzip
import io
import os
import random
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs, until

STAGES = """
import pandas as pd
import resource

def lengths(frame: pd.DataFrame):
    return frame[["n"]].assign(length=frame.text.str.len())

def peak(frame: pd.DataFrame):
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024] * len(frame)

def block(frame: pd.DataFrame):
    (HERE / "began").touch()
    wait_for("go")
    return frame

def tell(frame: pd.DataFrame):
    print(os.environ, flush=True)
    raise ValueError("no")
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + STAGES)
        yield jobs


def quoted_rows(count: int) -> tuple[str, list[int]]:
    """CSV whose values hold newlines, quotes, and lines that look like records; and the length of each value."""
    choice = random.Random(1)
    texts = [
        "".join(choice.choices(["a", ",", "\n", '"', "\n1,2\n", "é"], k=choice.randrange(40))) for _ in range(count)
    ]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([("n", "text"), *((n, f"x{text}") for n, text in enumerate(texts))])
    return out.getvalue(), [len(text) + 1 for text in texts]


def test_G4_one_file_with_quoted_newlines_is_cut_for_all_workers_and_gives_the_same_bytes(jobs: Jobs):
    text, lengths = quoted_rows(20_000)
    jobs.write("in/a.csv", text)
    written = []
    for workers in ("1", "2"):
        to = jobs.folder / f"out{workers}"
        job = jobs.job("stages:lengths", batch={"split_mb": 0.02}, output={"uri": str(to)})
        ran = jobs.run("run", job, "--workers", workers, "--json")
        assert (ran.code, ran.manifest["splits"] > 20) == (0, True), ran.err
        jobs.out = to
        written.append(jobs.part_bytes())

    assert written[0] == written[1]
    assert [(row["n"], row["length"]) for row in jobs.records()] == list(enumerate(lengths))


def gzip_csv(rows: int) -> bytes:
    return gzip.compress(("n,text\n" + f"1,{'x' * 60}\n" * rows).encode(), 1)


def one_row_group(rows: int) -> bytes:
    sink = io.BytesIO()
    # Random, so that it neither compresses nor fits a dictionary: the group is as large as it looks.
    values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(512), rows, [None, pa.py_buffer(os.urandom(512 * rows))])
    table = pa.table({"n": values})
    pq.write_table(table, sink, row_group_size=rows, use_dictionary=False, compression="none")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "rows"), [("in/a.csv.gz", gzip_csv, 80_000), ("in/a.parquet", one_row_group, 25_000)]
)
def test_G6_the_peak_of_a_worker_does_not_grow_with_an_object_that_is_one_split(jobs: Jobs, name, make, rows):
    """Ten times the object: 45 to 115 MB more of it may cost 24 MB, the noise of the allocators."""
    kind = "parquet" if "parquet" in name else "csv"
    peaks = []
    for factor in (1, 10):
        jobs.write(name, make(rows * factor))
        job = jobs.job("stages:peak", input={"format": kind}, batch={"max_payload_mb": 1})
        ran = jobs.run("run", job, "--set", f"output.uri={jobs.folder / str(factor)}", "--json")
        assert (ran.code, ran.manifest["splits"]) == (0, 1), ran.err
        jobs.out = jobs.folder / str(factor)
        peaks.append(max(row["prediction"] for row in jobs.records()))

    assert peaks[1] - peaks[0] < 24


def test_G7_secrets_are_in_nothing_that_a_run_prints_or_writes(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(20))
    values: dict[str, Any] = {"s3": {"key": "AKIA${PART}", "secret": "wJalrXUtnFEMI"}}
    job = jobs.job(storage_options=values)
    ran = jobs.run("run", job, "-v", PART="OPTION77")
    elsewhere = ("--set", "output.uri=out2", "--set", "stages.echo.callable=stages:tell")
    failed = jobs.run("run", job, "-v", *elsewhere, PART="OPTION77")
    shown = jobs.run("show", jobs.out, "--json")
    told = [text for each in (ran, failed, shown) for text in (each.out, each.err)]
    files = [path for folder in ("out", "out2") for path in (jobs.folder / folder).rglob("*") if path.is_file()]
    told += [path.read_text(errors="replace") for path in files]

    assert (ran.code, failed.code) == (0, 5), ran.err + failed.err
    assert {path.parent.name for path in files} >= {"_batchpipe", "journal", "quarantine"}
    assert shown.manifest["job"]["storage_options"] == {"s3": {"key": "***", "secret": "***"}}
    assert not [text for text in told if "OPTION77" in text or "wJalrXUtnFEMI" in text]


def listening(jobs: Jobs) -> list[tuple[str, int]]:
    """Addresses that the run's processes listen on."""
    found = [c.laddr for p in jobs.processes() for c in p.net_connections("tcp") if c.status == "LISTEN"]
    return [(address.ip, address.port) for address in found]


def answer_to(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(request)
        try:
            return connection.recv(1 << 16)
        except OSError:
            return b""


def hear_over_tls(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=1) as connection,
        context.wrap_socket(connection) as secured,
    ):
        secured.sendall(b"hello")
        if heard := secured.recv(1):
            return heard
    raise ConnectionResetError("closed")


def test_G7_ports_are_of_this_host_alone_and_speak_tls_or_have_no_routes(jobs: Jobs):
    jobs.write("in/a.csv", csv_rows(20))
    run = jobs.start("run", jobs.job("stages:block"))
    until((jobs.folder / "began").exists, within_s=60)

    addresses = listening(jobs)
    assert addresses
    assert {ip for ip, _ in addresses} == {"127.0.0.1"}
    for _, port in addresses:
        for path in (b"/", b"/info/main/workers.html", b"/metrics"):
            answered = answer_to(port, b"GET " + path + b" HTTP/1.0\r\n\r\n")
            assert answered == b"" or b" 404 " in answered.splitlines()[0], (port, path, answered[:200])
        with pytest.raises(OSError, match=r"."):  # mutual TLS: whoever has no certificate of this run gets nowhere
            hear_over_tls(port)
    jobs.write("go", "")
    assert run.wait(60) == 0
