"""The three images of the flight job from an up worker to the first answers, beside `docker run` of the same three.

Needs docker and the images that jobs/flight_delays_containers.yaml names; says so where they are missing.
"""

import shutil
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from batchpipe.jobfile import load_job
from benchmarks.scratch import ROOT, emptied
from benchmarks.worker_side import open_here

RUNS = 5
JOB = ROOT / "jobs" / "flight_delays_containers.yaml"
WAIT_S = 60.0


def main() -> None:
    """Print how long the slowest image takes until it answers a ping, and how much later the first answers come."""
    images = [stage.container.image for stage in load_job(JOB).stages if stage.container]
    if not shutil.which("docker") or any(_docker("image", "inspect", image).returncode for image in images):
        print("  not measured: docker or an image of the job is missing", flush=True)
        return
    pairs = [(_together(images), _first_answers()) for _ in range(RUNS)]
    alone = statistics.median(max(_ping(image) for image in images) for _ in range(3))
    theirs, ours = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    over = sorted(second - first for first, second in pairs)
    print(f"  slowest image, alone {alone:6.2f} s, all three at once {theirs:6.2f} s; first answers {ours:6.2f} s")
    print(f"  over all three at once: {' '.join(f'{seconds:.2f}' for seconds in over)} s   aim: at most 1", flush=True)


def _first_answers() -> float:
    with emptied("containers_output") as output, open_here(JOB, output) as opened:
        return opened.seconds


def _together(images: list[str]) -> float:
    with ThreadPoolExecutor(len(images)) as threads:
        return max(threads.map(_ping, images))


def _ping(image: str) -> float:
    """Seconds from `docker run` to the first good answer to a ping."""
    model = f"--volume={ROOT / 'jobs' / 'flight_delays'}:/opt/ml/model:ro"
    started = time.perf_counter()
    name = _docker("run", "--detach", "--init", "--publish=127.0.0.1::8080", model, image, "serve").stdout.strip()
    try:
        port = _docker("port", name, "8080").stdout.split()[0].rpartition(":")[2]
        while time.perf_counter() < started + WAIT_S:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    return time.perf_counter() - started
            except (OSError, urllib.error.URLError):
                time.sleep(0.02)
        raise SystemExit(f"{image} never answered a ping")
    finally:
        _docker("rm", "--force", name)


def _docker(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
