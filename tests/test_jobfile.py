"""load_job: what a job file may say, and what becomes of its paths and variables."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.job import fingerprint_document
from batchpipe.jobfile import fill_run_id, load_job
from tests.job_texts import JOB, enter_folder, error_of, load

CHURN = """\
input: {uri: "s3://acme-in/churn/${ds}/**/*.csv", format: csv, header: false}
batch: {max_payload_mb: 6, max_concurrent_transforms: 4}
data_processing: {input_filter: "$[1:]", join_source: input, output_filter: "$[0,-1]"}
stages:
  - {name: prep,  container: {image: "acme/prep:3", model_data: "s3://acme-models/prep.tar.gz"}}
  - {name: model, container: {image: "acme/xgb:7", memory_mb: 2048}, invocations_timeout_s: 60}
  - {name: post,  process: {command: [python, -m, post_server]}}
output: {uri: "s3://acme-out/churn/${ds}", format: raw, layout: mirror, assemble_with: line}
on_error: {max_failed_percent: 0.1, placeholder: "ERROR"}
compute: {workers: 4}
storage_options: {s3: {profile: scoring}}
"""

LABELS = """\
input: {uri: "../photos/**/*.jpg", format: object}
stages:
  - name: resnet
    container: {image: "acme/resnet:2", model_data: ../models/resnet/, shm_mb: 1024}
    gpus: 1
    accept: application/json
output: {uri: ../out/labels, format: jsonl, add_source: true}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_folder(tmp_path, monkeypatch)


def test_callable_job_has_absolute_paths_and_the_files_name(folder: Path):
    job = load(JOB)

    assert (job.name, job.path) == ("x", folder / "jobs/x.yaml")
    assert job.input.uri == (str(folder / "jobs/in/*.csv"),)
    assert job.output.uri == str(folder / "jobs/out")
    assert job.import_folders == (str(folder / "jobs"),)


def test_pipeline_job_with_data_processing_loads(folder: Path):
    job = load(CHURN)
    today = datetime.now(UTC).date().isoformat()

    assert job.input.uri == (f"s3://acme-in/churn/{today}/**/*.csv",)
    assert [stage.kind for stage in job.stages] == ["container", "container", "process"]
    assert (job.data_processing.join_source, job.data_processing.output_filter) == ("input", "$[0,-1]")
    assert (job.on_error.max_failed_records, job.on_error.max_failed_percent) == (None, 0.1)
    assert job.stages[0].storage_options == job.input.storage_options == {"s3": {"profile": "scoring"}}


def test_object_job_loads_with_its_model_beside_the_file(folder: Path):
    container = load(LABELS).stages[0].container

    assert container
    assert (container.model_data, container.shm_mb) == (str(folder / "models/resnet"), 1024)


@pytest.mark.parametrize(
    "job_file", sorted(Path(__file__).parent.parent.glob("jobs/*.yaml")), ids=lambda path: path.stem
)
def test_every_job_of_the_repository_loads(job_file: Path):
    assert load_job(job_file).name == job_file.stem


def test_json_is_a_job_file(folder: Path):
    text = '{\n\t"input": {"uri": "in"},\n\t"stages": [{"callable": "a:b"}],\n\t"output": {"uri": "out"}\n}'

    assert load(text).stages[0].name == "b"


def test_byte_order_mark_is_skipped(folder: Path):
    assert load("\ufeff" + JOB).name == "x"


def test_lists_of_uris_and_python_path_are_relative_to_the_file(folder: Path):
    job = load(JOB.replace("uri: in/*.csv", 'uri: [a, "s3://b/c", /d]') + "python_path: [lib, ../src]\n")

    assert job.input.uri == (str(folder / "jobs/a"), "s3://b/c", "/d")
    assert job.import_folders == tuple(str(folder / place) for place in ("jobs", "jobs/lib", "src"))


def test_home_folder_is_known(folder: Path):
    assert load(JOB.replace("uri: out", "uri: ~/out")).output.uri == os.environ["HOME"] + "/out"


def test_null_means_the_default(folder: Path):
    job = load(JOB + "name:\nbatch: ~\non_error: {max_failed_records: ~}\ncompute:\n  workers:\n")

    assert (job.name, job.batch.max_payload_bytes, job.compute.workers) == ("x", 6 * 1024 * 1024, "auto")
    assert job.on_error.max_failed_records == 0


@pytest.mark.parametrize(
    ("stem", "name"), [("my job", "my-job"), ("..x", "x"), ("äö", "job"), ("flight_delays", "flight_delays")]
)
def test_name_is_the_files_with_what_a_name_may_hold(folder: Path, stem: str, name: str):
    job_file = folder / f"{stem}.yaml"
    job_file.write_text(JOB)

    assert load_job(job_file).name == name


# Variables


def test_variables_come_from_var_then_environment(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A", "env-a")
    monkeypatch.setenv("B", "env-b")
    job = load(JOB.replace("uri: out", 'uri: "s3://x/${A}/${B}/${C:-c}/$${D}"'), vars={"A": "var-a"})

    assert job.output.uri == "s3://x/var-a/env-b/c/${D}"


def test_unquoted_variable_has_the_type_of_its_value(folder: Path):
    assert load(JOB + "compute:\n  workers: ${N}\n", vars={"N": "3"}).compute.workers == 3


def test_quoted_variable_that_is_a_number_is_told_to_lose_its_quotes(folder: Path):
    error = error_of(JOB + 'compute:\n  workers: "${N}"\n', vars={"N": "3"})

    assert error == (
        "jobs/x.yaml:9: compute.workers: expected auto, a whole number of at least 1, or {minimum, maximum}, got '3'"
        "; write it without quotes"
    )


def test_unset_variables_are_told_all_at_once_and_nothing_that_follows_from_them(folder: Path):
    text = JOB.replace("uri: out", "uri: ${OUT}") + "batch:\n  max_records: ${N}\n"

    assert error_of(text) == (
        "jobs/x.yaml:7: output.uri: variable 'OUT' is not set; set it with --var OUT=... or in the environment\n"
        "jobs/x.yaml:9: batch.max_records: variable 'N' is not set; set it with --var N=... or in the environment"
    )


def test_variable_is_not_asked_for_where_a_setting_replaces_it(folder: Path):
    assert load(JOB.replace("uri: out", "uri: ${OUT}"), set=["output.uri=s3://x/y"]).output.uri == "s3://x/y"


@settings(deadline=None)
@given(value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0$"), min_size=1))
def test_variable_cannot_change_the_structure_of_the_file(tmp_path_factory: pytest.TempPathFactory, value: str):
    job_file = tmp_path_factory.getbasetemp() / "variable.yaml"
    job_file.write_text(JOB.replace("uri: in/*.csv", "uri: in/*.csv\n  null_values:\n  - <${V}>\n"))

    assert load_job(job_file, vars={"V": value}).input.null_values == (f"<{value}>",)


def test_run_id_stays_until_it_is_filled_in(folder: Path):
    job = load(JOB.replace("uri: out", "uri: out/${run_id}"))
    filled = fill_run_id(job, "r1")

    assert job.output.uri == str(folder / "jobs/out/${run_id}")
    assert filled.output.uri == str(folder / "jobs/out/r1")
    assert (filled.path, filled.document(), filled.name) == (job.path, job.document(), job.name)
    assert load(JOB.replace("uri: out", "uri: out/${run_id}"), run_id="r1") == filled


def test_run_id_is_no_variable_to_give(folder: Path):
    assert error_of(JOB, vars={"run_id": "r1"}) == "--var run_id: the run id is given by --run-id"


def test_fingerprint_is_the_same_for_every_run_id(folder: Path):
    text = JOB.replace("uri: out", "uri: out/${run_id}")

    assert fingerprint_document(load(text)) != fingerprint_document(load(text, run_id="r1"))
    assert fingerprint_document(load(text))["output"]["uri"].endswith("/out/${run_id}")
