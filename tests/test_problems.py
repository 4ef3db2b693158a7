# ruff: noqa: E501 - a case is one line: what is written, and the whole text it gets
"""The exact words, file and line for everything a job file may not say."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.errors import JobError
from batchpipe.jobfile import load_job
from tests.job_texts import JOB, enter_folder, error_of, load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "jobs/x.yaml: is empty; a job file is a mapping with the keys input, stages and output"),
        ("# nothing\n", "jobs/x.yaml: is empty; a job file is a mapping with the keys input, stages and output"),
        ("- a\n", "jobs/x.yaml: holds a list; a job file is a mapping with the keys input, stages and output"),
        ("just text\n", "jobs/x.yaml: holds 'just text'; a job file is a mapping with the keys input, stages and output"),
        ("a: 1\nuri: *.csv\n", 'jobs/x.yaml:2: a value that begins with * is an alias to YAML: quote it, as in "*.csv"'),
        ("[" * 1000, "jobs/x.yaml: nested too deeply"),
        (JOB + "output: {uri: a}\n", "jobs/x.yaml:6: output: stated twice, also on line 8"),
    ],
)  # fmt: skip
def test_file_that_is_no_job_is_told(folder: Path, text: str, error: str):
    assert error_of(text) == error


def test_missing_file_is_told(folder: Path):
    with pytest.raises(JobError, match=r"^jobs/nope\.yaml: there is no such job file$"):
        load_job("jobs/nope.yaml")


def test_folder_is_told(folder: Path):
    with pytest.raises(JobError, match=r"^jobs: is a folder; name a job file in it$"):
        load_job("jobs")


def test_unreadable_file_is_told(folder: Path):
    Path("jobs/x.yaml").touch()

    with pytest.raises(JobError, match=r"^jobs/x\.yaml/y: the job file cannot be read: Not a directory$"):
        load_job("jobs/x.yaml/y")


def test_file_that_is_not_text_is_told_with_its_line(folder: Path):
    Path("jobs/x.yaml").write_bytes(b"a: 1\nb: \xff\n")

    with pytest.raises(JobError, match=r"^jobs/x\.yaml:2: byte 8 is not UTF-8; a job file is UTF-8 text$"):
        load_job("jobs/x.yaml")


def test_dataset_named_by_mistake_is_not_read_whole(folder: Path):
    with pytest.raises(JobError, match=r"^/dev/zero: is larger than a job file may be \(1,048,576 bytes\)$"):
        load_job("/dev/zero")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("batch: {max_recods: 1}", "batch.max_recods: unknown key; did you mean 'max_records'?"),
        ("batch: {zzz: 1}", "batch.zzz: unknown key; the keys here are max_records, max_payload_mb, max_concurrent_transforms, split_mb"),
        ("path: x", "path: unknown key; did you mean 'batch'?"),
        ("batch: 5", "batch: expected a mapping of key: value, got 5"),
        ("batch: {max_payload_mb: 0}", "batch.max_payload_mb: must be more than 0, got 0"),
        ("batch: {max_payload_mb: .inf}", "batch.max_payload_mb: expected a finite number, got inf"),
        ("batch: {max_payload_mb: '6'}", "batch.max_payload_mb: expected a number, got '6'; write it without quotes"),
        ("batch: {max_records: 1.5}", "batch.max_records: expected a whole number, got 1.5"),
        ("batch: {max_records: true}", "batch.max_records: expected a whole number, got true"),
        ("name: 2024", "name: expected text, got 2024; quote it"),
        ("name: [a]", "name: expected text, got a list"),
        ("name: ''", "name: must not be empty"),
        ("name: a/b", "name: expected up to 63 letters, digits, '.', '-' and '_', got 'a/b'"),
        ("python_path: lib", "python_path: expected a list, got 'lib'"),
        ('python_path: ["a\\0"]', "python_path.0: must not contain a NUL character or half of a surrogate pair"),
        ("on_error: {max_failed_percent: 120}", "on_error.max_failed_percent: must be at most 100, got 120"),
        ("on_error: {placeholder: x}", "on_error.placeholder: is for output.format raw or csv, and it is parquet"),
        ('on_error: {placeholder: "a\\nb"}', "on_error.placeholder: expected one line, without its end, got 'a\\nb'"),
        ("compute: {workers: 0}", "compute.workers: expected auto, a whole number of at least 1, or {minimum, maximum}, got 0"),
        ("compute: {workers: many}", "compute.workers: expected auto, a whole number of at least 1, or {minimum, maximum}, got 'many'"),
        ("compute: {workers: {minimum: 3}}", "compute.workers.maximum: missing, and it has no default"),
        ("compute: {workers: {minimum: 3, maximum: 1}}", "compute.workers.minimum: is more than the maximum: 3 > 1"),
        ("compute: {cluster: remote}", "compute.cluster: expected local, {address: ...} or {class: ..., options: {...}}, got 'remote'"),
        ("compute: {cluster: {adress: x}}", "compute.cluster.adress: unknown key; did you mean 'address'?"),
        ("compute: {cluster: {class: Slurm}}", "compute.cluster.class: expected 'module.ClassName', got 'Slurm'"),
        ("data_processing: {join_source: Input}", "data_processing.join_source: expected none or input, got 'Input'; did you mean 'input'?"),
        ("data_processing: {input_filter: a}", "data_processing.input_filter: expected a JSONPath that begins with $, got 'a'"),
    ],
)  # fmt: skip
def test_block_is_refused_with_its_line(folder: Path, line: str, error: str):
    assert f"jobs/x.yaml:8: {error}" in error_of(JOB + line + "\n").splitlines()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("format: cvs", "input.format: expected csv, jsonl, parquet, lines or object, got 'cvs'; did you mean 'csv'?"),
        ("header: maybe", "input.header: expected true, false or a list of column names, got 'maybe'"),
        ("header: [a, b, a]", "input.header: names 'a' twice"),
        ("columns: []", "input.columns: must not be empty"),
        ("types: {a: int}", "input.types.a: unknown Arrow type 'int'; did you mean 'int64'?"),
        ("types: {a: flot64}", "input.types.a: unknown Arrow type 'flot64'; did you mean 'float64'?"),
        ('types: {a: "decimal128(2, 3)"}', "input.types.a: unknown Arrow type 'decimal128(2, 3)'; for example string, int64, float64, bool, date32, timestamp[us]"),
        ("delimiter: ';;'", "input.delimiter: expected one ASCII character, got ';;'"),
        ("quote: ','", "input.quote: is the delimiter too: ','"),
        ("null_values: [~]", "input.null_values.0: expected text, got nothing"),
        ("encoding: klingon", "input.encoding: unknown encoding 'klingon'"),
        ("allow_empty: yes", "input.allow_empty: expected true or false, got 'yes'"),
        ("{format: jsonl, delimiter: ';'}", "input.delimiter: is for format csv, and the format is jsonl"),
        ("{format: parquet, compression: gzip}", "input.compression: is for format csv or jsonl or lines or object, and the format is parquet"),
        ("storage_options: {s3: secret1}", "input.storage_options.s3: expected a mapping of key: value"),
    ],
)  # fmt: skip
def test_input_is_refused_with_its_line(folder: Path, line: str, error: str):
    keys = line.strip("{}") if line.startswith("{") else line
    text = JOB.replace(
        "uri: in/*.csv", "uri: in/*.csv\n  " + "\n  ".join(keys.split(", ") if line.startswith("{") else [keys])
    )

    assert [found.split(": ", 1)[1] for found in error_of(text).splitlines()] == [error]


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("{container: {image: x, enviroment: {A: b}}}", "stages.container.container.enviroment: unknown key; did you mean 'environment'?"),
        ("{name: model, container: {image: x, environment: {A: 5}}}", "stages.model.container.environment.A: expected text; quote it"),
        ("{name: model, container: {image: x, environment: {A B: c}}}", "stages.model.container.environment: 'A B' cannot be the name of an environment variable"),
        ("{name: model, container: {model_data: x}}", "stages.model.container.image: missing, and it has no default"),
        ("{name: model, process: {command: []}}", "stages.model.process.command: must not be empty"),
        ("{name: model, process: {command: python -m x}}", "stages.model.process.command: expected a list, got 'python -m x'"),
        ("{name: model, process: {command: [x], environment: {SAGEMAKER_BIND_TO_PORT: abc}}}", "stages.model.process.environment.SAGEMAKER_BIND_TO_PORT: must be a port, from 1 to 65535"),
        ("{name: model, container: {image: x, environment: {SAGEMAKER_BIND_TO_PORT: '65536'}}}", "stages.model.container.environment.SAGEMAKER_BIND_TO_PORT: must be a port, from 1 to 65535"),
        ("{name: model, endpoint: {url: 'http://h:abc/'}}", "stages.model.endpoint.url: is no URL: Port could not be cast to integer value as 'abc'"),
        ("{name: model, endpoint: {url: 'http://:80/'}}", "stages.model.endpoint.url: names no host"),
        ("{name: model, endpoint: {url: 'http://[::1/'}}", "stages.model.endpoint.url: is no URL: Invalid IPv6 URL"),
        ("{name: model, endpoint: {url: 'ftp://me:hunter2@h'}}", "stages.model.endpoint.url: expected a URL that begins with http:// or https://"),
        ('{name: model, endpoint: {url: "http://h", headers: {A: "x\\ny"}}}', "stages.model.endpoint.headers.A: must be one line"),
        ("{name: model, endpoint: {url: 'http://h', headers: {'a b': x}}}", "stages.model.endpoint.headers: 'a b' cannot be the name of an HTTP header"),
        ("{name: model, gpus: 1}", "stages.model: states none of callable, container, process, endpoint; a stage is one of them"),
        ("{gpus: 1}", "stages.0: states none of callable, container, process, endpoint; a stage is one of them"),
        ("{name: model, callable: 'a:b', process: {command: [x]}}", "stages.model.process: callable is stated too; a stage is one of callable, container, process, endpoint"),
        ("{callable: pkg.Model}", "stages.Model.callable: expected 'module:attribute', got 'pkg.Model'"),
        ("{callable: 'a:b', accept: text/csv}", "stages.b.accept: is for container, process and endpoint stages, and this stage is a callable"),
        ("{process: {command: [x]}, params: {a: 1}}", "stages.process.params: is for callable stages, and this stage is a process"),
        ("{endpoint: {url: 'http://h'}, gpus: 1}", "stages.endpoint.gpus: is not for endpoints: the devices of a URL that already runs are its own"),
        ("{process: {command: [x]}, accept: csv}", "stages.process.accept: expected a content type such as text/csv or application/json, got 'csv'"),
        ("{name: 1st, callable: 'a:b'}", "stages.1st.name: expected up to 63 letters, digits, - and _ that begin with a letter, got '1st'"),
        ("{process: {command: [x]}, count: none}", "stages.process.count: none is for output.format raw without a join"),
        ("5", "stages.0: expected a mapping of key: value, got 5"),
    ],
)  # fmt: skip
def test_stage_is_refused_by_name(folder: Path, stage: str, error: str):
    text = JOB.replace("name: model\n    callable: pkg.stages:Model", stage)

    assert error_of(text) == f"jobs/x.yaml:4: {error}"


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ("format: parkett", "output.format: expected parquet, csv, jsonl or raw, got 'parkett'; did you mean 'parquet'?"),
        ("layout: mirror", "output.layout: mirror joins pieces end to end, which Parquet files cannot be; use csv, jsonl or raw, or parts"),
        ("{format: csv, assemble_with: line}", "output.assemble_with: is for format raw, and the format is csv"),
        ("{format: raw, add_source: true}", "output.add_source: is for format parquet or csv or jsonl, and the format is raw"),
        ("{format: csv, compression: snappy}", "output.compression: snappy is for format parquet, and the format is csv; use gzip or zstd"),
        ("columns: {a: int}", "output.columns.a: unknown Arrow type 'int'; did you mean 'int64'?"),
        ("columns: [a, a]", "output.columns: names a column twice"),
        ("columns: []", "output.columns: names no column"),
        ("columns: 5", "output.columns: expected a list of column names, or name: Arrow type, got 5"),
    ],
)  # fmt: skip
def test_output_is_refused_with_its_line(folder: Path, keys: str, error: str):
    lines = keys.strip("{}").split(", ") if keys.startswith("{") else [keys]
    text = JOB.replace("uri: out", "uri: out\n  " + "\n  ".join(lines))

    assert [found.split(": ", 1)[1] for found in error_of(text).splitlines()] == [error]


@pytest.mark.parametrize("count", [0, 16])
def test_chain_has_1_to_15_stages(folder: Path, count: int):
    stages = "stages: [" + ", ".join(["{callable: 'a:b'}"] * count) + "]\n"
    text = "input: {uri: a}\n" + stages + "output: {uri: b}\n"

    assert error_of(text) == f"jobs/x.yaml:2: stages: a job has 1 to 15 stages, and this one has {count}"


def test_names_of_stages_are_distinct(folder: Path):
    text = JOB.replace("output:", "  - {name: model, callable: 'a:b'}\noutput:")

    assert error_of(text) == "jobs/x.yaml:6: stages.model.name: 'model' is the name of another stage"


def test_missing_blocks_are_told(folder: Path):
    assert error_of("name: x\n") == "\n".join(
        f"jobs/x.yaml:1: {block}: missing, and it has no default" for block in ("input", "stages", "output")
    )


def test_output_inside_the_input_names_both(folder: Path):
    text = JOB.replace("uri: in/*.csv", "uri: in").replace("uri: out", "uri: in/out")

    assert error_of(text) == (
        f"jobs/x.yaml:7: output.uri: '{folder}/jobs/in/out' lies inside the input '{folder}/jobs/in'"
        "; what is written would be read as input"
    )


def test_all_problems_are_told_at_once_in_the_order_of_their_lines(folder: Path):
    text = JOB.replace("uri: in/*.csv", "uri: ${A}\n  hedaer: true").replace("uri: out", "uri: 5") + "bacth: {}\n"

    assert [line.split(": ")[0] + " " + line.split(": ")[1] for line in error_of(text).splitlines()] == [
        "jobs/x.yaml:2 input.uri",
        "jobs/x.yaml:3 input.hedaer",
        "jobs/x.yaml:8 output.uri",
        "jobs/x.yaml:9 bacth",
    ]


def test_more_than_ten_problems_are_counted(folder: Path):
    lines = error_of(JOB + "\n".join(f"key{number}: 1" for number in range(13))).splitlines()

    assert (len(lines), lines[10]) == (11, "... and 3 more")


@pytest.mark.parametrize(
    "line",
    [
        "storage_options: hunter2-secret",
        "storage_options: {s3: hunter2-secret}",
        "storage_options: {s3: [hunter2-secret]}",
        "batch: 'https://me:hunter2-secret@host/x?sig=hunter2-secret'",
        "compute: {cluster: {class: 'https://me:hunter2-secret@host'}}",
    ],
)
def test_no_error_repeats_a_secret(folder: Path, line: str):
    with pytest.raises(JobError) as raised:
        load(JOB + line + "\n")

    assert "hunter2-secret" not in str(raised.value) + repr(raised.value.__cause__) + str(raised.value.__cause__)


@settings(deadline=None)
@given(st.text())
def test_any_text_loads_or_is_told(tmp_path_factory: pytest.TempPathFactory, text: str):
    job_file = tmp_path_factory.getbasetemp() / "any.yaml"
    job_file.write_bytes(text.encode("utf-8", "surrogatepass"))

    with pytest.raises(JobError):
        load_job(job_file)
