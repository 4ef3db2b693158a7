"""A redrive: what failed runs again through the job as it is now, and the output then holds both."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchpipe
from batchpipe.fingerprint import Fingerprint
from batchpipe.jobfile import load_job
from batchpipe.output import Output
from batchpipe.published import read_manifest
from batchpipe.runs import RunFolder
from batchpipe.storage import open_store
from tests.jobs import GATE, NO_ENGINE, Jobs, csv_rows, open_jobs, until
from tests.s3_server import S3Server

STAGES = """
import pandas as pd

def mended():
    return (HERE / "mended").read_text().split() if (HERE / "mended").exists() else []

def picky(frame: pd.DataFrame):
    for n in frame.n:
        if n % 40 == 7 and "all" not in mended() and str(n) not in mended():
            raise KeyError(f"no {n}")
    return frame.assign(square=frame.n**2)

def slow(frame: pd.DataFrame):
    if frame.n.max() >= 300 and mended():
        (HERE / "began").touch()
        wait_for("go")
    return picky(frame)

class Hanging:
    def __init__(self):
        if (HERE / "hang").exists():
            time.sleep(100)
    def __call__(self, frame: pd.DataFrame):
        return picky(frame)

def raw(records: list[bytes]):
    assert mended() or not any(b"bad" in record for record in records), "bad"
    return [record.upper() for record in records]

def texts(frame: pd.DataFrame):
    picky(frame)
    return frame.assign(n=frame.n.astype("string") if mended() else frame.n)
"""
FAILING = [n for n in range(400) if n % 40 == 7]
FEW = {"max_failed_records": 20}
SPLITS: dict[str, Any] = {"split_mb": 0.0005}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + STAGES)
        yield jobs


# What waits in one split must not keep another one of the same worker from the stage.
SLOW: list[dict[str, Any]] = [{"callable": "stages:slow", "thread_safe": True, "max_concurrent_transforms": 16}]


def failed_first(
    jobs: Jobs, stages: str | list[dict[str, Any]] = "stages:picky", run_id: str = "", **blocks: Any
) -> Path:
    """A job whose run has quarantined some records."""
    if "input" not in blocks and not (jobs.folder / "in").exists():
        jobs.write("in/a.csv", csv_rows(400))
    job = jobs.job(stages, **{"on_error": FEW, "batch": SPLITS, **blocks})
    ran = jobs.run("run", job, *(["--run-id", run_id] if run_id else []))
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == f"next: batchpipe redrive {job}"
    return job


def added(jobs: Jobs, before: dict[str, bytes]) -> dict[str, bytes]:
    """What there is beside the parts of before, which are as they were."""
    now = jobs.part_bytes()
    assert {name: now.get(name) for name in before} == before
    return {name: data for name, data in now.items() if name not in before}


def failed(jobs: Jobs) -> list[int]:
    """Which records are in quarantine: their numbers, which tell their lines."""
    lines = jobs.quarantined()
    assert all(line["line"] == line["record"] + 2 for line in lines)
    return [line["record"] for line in lines]


def squares(numbers: list[int]) -> bytes:
    return b"".join(b'{"n":%d,"text":"row %d","square":%d}\n' % (n, n, n * n) for n in numbers)


def test_G1_what_failed_runs_again_and_its_answers_are_parts_behind_the_others(jobs: Jobs):
    job = failed_first(jobs)
    first = jobs.part_bytes()
    jobs.write("mended", "all")

    redriven = jobs.run("redrive", job, "--json")

    assert redriven.code == 0, redriven.err
    assert added(jobs, first) == {"part-redrive-001-00000000.jsonl": squares(FAILING)}
    assert list(jobs.part_bytes())[-1] == "part-redrive-001-00000000.jsonl"
    manifest = redriven.manifest
    assert manifest["accounts"] == {"read": 400, "written": 400, "quarantined": 0, "dropped": 0}
    run, redrive = manifest["generations"]
    assert run["accounts"] == {"read": 400, "written": 390, "quarantined": 10, "dropped": 0}
    assert redrive["accounts"] == {"read": 10, "written": 10, "quarantined": 0, "dropped": 0}
    assert manifest["run_id"] == redrive["run_id"] == f"{run['run_id']}-redrive-1"
    assert [(row["read"], row["written"], row["quarantined"]) for row in jobs.table("inputs")] == [(400, 400, 0)]
    assert [part["generation"] for part in jobs.table("parts")] == [0] * len(first) + [1]
    assert jobs.run("verify", jobs.out).code == 0
    assert jobs.is_released()


def test_G3_a_redriven_run_is_done_and_has_nothing_to_redrive(jobs: Jobs):
    job = failed_first(jobs)
    jobs.write("mended", "all")
    redriven = jobs.run("redrive", job)
    assert "\n  redriven   10 records  10 written, 0 failed again, 0 dropped\n" in redriven.out
    published = jobs.part_bytes()

    run, again = jobs.run("run", job), jobs.run("redrive", job)

    assert (run.code, again.code, jobs.part_bytes()) == (0, 0, published), run.err + again.err
    run_id = json.loads((jobs.out / "_batchpipe/manifest.json").read_text())["run_id"]
    assert ": done already at " in run.out
    assert again.out == f"job {run_id}: no record is quarantined, nothing to redrive\n"


MENDED = GATE + STAGES.replace('raise KeyError(f"no {n}")', "pass")


@pytest.mark.parametrize("if_exists", ["error", "replace"])
def test_G3_a_run_that_a_redrive_mended_is_done_for_the_mended_job_and_for_its_own(jobs: Jobs, if_exists: str):
    job = failed_first(jobs, output={"if_exists": if_exists})
    jobs.write("stages.py", MENDED)
    assert jobs.run("redrive", job).code == 0
    published = jobs.part_bytes()

    mended = jobs.run("run", job)
    jobs.write("stages.py", GATE + STAGES)
    first = jobs.run("run", job)

    assert (mended.code, first.code, jobs.part_bytes()) == (0, 0, published), mended.err + first.err
    assert ": done already at " in mended.out
    assert ": done already at " in first.out


def test_G3_a_run_under_a_chosen_id_that_a_redrive_mended_is_done_under_that_id(jobs: Jobs):
    job = failed_first(jobs, run_id="nightly")
    jobs.write("stages.py", MENDED)
    assert jobs.run("redrive", job).code == 0

    run, other = jobs.run("run", job, "--run-id", "nightly"), jobs.run("run", job, "--run-id", "other")

    assert (run.code, other.code) == (0, 7), run.err
    assert ": done already at " in run.out
    assert "the output holds the finished run nightly-redrive-1 of " in other.err


@pytest.mark.parametrize("change", ["input", "stage"])
def test_what_changed_after_a_redrive_is_another_run(jobs: Jobs, change: str):
    job = failed_first(jobs)
    if change == "input":
        jobs.write("in/b.csv", csv_rows(1))  # listed by the redrive too, and never read
    jobs.write("stages.py", MENDED)
    assert jobs.run("redrive", job).code == 0
    if change == "stage":
        jobs.write("stages.py", MENDED + "# again")

    other = jobs.run("run", job)

    assert other.code == 7
    assert "-redrive-1 of " in other.err
    assert "choose another output.uri, or set output.if_exists: replace" in other.err


@pytest.mark.parametrize("layout", ["parts", "mirror"])
def test_a_part_that_is_gone_stops_a_redrive_and_the_run_that_it_mended(jobs: Jobs, layout: str):
    job = failed_first(jobs, output={"layout": layout})
    jobs.write("mended", "7")
    kept = jobs.parts()[0].rename(jobs.folder / "kept")
    unsound = jobs.run("redrive", job, "--restart")
    kept.rename(jobs.out / ("a.csv.out" if layout == "mirror" else "part-00000000.jsonl"))
    assert jobs.run("redrive", job).code == 0
    assert ": done already at " in jobs.run("run", job).out
    jobs.write("mended", "all")
    jobs.parts()[-1].unlink()

    refused, restarted = jobs.run("run", job), jobs.run("run", job, "--restart", "--json")

    name = {"parts": "part-00000000.jsonl", "mirror": "a.csv.out"}[layout]
    added = {"parts": "part-redrive-001-00000000.jsonl", "mirror": "a.csv.redrive-1.out"}[layout]
    assert (unsound.code, f"published: {name} is missing\n" in unsound.err) == (7, True), unsound.err
    assert f"run the job again in its place: batchpipe run {job.name} --restart\n" in unsound.err
    assert (refused.code, f"published: {added} is missing\n" in refused.err) == (7, True), refused.err
    assert restarted.manifest["accounts"]["written"] == 400, restarted.err
    assert jobs.run("verify", jobs.out).code == 0
    assert [path.name for path in jobs.hidden("*") if path.is_dir()] == [restarted.manifest["run_id"]]


@pytest.fixture
def begun(jobs: Jobs) -> Path:
    """A job, mended since, with a redrive that was killed once a split of it had settled."""
    jobs.write("in/a.csv", csv_rows(100))
    jobs.write("in/b.csv", csv_rows(300, 100))
    job = failed_first(jobs, SLOW, batch={"max_records": 1}, output={"layout": "mirror"})
    jobs.write("stages.py", MENDED.replace("and mended()", "and True"))
    redrive = jobs.start("redrive", job)
    until((jobs.folder / "began").exists, within_s=100)
    until(lambda: '"split"' in "".join(path.read_text() for path in jobs.hidden("*-redrive-1/journal/0*.jsonl")))
    redrive.kill()
    redrive.communicate()
    return job


def test_a_mended_job_is_not_run_while_its_redrive_is_unfinished(jobs: Jobs, begun: Path):
    refused = jobs.run("run", begun, "--wait", "30")

    assert refused.code == 2
    assert "error: the output holds the unfinished redrive " in refused.err
    assert f"  next:  finish it: batchpipe redrive {begun.name}\n" in refused.err


def test_a_restart_that_is_refused_drops_no_redrive(jobs: Jobs, begun: Path):
    jobs.write("go", "")

    refused = jobs.run("run", begun, "--restart", "--wait", "30")
    kept = [path for path in jobs.hidden("*-redrive-1/journal/0*.jsonl") if '"split"' in path.read_text()]
    resumed = jobs.run("redrive", begun)

    assert (refused.code, "error: the output holds the finished run " in refused.err) == (7, True), refused.err
    assert kept
    assert resumed.code == 0, resumed.err


def test_parts_of_the_tenth_redrive_come_last(jobs: Jobs):
    job = load_job(failed_first(jobs))
    store = open_store(str(jobs.out))
    manifest = read_manifest(store, str(jobs.out), {})
    assert manifest
    prefixes = []
    for count in (1, 2, 9, 10, 11, 100):
        output = Output(job, Fingerprint({}), RunFolder(str(jobs.out), "run"), store)
        output.redrives = manifest.model_copy(update={"generations": manifest.generations * count})
        prefixes.append(output.part_prefix)

    assert prefixes == sorted(prefixes)


def test_a_record_that_nothing_tells_the_place_of_is_said_to_be_lost_to_a_redrive(jobs: Jobs):
    jobs.write("in/a.parquet", parquet_of(pa.table({"n": range(100)})))
    job = failed_first(jobs, input={"format": "parquet"})
    (quarantine,) = jobs.hidden("*/quarantine/*")
    lines = [{**json.loads(line), "record": None} for line in quarantine.read_text().splitlines()]
    quarantine.write_text("".join(json.dumps(line) + "\n" for line in lines))

    refused = jobs.run("redrive", job)

    assert refused.code == 7, refused.err
    assert "error: a quarantined record of 'in/a.parquet' cannot be found again: nothing tells its place" in refused.err
    assert "next:  pieces of its run were removed while it was unfinished: run the job again into" in refused.err


def test_a_redrive_that_makes_no_progress_while_its_stages_open_ends_with_6(jobs: Jobs):
    job = failed_first(jobs, "stages:Hanging", on_error={**FEW, "no_progress_timeout_s": 5})
    jobs.write("hang", "")

    stuck = jobs.run("redrive", job)

    assert stuck.code == 6, stuck.err
    assert "nothing moved for on_error.no_progress_timeout_s: 5 s" in stuck.err


def test_a_redrive_that_settled_nothing_is_begun_anew_when_its_stage_is_mended(jobs: Jobs):
    job = failed_first(jobs)
    source = (jobs.folder / "stages.py").read_text()
    jobs.write("stages.py", source.replace("square=frame.n**2", "other=frame.n"))
    jobs.write("mended", "all")
    refused = jobs.run("redrive", job)
    jobs.write("stages.py", source + "\nMENDED = True\n")

    mended = jobs.run("redrive", job)

    assert refused.code == 5, refused.err
    assert mended.code == 0, mended.err


def test_what_fails_again_stays_in_quarantine_and_goes_into_the_next_redrive(jobs: Jobs):
    job = failed_first(jobs)
    first = jobs.part_bytes()
    jobs.write("mended", "7 47 367")

    one = jobs.run("redrive", job)

    assert one.code == 0, one.err
    left = [n for n in FAILING if n not in (7, 47, 367)]
    assert failed(jobs) == left
    assert one.out.splitlines()[-1] == f"next: batchpipe redrive {job}"
    jobs.write("mended", "all")
    two = jobs.run("redrive", job, "--json")
    assert (two.code, two.manifest["accounts"]["written"], failed(jobs)) == (0, 400, []), two.err
    expected = {
        "part-redrive-001-00000000.jsonl": squares([7, 47, 367]),
        "part-redrive-002-00000000.jsonl": squares(left),
    }
    assert added(jobs, first) == expected
    assert [each["accounts"]["read"] for each in two.manifest["generations"]] == [400, 10, 7]
    assert jobs.run("verify", jobs.out).code == 0


def test_the_budget_is_that_of_the_whole_dataset(jobs: Jobs):
    job = failed_first(jobs)
    jobs.write("mended", "7")

    refused = jobs.run("redrive", job, "--set", "on_error.max_failed_records=8")
    allowed = jobs.run("redrive", job, "--set=on_error.max_failed_percent=2.25", "--set=on_error.max_failed_records=9")

    assert refused.code == 5
    assert "error: stage 'picky' failed for 9 records, 8 allowed: KeyError: 'no 47'" in refused.err
    assert "line 49, byte 457; kept in out/_batchpipe/" in refused.err
    assert f"batchpipe redrive {job} --set on_error.max_failed_records=10".replace(f"{jobs.folder}/", "") in refused.err
    assert (allowed.code, failed(jobs)) == (0, FAILING[1:]), allowed.err


@pytest.mark.parametrize("layout", ["parts", "mirror"])
def test_G4_a_killed_redrive_resumes_to_the_same_bytes(jobs: Jobs, layout: str):
    jobs.write("in/a.csv", csv_rows(100))
    jobs.write("in/b.csv", csv_rows(300, 100))
    output = {"layout": layout, "if_exists": "replace"}
    job = failed_first(jobs, SLOW, batch={"max_records": 1}, output=output)
    first = jobs.part_bytes()
    jobs.write("mended", "all")
    redrive = jobs.start("redrive", job)
    until((jobs.folder / "began").exists, within_s=100)
    redrive.kill()
    redrive.communicate()
    jobs.write("go", "")
    assert added(jobs, first) == {}
    assert "redrive-1" in jobs.run("ps", jobs.out, PATH=NO_ENGINE).out

    resumed = jobs.run("redrive", job, "--wait", "30", timeout=100)

    assert resumed.code == 0, resumed.err
    (run_id,) = {path.name.removesuffix("-redrive-1") for path in jobs.hidden("*-redrive-1")}
    names = {
        "parts": {f"part-{run_id}-redrive-001-00000000.jsonl": squares(FAILING)},
        "mirror": {"a.csv.redrive-1.out": squares([7, 47, 87]), "b.csv.redrive-1.out": squares(FAILING[3:])},
    }
    assert added(jobs, first) == names[layout]
    assert jobs.run("verify", jobs.out).code == 0
    assert not jobs.hidden("*/journal") + jobs.hidden("*/pending")


def test_G2_a_redrive_that_had_begun_to_publish_is_finished_by_the_same_command(jobs: Jobs):
    job = failed_first(jobs)
    first = jobs.part_bytes()
    jobs.write("mended", "7")
    run_id = json.loads((jobs.out / "_batchpipe/manifest.json").read_text())["run_id"]
    # Somebody's object in the way, put there when the redrive has looked and found none.
    in_the_way = '    (HERE / "out/part-redrive-001-00000000.jsonl").write_text("not ours")\n'
    head = "def picky(frame: pd.DataFrame):\n"
    jobs.write("stages.py", GATE + STAGES.replace(head, head + in_the_way))
    blocked = jobs.run("redrive", job)
    assert blocked.code == 7
    assert "error: cannot publish 'part-redrive-001-00000000.jsonl'" in blocked.err
    (jobs.out / "part-redrive-001-00000000.jsonl").unlink()

    finished = jobs.run("redrive", job, "--json")

    assert (finished.code, finished.manifest["run_id"]) == (0, f"{run_id}-redrive-1"), finished.err
    assert added(jobs, first) == {"part-redrive-001-00000000.jsonl": squares([7])}
    assert failed(jobs) == FAILING[1:]


@pytest.fixture
def half_published(jobs: Jobs) -> Path:
    """A job whose redrive has published one of its objects, and lost the other while something was in the way."""
    in_the_way = jobs.out / "b.csv.redrive-1.out"
    head = "def picky(frame: pd.DataFrame):\n"
    blocks = f'    if (HERE / "blocked").exists():\n        Path("{in_the_way}").write_text("not ours")\n'
    jobs.write("stages.py", GATE + STAGES.replace(head, head + blocks))
    for name in "ab":
        jobs.write(f"in/{name}.csv", csv_rows(400))
    job = failed_first(jobs, output={"layout": "mirror"})
    jobs.write("mended", "all")
    jobs.write("blocked", "")
    blocked = jobs.run("redrive", job)
    assert (blocked.code, (jobs.out / "a.csv.redrive-1.out").exists()) == (7, True), blocked.err
    (jobs.folder / "blocked").unlink()
    in_the_way.unlink()
    (lost,) = jobs.hidden("*/pending/*")
    lost.unlink()
    return job


def test_G2_a_redrive_that_lost_a_piece_while_it_was_published_makes_it_anew(jobs: Jobs, half_published: Path):
    done = jobs.run("redrive", half_published)

    assert (done.code, failed(jobs)) == (0, []), done.err
    assert {name: data for name, data in jobs.part_bytes().items() if "redrive" in name} == {
        f"{name}.csv.redrive-1.out": squares(FAILING) for name in "ab"
    }
    assert jobs.run("verify", jobs.out).code == 0


def test_G2_a_damaged_run_is_made_anew_though_its_redrive_is_half_published(jobs: Jobs, half_published: Path):
    (jobs.out / "a.csv.out").unlink()

    refused, restarted = jobs.run("run", half_published), jobs.run("run", half_published, "--restart")

    assert (refused.code, "a.csv.out is missing" in refused.err) == (7, True), refused.err
    assert (restarted.code, sorted(jobs.part_bytes())) == (0, ["a.csv.out", "b.csv.out"]), restarted.err
    assert jobs.run("verify", jobs.out).code == 0


JSON_LINES = "".join(json.dumps({"n": n, "text": f"row {n}"}) + "\n" for n in range(400)).encode()
FRAME = pa.table({"n": range(400), "text": [f"row {n}" for n in range(400)]})
TEXT = b"".join(b"bad %d\n" % n if n % 9 == 4 else b"good %d\n" % n for n in range(30))
BAD = b"".join(b"BAD %d\n" % n for n in range(4, 30, 9))


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


CASES: dict[str, tuple[dict[str, bytes], str, dict[str, Any], dict[str, bytes]]] = {
    "jsonl": (
        {"in/a.jsonl": JSON_LINES},
        "stages:picky",
        {"input": {"format": "jsonl"}},
        {"part-redrive-001-00000000.jsonl": squares(FAILING)},
    ),
    "parquet": (
        {"in/a.parquet": parquet_of(FRAME, row_group_size=30), "in/b.parquet": parquet_of(FRAME.slice(0, 8))},
        "stages:picky",
        {"input": {"format": "parquet"}},
        {"part-redrive-001-00000000.jsonl": squares([*FAILING, 7])},
    ),
    "lines": (
        {"in/a.txt.gz": gzip.compress(TEXT)},
        "stages:raw",
        {"input": {"format": "lines"}, "output": {"format": "raw"}, "on_error": {**FEW, "placeholder": "ERROR"}},
        {"part-redrive-001-00000000.out": BAD},
    ),
    "object": (
        {f"in/{name}.bin": name.encode() for name in ("bad1", "bad2", "good1", "good2")},
        "stages:raw",
        {"input": {"format": "object"}, "output": {"format": "raw", "layout": "mirror", "assemble_with": "none"}},
        {"bad1.bin.redrive-1.out": b"BAD1", "bad2.bin.redrive-1.out": b"BAD2"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_records_of_every_format_are_redriven_as_they_were_read(jobs: Jobs, case: str):
    files, stages, blocks, expected = CASES[case]
    for name, data in files.items():
        jobs.write(name, data)
    job = failed_first(jobs, stages, **blocks)
    first = jobs.part_bytes()
    jobs.write("mended", "all")

    redriven = jobs.run("redrive", job, "--json")

    assert redriven.code == 0, redriven.err
    assert added(jobs, first) == expected
    assert redriven.manifest["accounts"]["quarantined"] == 0
    assert jobs.run("verify", jobs.out).code == 0


def test_the_parts_of_both_are_one_dataset_that_tells_where_each_record_came_from(jobs: Jobs):
    job = failed_first(jobs, output={"format": "parquet", "add_source": True})
    jobs.write("mended", "all")

    redriven = jobs.run("redrive", job)

    assert redriven.code == 0, redriven.err
    loaded = batchpipe.load_job(job)
    table = batchpipe.run_job(loaded).dataset().to_table()
    assert (
        table["_record"].to_pylist() == table["n"].to_pylist() == [n for n in range(400) if n not in FAILING] + FAILING
    )


def test_an_answer_that_does_not_fit_the_columns_of_the_run_is_told(jobs: Jobs):
    job = failed_first(jobs, "stages:texts")
    jobs.write("mended", "all")

    refused = jobs.run("redrive", job)

    assert refused.code == 5
    assert "in column 'n' does not fit its type int64" in refused.err
    assert "where: in/a.csv, record 7, byte 63\n" in refused.err
    assert "next:  answer as the run that is redriven did, whose columns stay" in refused.err


def test_rows_that_could_not_be_parsed_are_redriven_by_a_stage_that_takes_them_as_they_are(jobs: Jobs):
    jobs.write("in/a.csv", "n,text\n1,good\n2,has,more\n3,good\n")
    blocks: dict[str, Any] = {"output": {"format": "raw"}, "on_error": {**FEW, "placeholder": "ERROR"}}
    jobs.write("stages.py", STAGES + "def lines(frame: pd.DataFrame):\n    return [b'%d' % n for n in frame.n]\n")
    job = failed_first(jobs, "stages:lines", **blocks)
    jobs.job("stages:raw", batch=SPLITS, **blocks)
    first = jobs.part_bytes()
    jobs.write("stages.py", GATE + STAGES)

    redriven = jobs.run("redrive", job)

    assert redriven.code == 0, redriven.err
    assert first == {"part-00000000.out": b"1\nERROR\n3\n"}
    assert added(jobs, first) == {"part-redrive-001-00000000.out": b"2,HAS,MORE\n"}
    assert jobs.run("verify", jobs.out).code == 0


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda jobs: jobs.write("in/a.csv", csv_rows(401)), 3, "records are quarantined, has changed since run"),
        (lambda jobs: (jobs.folder / "in/a.csv").rename(jobs.folder / "in/b.csv"), 3, "are quarantined, is gone since"),
        (lambda jobs: jobs.job("stages:picky", output={"compression": "gzip"}), 2, "changed: output.compression was"),
        (lambda jobs: next(iter(jobs.hidden("*/quarantine/*"))).unlink(), 7, "its manifest says 10"),
        (lambda jobs: jobs.job("stages:picky", output={"uri": "other"}), 7, "there is no finished run whose records"),
    ],
    ids=["changed", "gone", "settings", "quarantine", "unfinished"],
)  # fmt: skip
def test_what_cannot_be_redriven_is_told_and_nothing_is_changed(jobs: Jobs, change: Any, code: int, said: str):
    job = failed_first(jobs)
    published = jobs.part_bytes()
    change(jobs)

    refused = jobs.run("redrive", job)

    assert (refused.code, jobs.part_bytes()) == (code, published), refused.err
    assert said in refused.err
    assert "  next:  " in refused.err


def test_an_output_named_after_its_run_is_redriven_by_the_runs_id(jobs: Jobs):
    job = failed_first(jobs, output={"uri": "out/${run_id}"}, name="job.yaml")
    (folder,) = jobs.out.iterdir()
    jobs.write("mended", "all")

    unnamed, named = jobs.run("redrive", job), jobs.run("redrive", job, "--run-id", folder.name)

    assert unnamed.code == 2
    assert "name the run that is to be redriven: --run-id" in unnamed.err
    assert named.code == 0, named.err
    assert (folder / "part-redrive-001-00000000.jsonl").read_bytes() == squares(FAILING)


def test_another_run_takes_the_place_of_a_run_and_its_redrive(jobs: Jobs):
    job = failed_first(jobs, output={"if_exists": "replace"})
    jobs.write("mended", "all")
    assert jobs.run("redrive", job).code == 0

    other = jobs.run("run", job, "--run-id", "other")

    assert other.code == 0, other.err
    assert {name.rpartition("-")[0] for name in jobs.part_bytes()} == {"part-other"}
    assert [path.name for path in jobs.hidden("*")] == ["manifest.json", "other"]


def test_a_redrive_on_s3_keeps_the_placeholders_of_the_run(jobs: Jobs, s3_server: S3Server, bucket: str):
    s3_server.client.put_object(Bucket=bucket, Key="in/a.txt", Body=TEXT)
    blocks: dict[str, Any] = {
        "input": {"uri": f"s3://{bucket}/in", "format": "lines"},
        "output": {"uri": f"s3://{bucket}/out", "format": "raw", "layout": "mirror"},
        "on_error": {**FEW, "placeholder": "ERROR"},
        "batch": {"split_mb": 0.0001},
        "storage_options": {"s3": s3_server.storage_options},
    }
    job = jobs.job("stages:raw", **blocks)
    assert jobs.run("run", job).code == 0
    jobs.write("mended", "all")

    redriven = jobs.run("redrive", job, "--json")

    assert redriven.code == 0, redriven.err
    read = {
        key: s3_server.client.get_object(Bucket=bucket, Key=f"out/{key}")["Body"].read()
        for key in ("a.txt.out", "a.txt.redrive-1.out")
    }
    assert read["a.txt.out"].splitlines().count(b"ERROR") == 3
    assert read["a.txt.redrive-1.out"] == BAD
    assert not s3_server.client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert jobs.run("verify", job).code == 0


def test_objects_whose_keys_differ_behind_a_question_mark_are_told_apart(jobs: Jobs, s3_server: S3Server, bucket: str):
    keys = [f"in/a.csv?day={day}" for day in (1, 2)]
    for key in keys:
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=csv_rows(40).encode())
    options = {"s3": s3_server.storage_options}
    job = failed_first(jobs, input={"uri": f"s3://{bucket}/in"}, storage_options=options)
    quarantined = [each["object"] for each in jobs.quarantined()]
    jobs.write("mended", "all")

    redriven = jobs.run("redrive", job)

    uris = [f"s3://{bucket}/{key}" for key in keys]
    assert (quarantined, redriven.code) == (uris, 0), redriven.err
    assert [(row["uri"], row["written"]) for row in jobs.table("inputs")] == [(uri, 40) for uri in uris]
    assert jobs.records()[-2:] == [{"n": 7, "text": "row 7", "square": 49}] * 2
