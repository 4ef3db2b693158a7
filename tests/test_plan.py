"""How large splits are by default: many enough for all workers, large enough to fill their mini-batches."""

from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import InputError
from batchpipe.plan import Plan, list_inputs, make_plan
from tests.test_job import make_job

MB = 1_048_576
SERVER = {"endpoint": {"url": "http://127.0.0.1:1"}}


def in_flight(requests: int) -> dict[str, Any]:
    return {"max_payload_mb": 1, "max_concurrent_transforms": requests}


def plan_of(tmp_path: Path, megabytes: float, *stages: dict[str, Any], **batch: Any) -> Plan:
    path = tmp_path / "input.txt"
    with path.open("wb") as file:
        file.truncate(int(megabytes * MB))  # a hole: nothing of it is read
    job = make_job(
        *stages, input={"uri": str(path), "format": "lines"}, output={"uri": "/out", "format": "raw"}, batch=batch
    )
    return make_plan(list_inputs(job.input, tmp_path), job)


def test_objects_that_would_be_mirrored_to_one_place_are_refused(tmp_path: Path):
    for folder in "ab":
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "x.txt").write_text("1\n")
        (tmp_path / folder / f"{folder}.txt").write_text("1\n")
    blocks = {"format": "lines", "uri": [f"{tmp_path}/a", f"{tmp_path}/b"]}
    job = make_job(input=blocks, output={"uri": "/out", "format": "raw", "layout": "mirror"})
    inputs = list_inputs(job.input, tmp_path)

    with pytest.raises(InputError) as raised:
        make_plan(inputs, job)

    assert str(raised.value).startswith("two input objects would be mirrored to one place, 'sub/x.txt'")
    assert raised.value.where == f"{tmp_path}/a/sub/x.txt and {tmp_path}/b/sub/x.txt"
    assert "one glob whose folder holds both" in raised.value.next


@pytest.mark.parametrize(
    ("megabytes", "stages", "batch", "split_mb"),
    [
        pytest.param(1, [], {}, 0.25, id="none is smaller than 256 KiB"),
        pytest.param(1280, [], {}, 10, id="128 splits"),
        pytest.param(16_384, [], {}, 64, id="none is larger than 64 MiB"),
        pytest.param(320, [], {}, 6, id="a mini-batch of 6 MB"),
        pytest.param(32, [], {}, 1, id="32 splits are left"),
        pytest.param(320, [], {"max_payload_mb": 1}, 2.5, id="more than one mini-batch in 128 splits"),
        pytest.param(320, [], in_flight(8), 2.5, id="callables have no requests"),
        pytest.param(320, [SERVER], {"max_payload_mb": 1}, 2.5, id="what a server advises is not known"),
        pytest.param(320, [SERVER], in_flight(8), 4, id="half of the requests"),
        pytest.param(320, [SERVER], in_flight(9), 5, id="rounded up"),
        pytest.param(64, [SERVER], in_flight(8), 2, id="32 splits are left of them"),
        pytest.param(
            320, [SERVER | {"max_concurrent_transforms": 2}, SERVER | in_flight(16)],
            {}, 8, id="the stage with the most requests, the smallest payload",
        ),
        pytest.param(320, [SERVER], {"split_mb": 3, "max_concurrent_transforms": 8}, 3, id="as stated"),
    ],
)  # fmt: skip
def test_size_of_a_split(tmp_path: Path, megabytes: float, stages: Any, batch: dict[str, Any], split_mb: float):
    plan = plan_of(tmp_path, megabytes, *stages, **batch)

    assert plan.split_bytes == split_mb * MB
    assert plan.count == len(list(plan)) == -(-megabytes // split_mb)
