"""What a job is: defaults, names, bounds, what is inside what, pickling, fingerprint, schema and reference."""

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from batchpipe.job import Job, fingerprint_document
from batchpipe.jobfile import load_job
from batchpipe.jobfile.schema import job_schema
from batchpipe.redact import secrets_of
from batchpipe.specs.arrow_types import ARROW_TYPES, arrow_type, check_arrow_type

REFERENCE = (Path(__file__).parent.parent / "docs/job-file.md").read_text()
WORDS = {
    "string": "text", "number": "number", "integer": "whole number", "boolean": "`true`, `false`",
    "array": "list", "object": "mapping",
}  # fmt: skip
SECRETS = {"storage_options": {"s3": {"secret": "hunter2-s3"}}, "environment": {"PW": "hunter2-env"}}


def make_job(*stages: Any, **blocks: Any) -> Job:
    written = {"input": {"uri": "/in"}, "stages": list(stages) or [{"callable": "a:b"}], "output": {"uri": "/out"}}
    return Job.model_validate(written | blocks)


def container(**keys: Any) -> dict[str, Any]:
    return {"container": {"image": "i", **keys}}


def test_defaults_are_the_design_s():
    job = make_job()

    assert (job.input.format, job.input.header, job.input.null_values) == ("csv", True, ("",))
    assert (job.output.format, job.output.layout, job.output.if_exists) == ("parquet", "parts", "error")
    assert (job.output.assemble_with, job.output.codec) == ("line", "snappy")
    assert (job.stages[0].invocations_timeout_s, job.stages[0].invocations_max_retries) == (600, 3)
    assert (job.on_error.max_failed_records, job.on_error.max_failed_percent) == (0, None)
    assert (job.on_error.no_progress_timeout_s, job.on_error.max_runtime_s) == (1800, None)
    assert (job.compute.workers, job.compute.cluster) == ("auto", "local")


@pytest.mark.parametrize(
    ("written", "records", "percent"),
    [({}, 0, None), ({"max_failed_percent": 1}, None, 1), ({"max_failed_records": 5}, 5, None),
     ({"max_failed_records": 5, "max_failed_percent": 0.1}, 5, 0.1)],
)  # fmt: skip
def test_stating_either_budget_replaces_the_default(written: dict[str, Any], records: int, percent: float):
    on_error = make_job(on_error=written).on_error

    assert (on_error.max_failed_records, on_error.max_failed_percent) == (records, percent)


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([{"callable": "a:f"}, {"callable": "b:f"}, {"callable": "c:f"}], ["f", "f-2", "f-3"]),
        ([{"callable": "a:M.run"}, container(), container()], ["run", "container", "container-2"]),
        ([{"callable": "a:f"}, {"name": "f", "callable": "a:g"}], ["f-2", "f"]),
        ([{"callable": "a:größe"}], ["gr__e"]),
    ],
)
def test_stages_are_named_and_numbered(stages: list[Any], names: list[str]):
    assert [stage.name for stage in make_job(*stages).stages] == names


def test_payload_is_what_the_job_states_then_what_the_container_advises_then_6_mb():
    plain, stated = make_job(container()), make_job({**container(), "max_payload_mb": 0.5})
    batch = make_job(batch={"max_payload_mb": 2}).batch

    assert plain.stages[0].max_payload_bytes(plain.batch) == plain.batch.max_payload_bytes == 6 * 1_048_576
    assert plain.stages[0].max_payload_bytes(plain.batch, advised_mb=5) == 5 * 1_048_576
    assert plain.stages[0].max_payload_bytes(batch, advised_mb=5) == batch.max_payload_bytes == 2 * 1_048_576
    assert stated.stages[0].max_payload_bytes(batch, advised_mb=5) == 524_288


def test_transforms_in_flight_are_what_the_job_states_then_the_default():
    stage, own = make_job(container()).stages[0], make_job({**container(), "max_concurrent_transforms": 2}).stages[0]
    batch = make_job(batch={"max_concurrent_transforms": 4}).batch

    assert [stage.concurrent_transforms(make_job().batch, 8), stage.concurrent_transforms(batch, 8)] == [8, 4]
    assert own.concurrent_transforms(batch, 8) == 2


def test_sizes_may_be_fractions():
    job = make_job(batch={"split_mb": 0.25}, input={"uri": "/in", "max_record_mb": 0.5})

    assert (job.batch.split_bytes, job.input.max_record_bytes) == (262_144, 524_288)
    assert make_job().batch.split_bytes is None


def test_storage_options_of_a_block_go_over_the_job_s():
    job = make_job(
        storage_options={"s3": {"profile": "a", "anon": False}, "gs": {"x": 1}},
        input={"uri": "s3://b/in", "storage_options": {"s3": {"profile": "b"}}},
    )

    assert job.input.storage_options == {"s3": {"profile": "b", "anon": False}, "gs": {"x": 1}}
    assert job.output.storage_options == job.stages[0].storage_options == job.storage_options


def test_output_columns_are_names_or_types():
    def columns(written: Any) -> Any:
        return make_job(output={"uri": "/out", "columns": written}).output.columns

    assert columns(["b", "a"]) == {"b": None, "a": None}
    assert columns({"b": "int64", "a": None}) == {"b": "int64", "a": None}


@pytest.mark.parametrize(
    ("uri", "output"),
    [
        ("/in", "/in"), ("/in", "/in/out"), ("file:///in", "/in/out"), ("/in/", "/in/../in/out"),
        ("/in/*.csv", "/in"), ("/in/**/*.csv", "/in/out"), ("/in/*/*.csv", "/in/out"), ("/in/a*/x/*", "/in/ab/x"),
        ("s3://b/in", "s3://b/in/out"), ("s3://b/in", "s3a://key:pw@b/in/out"), ("s3://b/**", "s3://b/out"),
        ("s3://b/in/${ds}/**", "s3://b/in/${ds}/out"),
    ],
)  # fmt: skip
def test_output_where_the_input_is_read_from_is_refused(uri: str, output: str):
    with pytest.raises(ValidationError, match="lies inside the input"):
        make_job(input={"uri": ["/else", uri]}, output={"uri": output})


@pytest.mark.parametrize(
    ("uri", "output"),
    [
        ("/in", "/input"), ("/in", "/"), ("/in/a.csv", "/in"), ("/in/*.csv", "/in/out"), ("/data/in/*.csv", "/data"),
        ("/in/*/x/*.csv", "/in/a/y"), ("s3://b/in", "s3://c/in"), ("s3://b/in", "/b/in"), ("s3://b/in/*", "s3://b/in/out"),
    ],
)  # fmt: skip
def test_output_beside_the_input_is_taken(uri: str, output: str):
    assert make_job(input={"uri": uri}, output={"uri": output}).output.uri == output


# Workers and manifests


def test_the_command_of_a_job_repeats_how_it_was_given_without_its_secrets(tmp_path: Path):
    path = tmp_path / "a job.yaml"
    path.write_text("{input: {uri: in}, stages: [{callable: 'a:b'}], output: {uri: '${where}'}}")
    secret = {"input.storage_options": '{s3: {secret: "hunter2-s3"}}', "on_error.max_failed_records": "3"}
    job = load_job(path, set=[f"{key}={value}" for key, value in secret.items()], vars={"where": "out"})

    assert shlex.split(job.command("run")) == [
        "batchpipe", "run", str(path), "--set", 'input.storage_options={s3: {secret: "***"}}',
        "--set", "on_error.max_failed_records=3", "--var", "where=out",
    ]  # fmt: skip
    assert shlex.split(job.command("run", max_failed_records=10))[-4:] == [
        "--var", "where=out", "--set", "on_error.max_failed_records=10",
    ]  # fmt: skip
    assert job.command("run", max_failed_records=10).count("max_failed_records") == 1


def test_job_is_pickled_with_its_secrets():
    job = make_job(container(environment=SECRETS["environment"]), storage_options=SECRETS["storage_options"])
    job._written = {"name": "x"}

    copy = pickle.loads(pickle.dumps(job))

    assert copy == job
    assert copy.document() == {"name": "x"}
    assert secrets_of(copy) == secrets_of(job) == {"hunter2-s3", "hunter2-env"}


def test_job_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make_job().name = "x"


@pytest.mark.parametrize(
    "show", [repr, str, lambda job: str(job.document()), lambda job: str(fingerprint_document(job))]
)
def test_no_secret_is_shown(show: Any):
    job = make_job(
        container(environment=SECRETS["environment"], model_data="https://me:hunter2@h/m.zip?sig=hunter2"),
        {"endpoint": {"url": "https://me:hunter2@h/x?key=hunter2", "headers": {"Authorization": "Bearer hunter2"}}},
        input={"uri": "https://me:hunter2@h/in?sig=hunter2", **{"storage_options": SECRETS["storage_options"]}},
        storage_options=SECRETS["storage_options"],
    )

    assert "hunter2" not in show(job)


def test_document_is_the_job_as_written_without_secrets():
    job = make_job()
    job._written = {"output": {"uri": "s3://k:pw@b/${ds}"}, "storage_options": {"s3": {"key": "${K:-x}"}}}

    assert job.document() == {"output": {"uri": "s3://b/${ds}"}, "storage_options": {"s3": {"key": "***"}}}


@pytest.mark.parametrize(
    "blocks",
    [
        {"on_error": {"max_failed_records": 5, "max_runtime_s": 1}}, {"compute": {"workers": 3}}, {"name": "other"},
        {"storage_options": {"s3": {"key": "k"}}}, {"batch": {"max_concurrent_transforms": 3}},
        {"input": {"uri": "/in", "header": True, "storage_options": {"s3": {"key": "k"}}}}, {"python_path": ["/lib"]},
    ],
)  # fmt: skip
def test_fingerprint_leaves_out_what_may_change_between_runs(blocks: dict[str, Any]):
    assert fingerprint_document(make_job(**blocks)) == fingerprint_document(make_job())


@pytest.mark.parametrize(
    "stage",
    [
        {**container(), "invocations_timeout_s": 5, "invocations_max_retries": 0, "max_concurrent_transforms": 3},
        container(memory_mb=5, cpus=1, shm_mb=1, pids=5, startup_timeout_s=1),
        {**container(), "storage_options": {"s3": {"key": "k"}}},
    ],
)
def test_fingerprint_leaves_out_limits_of_a_stage(stage: dict[str, Any]):
    assert fingerprint_document(make_job(stage)) == fingerprint_document(make_job(container()))


def test_fingerprint_leaves_out_whether_a_callable_is_thread_safe():
    assert fingerprint_document(make_job({"callable": "a:b", "thread_safe": True})) == fingerprint_document(make_job())


@pytest.mark.parametrize(
    "blocks",
    [
        {"input": {"uri": "/in", "header": False}}, {"batch": {"max_records": 3}}, {"batch": {"max_payload_mb": 6}},
        {"data_processing": {"join_source": "input"}}, {"output": {"uri": "/out", "format": "csv"}},
        {"stages": [{"callable": "a:b", "params": {"x": 1}}]},
        {"output": {"uri": "/out", "format": "raw"}, "on_error": {"placeholder": "ERROR"}},
    ],
)  # fmt: skip
def test_fingerprint_holds_what_decides_the_answers(blocks: dict[str, Any]):
    assert fingerprint_document(make_job(**blocks)) != fingerprint_document(make_job())


def test_fingerprint_tells_one_placeholder_from_another():
    of_a, of_b = (
        fingerprint_document(make_job(output={"uri": "/out", "format": "raw"}, on_error={"placeholder": text}))
        for text in "ab"
    )

    assert of_a != of_b


@pytest.mark.parametrize(
    ("stage", "output", "placeholder", "text"),
    [
        ({"callable": "a:b"}, "csv", "", "a blank line is no row"),
        ({"callable": "a:b"}, "csv", 'a"b', "its quote is not closed"),
        ({**container(), "count": "none"}, "raw", "x", "none knows no record's place, where on_error.placeholder"),
    ],
)
def test_a_placeholder_that_could_not_keep_places_is_refused(stage, output, placeholder, text):
    with pytest.raises(ValidationError, match=text):
        make_job(stage, output={"uri": "/out", "format": output}, on_error={"placeholder": placeholder})


def test_fingerprint_tells_environments_headers_and_queries_apart_without_showing_them():
    def print_of(environment: str, header: str, query: str) -> Any:
        headers = {"X-Model": header, "Authorization": f"Bearer {environment}{header}{query}"}
        endpoint = {"endpoint": {"url": f"http://h/?model={query}", "headers": headers}}
        return fingerprint_document(make_job(container(environment={"A": environment}), endpoint))["stages"]

    first = print_of("aaaa", "bbbb", "cccc")

    assert [
        print_of(*values) == first for values in (["x", "bbbb", "cccc"], ["aaaa", "x", "cccc"], ["aaaa", "bbbb", "x"])
    ] == [False] * 3
    assert not re.search("aaaa|bbbb|cccc", json.dumps(first))
    assert first[0]["container"]["environment"].startswith("sha256:")


def test_fingerprint_does_not_follow_credentials_and_signatures():
    def print_of(secret: str) -> Any:
        endpoint = {"endpoint": {"url": "http://h", "headers": {"authorization": f"Bearer {secret}"}}}
        model = container(model_data=f"https://h/m.zip?sig={secret}")
        return fingerprint_document(make_job(endpoint, model, input={"uri": f"https://h/a.csv?sig={secret}"}))

    assert print_of("a") == print_of("b")


# Arrow types, schema, reference


@pytest.mark.parametrize("name", ARROW_TYPES)
def test_every_arrow_type_is_one_of_pyarrow(name: str):
    assert isinstance(arrow_type(check_arrow_type(name)), pa.DataType)


def test_arrow_types_with_parameters():
    assert arrow_type(check_arrow_type("timestamp[ms, tz=Europe/Berlin]")) == pa.timestamp("ms", "Europe/Berlin")
    assert arrow_type(check_arrow_type("decimal128(18, 2)")) == pa.decimal128(18, 2)


def test_models_are_imported_without_the_data_libraries():
    code = "import sys, batchpipe.jobfile, batchpipe.jobfile.schema; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert not {"pyarrow", "pandas", "numpy", "dask", "distributed", "fsspec", "s3fs", "click"} & set(loaded)


def examples() -> list[Any]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL)]


@pytest.mark.parametrize("example", examples(), ids=lambda example: str(example.get("name")))
def test_every_example_of_the_reference_is_a_job_and_fits_the_schema(example: Any, tmp_path: Path):
    jsonschema.validate(example, job_schema())

    assert Job.model_validate(example).name == example["name"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("batch", {"max_records": "${N}"}),
        ("input", {"uri": ["a"], "header": ["a"]}),
        ("compute", {"workers": "${N:-2}"}),
    ],
)
def test_schema_takes_variables_for_numbers(place: str, value: Any):
    jsonschema.validate(
        {"input": {"uri": "a"}, "stages": [{"callable": "a:b"}], "output": {"uri": "b"}, place: value}, job_schema()
    )


@pytest.mark.parametrize(
    "value", [{"max_recods": 1}, {"max_records": "abc"}, {"max_records": 0}, {"max_payload_mb": "6"}, []]
)
def test_schema_refuses_what_the_models_refuse(value: Any):
    document = {"input": {"uri": "a"}, "stages": [{"callable": "a:b"}], "output": {"uri": "b"}, "batch": value}

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, job_schema())


def test_schema_is_one_itself_and_describes_every_key():
    jsonschema.Draft202012Validator.check_schema(job_schema())

    for block in [job_schema(), *job_schema()["$defs"].values()]:
        for key, schema in block.get("properties", {}).items():
            assert "description" in schema or "$ref" in schema, key


def reference_rows() -> list[str]:
    """Return the table row that the reference must have for every key, made from the schema."""
    schema = job_schema()
    blocks = [schema, *(schema["$defs"][name] for name in sorted(schema["$defs"]))]
    return [row_of(key, block) for block in blocks for key in block.get("properties", {})]


def row_of(key: str, block: dict[str, Any]) -> str:
    schema = block["properties"][key]
    default = "required" if key in block.get("required", ()) else ""
    if "default" in schema:
        value = schema["default"]
        default = f"`{value if isinstance(value, str) else json.dumps(value).removesuffix('.0')}`"
    described = schema.get("description") or job_schema()["$defs"][schema["$ref"].split("/")[-1]]["description"]
    return f"| `{key}` | {values_of(schema)} | {default} | {described} |"


def values_of(schema: dict[str, Any]) -> str:
    """Return what a key may hold, in words; null and variables go without saying."""
    words = []
    for member in schema.get("anyOf", [schema]):
        if "enum" in member or "const" in member:
            words += [f"`{choice}`" for choice in member.get("enum", [member.get("const")])]
        elif "$ref" in member:
            words += [] if member["$ref"].endswith("/Variable") else ["block"]
        elif member["type"] != "null":
            words += [WORDS[member["type"]]]
    return ", ".join(dict.fromkeys(words))


@pytest.mark.parametrize("row", sorted(set(reference_rows())))
def test_reference_has_every_key_with_its_default_and_description(row: str):
    assert row in REFERENCE.splitlines()
