"""`verify` and `show`: every flipped byte, missing or foreign part is found; the manifest fits its published schema."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pandas as pd
import pyarrow.dataset as ds
import pytest

from batchpipe.manifest import Manifest
from tests.jobs import Jobs, csv_rows, open_jobs

FORMATS = ["parquet", "csv", "jsonl", "raw"]
STAGES = """
import pandas as pd

def echo(frame: pd.DataFrame):
    return frame

def line(frame: pd.DataFrame):
    return [text.encode() for text in frame.text]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Jobs]]:
    """A finished output of each format."""
    made = {}
    for name in FORMATS:
        made[name] = jobs = Jobs(tmp_path_factory.mktemp(name))
        jobs.write("stages.py", STAGES)
        jobs.write("in/a.csv", csv_rows(200))
        jobs.write("in/b.csv", "")
        stage = "stages:line" if name == "raw" else "stages:echo"
        ran = jobs.run("run", jobs.job(stage, output={"format": name}, batch={"split_mb": 0.001}))
        assert ran.code == 0, ran.err
    yield made
    for jobs in made.values():
        jobs.end()


@pytest.fixture
def copied(done: dict[str, Jobs], tmp_path: Path) -> Iterator[Jobs]:
    """A copy of the finished Parquet output, to be spoiled."""
    with open_jobs(tmp_path) as jobs:
        shutil.copytree(done["parquet"].out, jobs.out)
        yield jobs


@pytest.mark.parametrize("name", FORMATS)
def test_a_sound_output_of_every_format_is_verified(done: dict[str, Jobs], name: str):
    verified = done[name].run("verify", "job.yaml", "--json")

    assert verified.code == 0, verified.err
    assert verified.manifest["accounts"]["written"] == 200
    assert len(done[name].parts()) > 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (flip, "part-00000001.parquet was changed: its SHA-256 is not the published one"),
        (lambda part: part.write_bytes(part.read_bytes()[:-1]), "part-00000001.parquet has "),
        (lambda part: part.unlink(), "part-00000001.parquet is missing"),
        (lambda part: part.with_name("part-9.parquet").write_bytes(b""), "part-9.parquet is no part of this run"),
        (lambda part: flip(next(part.parent.glob("_batchpipe/*/parts.jsonl"))), "parts.jsonl was changed"),
        (lambda part: next(part.parent.glob("_batchpipe/*/inputs.jsonl")).unlink(), "inputs.jsonl is missing"),
    ],
)
def test_what_was_spoiled_is_named(copied: Jobs, spoil: Callable[[Path], None], text: str):
    spoil(copied.out / "part-00000001.parquet")

    verified = copied.run("verify", copied.out)

    assert (verified.code, text in verified.err) == (7, True), verified.err
    assert "error: the output is not what run " in verified.err


def test_a_folder_without_a_finished_run_is_7(tmp_path: Path):
    with open_jobs(tmp_path) as jobs:
        shown = jobs.run("show", jobs.folder)

    assert (shown.code, "error: there is no finished run in " in shown.err) == (7, True)


def test_the_manifest_fits_its_schema_and_says_what_was_read_and_written(done: dict[str, Jobs]):
    shown = done["parquet"].run("show", "out", "--json").manifest

    jsonschema.validate(shown, Manifest.model_json_schema())
    assert {"python", "batchpipe", "pyarrow", "pandas", "dask"} <= shown["versions"].keys()
    assert shown["stages"]["echo"]["records"] == 200
    assert shown["job"]["output"]["format"] == "parquet"
    assert shown["worker_seconds"] > 0


def test_G1_the_accounts_of_every_object_are_in_the_manifest_the_empty_one_too(done: dict[str, Jobs]):
    rows = {Path(row["uri"]).name: row for row in done["parquet"].table("inputs")}

    assert {name: (row["read"], row["written"], row["bytes"]) for name, row in rows.items()} == {
        "a.csv": (200, 200, (done["parquet"].folder / "in/a.csv").stat().st_size),
        "b.csv": (0, 0, 0),
    }


def test_every_format_is_read_by_other_tools_in_input_order(done: dict[str, Jobs]):
    parts = {name: jobs.parts() for name, jobs in done.items()}

    expected = list(range(200))
    assert ds.dataset(done["parquet"].out).to_table()["n"].to_pylist() == expected
    assert pd.concat([pd.read_csv(part) for part in parts["csv"]]).n.tolist() == expected
    assert pd.concat([pd.read_json(part, lines=True) for part in parts["jsonl"]]).n.tolist() == expected
    assert b"".join(part.read_bytes() for part in parts["raw"]).decode().split("\n")[:-1] == [
        f"row {n}" for n in expected
    ]


def test_long_tables_are_json_lines_that_the_manifest_counts(done: dict[str, Jobs]):
    manifest = json.loads((done["parquet"].out / "_batchpipe/manifest.json").read_text())

    parts = done["parquet"].table("parts")
    assert (manifest["parts"]["rows"], manifest["parts"]["bytes"]) == (len(parts), sum(part["bytes"] for part in parts))
    assert [part["uri"] for part in parts] == [path.name for path in done["parquet"].parts()]
