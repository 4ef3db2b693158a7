# ruff: noqa: E501 - a case is one line: what is set, and the whole text it gets
"""--set KEY=VALUE: what it reaches, and the words for what it does not."""

from pathlib import Path
from typing import Any

import pytest

from tests.job_texts import JOB, enter_folder, error_of, load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("setting", "attribute", "value"),
    [
        ("on_error.max_failed_records=10", lambda job: job.on_error.max_failed_records, 10),
        ("stages.model.params.threads=2", lambda job: job.stages[0].params, {"threads": 2}),
        ("stages.0.may_drop=true", lambda job: job.stages[0].may_drop, True),
        ("stages.model.params.a.b=NO", lambda job: job.stages[0].params, {"a": {"b": "NO"}}),
        ('stages.model.params.a="1"', lambda job: job.stages[0].params, {"a": "1"}),
        ('input.null_values=["", NA]', lambda job: job.input.null_values, ("", "NA")),
        ("compute.workers={minimum: 1, maximum: 3}", lambda job: job.compute.workers.maximum, 3),
        ("input.uri=s3://b/*.csv", lambda job: job.input.uri, ("s3://b/*.csv",)),
        ("stages.model.params.a=b=c", lambda job: job.stages[0].params, {"a": "b=c"}),
        ("stages.model.params.a=", lambda job: job.stages[0].params, {"a": None}),
        ("name=${N:-n}", lambda job: job.name, "n"),
    ],
)  # fmt: skip
def test_setting_changes_one_value(folder: Path, setting: str, attribute: Any, value: Any):
    assert attribute(load(JOB, set=[setting])) == value


def test_later_settings_win_and_a_mapping_is_taken_as_it_is(folder: Path):
    assert load(JOB, set=["name=a", "name=b"]).name == "b"
    assert load(JOB, set={"stages.model.params": {"a": [1]}, "batch.max_records": "5"}).stages[0].params == {"a": [1]}


def test_stage_is_addressed_by_its_default_name_too(folder: Path):
    text = JOB.replace("name: model\n    ", "")

    assert load(text, set=["stages.Model.gpus=2"]).stages[0].gpus == 2


def test_paths_of_settings_are_relative_to_the_working_directory(folder: Path):
    job = load(JOB, set=["output.uri=results", "input.uri=[a, b]", "python_path=[lib]"])

    assert job.output.uri == str(folder / "results")
    assert job.input.uri == (str(folder / "a"), str(folder / "b"))
    assert job.import_folders[1] == str(folder / "lib")


def test_settings_do_not_reach_through_an_alias(folder: Path):
    text = JOB.replace("    callable", "    params: &p {a: 1}\n    callable") + "batch: {}\n"
    text = text.replace("output:", "  - {name: other, callable: 'a:b', params: *p}\noutput:")

    assert [stage.params for stage in load(text, set=["stages.model.params.a=2"]).stages] == [{"a": 2}, {"a": 1}]


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("output.uri", "--set output.uri: expected KEY=VALUE, such as --set on_error.max_failed_records=1"),
        ("=x", "--set =x: expected KEY=VALUE, such as --set on_error.max_failed_records=1"),
        ("stages.modle.gpus=1", "--set stages.modle.gpus: no 'modle' in stages; did you mean 'model'?"),
        ("stages.7.gpus=1", "--set stages.7.gpus: no '7' in stages; there is model"),
        ("output.uri.x=1", "--set output.uri.x: output.uri has no keys below it"),
        ("name={a", "--set name: a value inside {} or [] that holds one of {}[], must be quoted; or a bracket is missing"),
        ("name={a: 1, a: 2}", "--set name: stated twice, also on line 1"),
        ("on_eror.max_failed_records=1", "--set: on_eror: unknown key; did you mean 'on_error'?"),
        ("on_error.max_failed=1", "--set: on_error.max_failed: unknown key; did you mean 'max_failed_records'?"),
        ("batch.max_records=abc", "--set: batch.max_records: expected a whole number, got 'abc'"),
        ("stages.model.gpus=-1", "--set: stages.model.gpus: must be at least 0, got -1"),
        ("name=${N}", "--set: name: variable 'N' is not set; set it with --var N=... or in the environment"),
    ],
)  # fmt: skip
def test_setting_that_leads_nowhere_is_told(folder: Path, setting: str, error: str):
    assert error_of(JOB, set=[setting]) == error
