"""Stages for `test_serve`: one of each shape, and some that fail."""

import threading

import pandas as pd


def double(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(twice=frame["x"] * 2)


def first_column(frame: pd.DataFrame) -> "pd.Series[float]":
    return frame.iloc[:, 0]


def labels(frame: pd.DataFrame) -> list[bytes]:
    return [name.encode() for name in frame["name"].fillna("?")]


def upper(lines: list[bytes]) -> list[bytes]:
    return [line.upper() for line in lines]


def size(image: bytes) -> list[int]:
    return [len(image)]


class Scale:
    def __init__(self, by: int) -> None:
        if by < 0:
            raise ValueError("by must not be negative")
        self.by = by

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame * self.by


class Busy(Exception):
    retry = True


def fail(frame: pd.DataFrame) -> pd.DataFrame:
    raise KeyError("age")


def busy(frame: pd.DataFrame) -> pd.DataFrame:
    raise Busy("later")


go_on = threading.Event()


def wait(lines: list[bytes]) -> list[bytes]:
    go_on.wait(60)
    return lines


def first_only(lines: list[bytes]) -> list[bytes]:
    return lines[:1]
