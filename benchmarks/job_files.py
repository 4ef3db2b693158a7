"""Job files that benchmarks write for themselves, and the command that runs one."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.scratch import ROOT, SCRATCH

WORKERS = 2


def write_job(name: str, **blocks: Any) -> Path:
    """Write a job file (JSON is YAML) whose callables are found in this repository."""
    path = SCRATCH / f"{name}.yaml"
    path.write_text(json.dumps({"python_path": [str(ROOT)], **blocks}))
    return path


def run_command(job: Path, **settings: object) -> list[str]:
    """The command that runs a job; a key's dots are written as two underscores (`output__uri`)."""
    batchpipe = Path(sys.executable).with_name("batchpipe")
    changed = (f"{key.replace('__', '.')}={value}" for key, value in settings.items())
    return [str(batchpipe), "run", str(job), *(word for each in changed for word in ("--set", each))]
