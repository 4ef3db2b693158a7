"""What moves inside the tasks of a worker process: its heartbeats carry these figures to the driver."""

import threading

_figures = {"records": 0, "bytes": 0, "moved": 0}
_moving = threading.Lock()


def show(name: str, more: int) -> None:
    """Move a figure: ``records`` and ``bytes`` of splits at work, or ``moved``, whatever work that is no split does."""
    with _moving:
        _figures[name] += more


def read_gauge() -> dict[str, int]:
    """All figures of this process."""
    return dict(_figures)
