"""The stages of the jobs in jobs/, called directly: one answer a record, the same in any batch."""

import importlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).parents[1]
SAMPLE_DATA = ROOT / "sample_data"
sys.path.append(str(ROOT / "jobs"))  # where a job file finds its own stages

flight_runtime = importlib.import_module("flight_delays.runtime")
flight_stages = importlib.import_module("flight_delays.stages")
rain_stages = importlib.import_module("rain_soon.stages")
digit_stages = importlib.import_module("digits.stages")

FLIGHT_MODEL = flight_stages.Model(threads=1)
RAIN_MODEL = rain_stages.Model()
CLASSIFIER = digit_stages.Classifier()


def read_flights() -> pd.DataFrame:
    files = sorted((SAMPLE_DATA / "flights").glob("*.csv"))
    return pd.concat([pd.read_csv(file) for file in files], ignore_index=True)


def read_hours() -> list[dict[str, Any]]:
    files = sorted((SAMPLE_DATA / "weather").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


FLIGHTS = read_flights()
STORM = FLIGHTS[(FLIGHTS["month"] == 2) & FLIGHTS["day"].between(8, 9)]  # 1,000 cancelled flights, nearly
HOURS = read_hours()
PICTURES = sorted((SAMPLE_DATA / "digits").glob("*.png"))


def answer_flights(flights: pd.DataFrame) -> pd.DataFrame:
    answers: pd.DataFrame = flight_stages.decide(FLIGHT_MODEL(flight_stages.make_features(flights)))
    return answers


def answer_hours(hours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = RAIN_MODEL(rain_stages.make_features(hours))
    return answers


def answer_pictures(pictures: list[bytes]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = CLASSIFIER(pictures)
    return answers


def cuts_of(count: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ways to cut *count* records into batches, empty ones among them."""
    bounds = st.lists(st.integers(0, count), max_size=8).map(lambda points: [0, *sorted(points), count])
    return bounds.map(lambda points: list(itertools.pairwise(points)))


# Flights


def test_each_flight_gets_one_answer_in_order() -> None:
    answers = answer_flights(FLIGHTS)

    pd.testing.assert_frame_equal(answers[flight_stages.KEY], FLIGHTS[flight_stages.KEY])
    assert answers.columns.tolist() == [*flight_stages.KEY, "probability", "decision"]


def test_cancelled_flights_are_answered_without_a_probability() -> None:
    answers = answer_flights(FLIGHTS)
    cancelled = FLIGHTS["dep_delay"].isna()

    assert cancelled.sum() > 1000
    assert answers.loc[cancelled, "probability"].isna().all()
    assert (answers["decision"] == "cancelled").equals(cancelled.rename("decision"))


def test_flights_that_left_get_a_probability_and_the_decision_that_follows() -> None:
    answers = answer_flights(FLIGHTS[FLIGHTS["dep_delay"].notna()])

    assert answers["probability"].between(0, 1).all()
    assert (answers["decision"] == "late").equals((answers["probability"] >= 0.5).rename("decision"))


@settings(max_examples=25, deadline=None)
@given(cuts_of(len(STORM)))
def test_a_flights_answer_does_not_depend_on_its_batch(cuts: list[tuple[int, int]]) -> None:
    answers = pd.concat([answer_flights(STORM.iloc[start:stop]) for start, stop in cuts])

    pd.testing.assert_frame_equal(answers, answer_flights(STORM), check_exact=True)


@pytest.mark.parametrize("dtype", ["float64", "Int64", "Float64", "int64[pyarrow]", "object"])
def test_a_flights_answer_does_not_depend_on_how_its_numbers_came(dtype: str) -> None:
    retyped = STORM.astype({"dep_delay": "Int64"}).astype({"dep_delay": dtype})

    pd.testing.assert_frame_equal(answer_flights(retyped), answer_flights(STORM), check_exact=True)


@pytest.mark.parametrize("dtype", ["Int64", "int64[pyarrow]"])
def test_a_flights_answer_does_not_depend_on_the_type_of_its_schedule(dtype: str) -> None:
    whole = ["year", "month", "day", "sched_dep_time", "sched_arr_time", "distance", "flight"]

    answers = answer_flights(STORM.astype(dict.fromkeys(whole, dtype)))

    assert answers["probability"].equals(answer_flights(STORM)["probability"])


@pytest.mark.parametrize("dtype", ["object", "category", "string[pyarrow]"])
def test_a_flights_answer_does_not_depend_on_how_its_text_came(dtype: str) -> None:
    answers = answer_flights(STORM.astype({"carrier": dtype, "origin": dtype}))

    assert answers["probability"].equals(answer_flights(STORM)["probability"])


def test_a_batch_of_cancelled_flights_alone_is_answered() -> None:
    cancelled = STORM[STORM["dep_delay"].isna()].assign(dep_delay=None)

    assert (answer_flights(cancelled)["decision"] == "cancelled").all()


def test_no_flights_get_no_answers_of_the_same_types() -> None:
    assert answer_flights(FLIGHTS.head(0)).dtypes.equals(answer_flights(FLIGHTS).dtypes)


def test_an_unknown_carrier_is_answered() -> None:
    flights = FLIGHTS.head(3).assign(carrier=["ZZ", np.nan, "UA"])

    features = flight_stages.make_features(flights)

    assert features["carrier_code"].fillna(-1).tolist() == [-1, -1, 11]
    assert answer_flights(flights)["probability"].notna().all()


def test_a_flight_without_a_date_is_refused_by_name() -> None:
    flights = FLIGHTS.head(3).assign(day=[1, np.nan, 3])

    with pytest.raises(ValueError, match="column 'day' is empty in 1 of 3 flights; each needs it"):
        flight_stages.make_features(flights)


def test_weekday_is_the_calendars() -> None:
    days = pd.DataFrame({"date": pd.date_range("1969-12-25", "2030-01-05", freq="9D")})["date"].dt

    weekdays = flight_stages.weekday(*(part.to_numpy("int64") for part in (days.year, days.month, days.day)))

    assert weekdays.tolist() == days.day_of_week.tolist()


def test_what_arrives_late_is_told_from_what_does_not() -> None:
    """AUC on flights the model never saw; MODEL.md measures 0.90 on these months."""
    arrived = FLIGHTS[FLIGHTS["arr_delay"].notna()]
    late = arrived["arr_delay"] > 15
    rank = answer_flights(arrived)["probability"].rank()

    auc = (rank[late].sum() - late.sum() * (late.sum() + 1) / 2) / (late.sum() * (~late).sum())

    assert auc > 0.88


def test_a_flights_answer_does_not_depend_on_the_number_of_threads() -> None:
    features = flight_stages.make_features(FLIGHTS)

    assert flight_stages.Model(threads=2)(features).equals(FLIGHT_MODEL(features))


LOAD_MODEL = """
from flight_delays.stages import Model
import psutil
before = psutil.Process().num_threads()
model = Model(threads=1)
print(psutil.Process().num_threads() - before, "threads more")
"""


def test_loading_the_flight_model_starts_no_thread_says_nothing_and_keeps_nothing_at_home(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "jobs")}

    done = subprocess.run([sys.executable, "-c", LOAD_MODEL], env=environ, capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("0 threads more\n", "")
    assert list(tmp_path.iterdir()) == []


def test_what_native_code_says_is_dropped_only_while_it_is_muted(capfd: pytest.CaptureFixture[str]) -> None:
    with flight_runtime.muted_stderr():
        os.write(2, b"noise")
    os.write(2, b"word")

    assert capfd.readouterr().err == "word"


# Weather


def test_each_hour_gets_one_answer_in_order() -> None:
    key = ("origin", "time_hour")

    answers = answer_hours(HOURS)

    assert [[answer[name] for name in key] for answer in answers] == [[hour[name] for name in key] for hour in HOURS]


@settings(max_examples=25, deadline=None)
@given(cuts_of(200))
def test_an_hours_answer_does_not_depend_on_its_batch(cuts: list[tuple[int, int]]) -> None:
    hours = HOURS[:200]

    assert [answer for start, stop in cuts for answer in answer_hours(hours[start:stop])] == answer_hours(hours)


def test_an_hour_without_measurements_is_answered() -> None:
    unmeasured = dict.fromkeys(HOURS[0]) | {"origin": "JFK", "time_hour": "2013-01-01T06:00:00Z"}

    [answer] = answer_hours([unmeasured])

    assert 0 < answer["probability"] < 0.1


def test_rain_is_foretold_more_often_before_rain() -> None:
    answers = answer_hours(HOURS)

    next_hours = itertools.pairwise(zip(answers, HOURS, strict=True))
    foretold = [after["precip"] > 0 for (answer, _), (_, after) in next_hours if answer["rain_next_hour"]]

    assert sum(foretold) / len(foretold) > 0.6


# Digits


def test_digits_never_seen_are_read_rightly() -> None:
    """MODEL.md measures 93.0 % on these pictures."""
    answers = answer_pictures([picture.read_bytes() for picture in PICTURES])

    right = [answer["digit"] == int(picture.stem[-1]) for answer, picture in zip(answers, PICTURES, strict=True)]

    assert len(right) == 200
    assert sum(right) / len(right) >= 0.92


def test_pixels_fill_the_range_the_model_was_trained_on() -> None:
    pixels = [digit_stages.read_pixels(picture.read_bytes()) for picture in PICTURES]

    assert {tuple(image.shape) for image in pixels} == {(64,)}
    assert (min(image.min() for image in pixels), max(image.max() for image in pixels)) == (0, 1)


@settings(max_examples=25, deadline=None)
@given(cuts_of(50))
def test_a_pictures_answer_does_not_depend_on_its_batch(cuts: list[tuple[int, int]]) -> None:
    pictures = [picture.read_bytes() for picture in PICTURES[:50]]

    answers = [answer for start, stop in cuts for answer in answer_pictures(pictures[start:stop])]

    assert answers == answer_pictures(pictures)


def test_a_file_that_is_no_picture_is_refused() -> None:
    with pytest.raises(OSError, match="cannot identify image file"):
        answer_pictures([b"GIF89a, but not really"])


def test_a_picture_of_another_size_is_refused_with_its_size() -> None:
    Image.new("L", (9, 4)).save(buffer := io.BytesIO(), "PNG")

    with pytest.raises(ValueError, match="picture is 9 x 4 pixels, expected 8 x 8"):
        answer_pictures([buffer.getvalue()])


# Job files


@pytest.mark.parametrize("job_file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
class TestJobFile:
    def test_names_stages_that_exist(self, job_file: Path) -> None:
        stages = yaml.safe_load(job_file.read_text())["stages"]
        for module, attribute in (stage["callable"].split(":") for stage in stages if "callable" in stage):
            assert callable(getattr(importlib.import_module(module), attribute))

    def test_names_input_that_exists(self, job_file: Path) -> None:
        assert list(job_file.parent.resolve().parent.glob(yaml.safe_load(job_file.read_text())["input"]["uri"][3:]))

    def test_says_where_output_goes(self, job_file: Path) -> None:
        assert yaml.safe_load(job_file.read_text())["output"]["uri"].startswith("../out/")


def test_the_flights_job_reads_nothing_that_is_known_only_after_departure() -> None:
    columns = yaml.safe_load((ROOT / "jobs" / "flight_delays.yaml").read_text())["input"]["columns"]

    assert not {"arr_time", "arr_delay", "air_time"} & set(columns)
    assert answer_flights(STORM[columns]).equals(answer_flights(STORM))
