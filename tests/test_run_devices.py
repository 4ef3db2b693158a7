"""Which devices a worker's callables see: copy i of the chain has i*g to i*g+g-1. No device is needed."""

from pathlib import Path

from tests.jobs import GATE, csv_rows, open_jobs

STAGES = """
import pandas as pd

AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")

def tells(frame: pd.DataFrame):
    (HERE / f"worker-{AT_IMPORT}").touch()
    if frame.n.min():  # the first mini-batch goes through one worker alone
        wait_for("worker-0,1")
        wait_for("worker-2,3")
    return frame.assign(devices=AT_IMPORT)
"""


def test_callables_of_each_copy_have_devices_of_their_own(tmp_path: Path):
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + STAGES)
        jobs.write("in/a.csv", csv_rows(200))
        stages = [{"callable": "stages:tells", "gpus": 2}]

        ran = jobs.run("run", jobs.job(stages, compute={"workers": 2}, batch={"split_mb": 0.0002}))

        assert ran.code == 0, ran.err
        assert {record["devices"] for record in jobs.records()} == {"0,1", "2,3"}
