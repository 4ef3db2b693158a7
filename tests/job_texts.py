"""Job files for tests: a smallest one, and how to load a text and get the error it deserves."""

from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import JobError
from batchpipe.job import Job
from batchpipe.jobfile import load_job

JOB = """\
input:
  uri: in/*.csv
stages:
  - name: model
    callable: pkg.stages:Model
output:
  uri: out
"""


def enter_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make *tmp_path* the working directory, with a folder for job files: errors name them as typed, jobs/x.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    return tmp_path


def load(text: str, **options: Any) -> Job:
    """Load *text* as jobs/x.yaml."""
    Path("jobs/x.yaml").write_text(text)
    return load_job("jobs/x.yaml", **options)


def error_of(text: str, **options: Any) -> str:
    """Return the text of the JobError that *text* as jobs/x.yaml gets."""
    with pytest.raises(JobError) as raised:
        load(text, **options)
    assert raised.value.exit_code == 2
    return str(raised.value)
