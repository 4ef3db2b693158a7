"""Starts of a small run, each in a child process that is killed or frozen at its n-th write to the output.

Writes are counted by an audit hook, below every layer of ours: each file that is made, linked, renamed or removed. To
die before one of them is to die after the one before it. The plan, the output, its lock and journal and what
publishes are the real ones; only a worker's part is played: a piece of a few bytes for each split.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import yaml

from batchpipe.claim import open_output
from batchpipe.errors import BatchpipeError
from batchpipe.fingerprint import Fingerprint
from batchpipe.job import fingerprint_document
from batchpipe.jobfile import load_job
from batchpipe.journal import read_journal
from batchpipe.manifest import Accounts, Failure, RangeResult, SplitResult
from batchpipe.mirror import assemble
from batchpipe.orders import HIDDEN, Place, Schemas
from batchpipe.output import Output
from batchpipe.plan import list_inputs, make_plan
from batchpipe.publication import is_committed
from batchpipe.quarantine import to_line
from batchpipe.redrive import find_finished, open_redriven, plan_redrive
from batchpipe.run import Run
from batchpipe.runs import RunFolder, unfinished_runs
from batchpipe.schedule import ignore
from batchpipe.split import WHOLE, Split
from batchpipe.storage import Store, open_store

KILLED, FROZEN = -signal.SIGKILL, -signal.SIGSTOP
NEVER = 1_000_000
HANGS_AFTER_S = 30
"""A start takes well under a second. One that hangs shows its stacks and dies: a test that waited for it would wait
in its tidying, too, and the child holds the pipes by which the death of the test's process would be seen."""
REDRIVEN = b"answered after all\n"
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


@dataclass
class Start:
    """A start of the run: a child process. `made` tells which splits it worked on."""

    pid: int
    made_file: Path

    def wait(self) -> int:
        """Its exit code, or KILLED, or FROZEN when it has stopped at its write."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        return FROZEN if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)

    def thaw(self) -> int:
        """Let a frozen start go on; its exit code."""
        os.kill(self.pid, signal.SIGCONT)
        return self.wait()

    @property
    def made(self) -> list[int]:
        return [int(line) for line in self.made_file.read_text().split()]


@dataclass
class SmallRun:
    """A folder with three inputs and an output; each generation is another job, whose run id is ``run<generation>``."""

    folder: Path
    layout: str = "parts"
    if_exists: str = "replace"
    generation: int = 1
    _starts: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = self.folder / "out"
        for name, size in {"a": 2_500, "b": 10, "c": 10}.items():
            (self.folder / "in" / f"{name}.txt").parent.mkdir(exist_ok=True)
            (self.folder / "in" / f"{name}.txt").write_text("x" * 9 + "\n" + ("y" * 99 + "\n") * (size // 100))
        document = {
            "input": {"uri": "in", "format": "lines"},
            "batch": {"split_mb": 0.001},
            "stages": [{"callable": "stages:none"}],
            "output": {"uri": "out", "format": "raw", "layout": self.layout, "if_exists": self.if_exists},
        }
        (self.folder / "job.yaml").write_text(yaml.safe_dump(document))
        self.job = load_job(self.folder / "job.yaml")
        self.store: Store = open_store(str(self.root))

    @property
    def run(self) -> RunFolder:
        """The present generation's folder."""
        return RunFolder(str(self.root), f"run{self.generation}")

    def start(
        self, *, kill_at: int = NEVER, freeze_at: int = NEVER, restart: bool = False, redrives: bool = False
    ) -> Start:
        """Begin a start of the run, or of its redrive, that dies, or stops, instead of its n-th write (from 0)."""
        number = next(self._starts)
        made = self.folder / f"made-{number}"
        made.touch()
        pid = os.fork()
        if not pid:
            folder = self.folder / f"scratch-{number}"
            work = partial(self._redrive, folder, made) if redrives else partial(self._run, folder, made, restart)
            self._be_the_child(folder, kill_at, freeze_at, work)
        return Start(pid, made)

    def entries(self, type_: str) -> list[dict[str, Any]]:
        """What the present generation's journal says and a next start will believe."""
        return [each for each in read_journal(self.store, self.run / "journal") if each["type"] == type_]

    def committed(self) -> list[str]:
        """Unfinished runs that have begun to publish, or to tidy up after it, when half of a journal may be gone."""
        root, published = str(self.root), (self.manifest() or {}).get("run_id")
        unfinished = unfinished_runs(self.store, root)
        return [each for each in unfinished if each == published or is_committed(self.store, RunFolder(root, each))]

    def visible(self) -> dict[str, bytes]:
        """Name and content of everything that is no secret of the run's."""
        files = [path for path in self.root.rglob("*") if path.is_file() and HIDDEN not in path.parts]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}

    def hidden(self) -> dict[str, bytes]:
        """Name and content of every file below the output's hidden folder."""
        hidden = self.root / HIDDEN
        return {str(path.relative_to(hidden)): path.read_bytes() for path in hidden.rglob("*") if path.is_file()}

    def manifest(self) -> dict[str, Any] | None:
        path = self.root / HIDDEN / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def expected(self, generation: int) -> dict[str, bytes]:
        """Name and content of each part of a generation, as an undisturbed run publishes them."""
        split = [_answer(generation, index) for index in range(5)]
        if self.layout == "mirror":
            return {"a.txt.out": b"".join(split[:3]), "b.txt.out": split[3], "c.txt.out": split[4]}
        return {f"{self._prefix(generation)}{index:08d}.out": split[index] for index in (0, 2, 3)}  # split 1: nothing

    @property
    def redriven(self) -> dict[str, bytes]:
        """Name and content of what a redrive of the present generation adds."""
        mirrored, part = "a.txt.redrive-1.out", f"{self._prefix(self.generation)}redrive-001-00000000.out"
        return {mirrored if self.layout == "mirror" else part: REDRIVEN}

    def _prefix(self, generation: int) -> str:
        return f"part-run{generation}-" if self.if_exists == "replace" else "part-"

    def _be_the_child(self, scratch: Path, kill_at: int, freeze_at: int, work: Callable[[], None]) -> NoReturn:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(HANGS_AFTER_S)
        try:
            scratch.mkdir()
            _count_writes(str(self.root), kill_at, freeze_at)
            work()
            code = 0
        except BatchpipeError as error:
            code = error.exit_code
            print(error, file=sys.stderr)  # noqa: T201 - for whoever looks at a failed test
        except BaseException:  # noqa: BLE001 - told, and never into the test runner that was forked
            traceback.print_exc()
        finally:
            os._exit(code)

    def _run(self, scratch: Path, made: Path, restart: bool) -> None:
        run_id, inputs = self.run.run_id, list_inputs(self.job.input, scratch)
        with open_output(self.job, run_id, self._fingerprint, scratch, restart=restart) as output:
            if not output.manifest:
                self._transform_and_publish(Run(self.job, run_id, make_plan(inputs, self.job), output, ignore), made)

    def _redrive(self, scratch: Path, made: Path) -> None:
        """As `runner.redrive_job` does it."""
        finished, is_done = find_finished(self.job, None, 0)
        if is_done:
            return
        redriven = open_redriven(self.job, finished)
        run_id, inputs = redriven.run_id, list_inputs(self.job.input, scratch)
        plan = plan_redrive(self.job, redriven, inputs, scratch)
        fingerprint = redriven.fingerprint_of(self._fingerprint)
        with open_output(self.job, run_id, fingerprint, scratch, redrives=finished) as output:
            if not output.manifest:
                self._transform_and_publish(Run(self.job, run_id, plan, output, ignore, redriven), made)

    @property
    def _fingerprint(self) -> Fingerprint:
        inputs = {"listing_sha256": "the same"}
        return Fingerprint({"generation": self.generation, "job": fingerprint_document(self.job), "inputs": inputs})

    def _transform_and_publish(self, run: Run, made: Path) -> None:
        output = run.output
        if not output.schemas:
            output.set_schemas(Schemas().to_json())
        for result in run.schedule.settle_held():
            output.settle(result)
        while tasks := [task for _ in range(3) if (task := run.schedule.take(1))]:
            for task in reversed(tasks):  # the later ranges of an object are done first
                outcomes = [self._work(split, run.place, made) for split in task]
                for result in run.schedule.settle(task, outcomes):
                    output.settle(result)
                run.keep_held()
                if task[0].index % 2:
                    output.journal.flush()
        _join_pieces(output, run, run.place)
        run.publish(run.plan.inputs)

    def _work(self, split: Split, place: Place, made: Path) -> SplitResult:
        with made.open("a") as file:
            file.write(f"{split.index}\n")
        if split.is_picked:
            return self._work_on_picks(split, place)
        writes_nothing = self.layout == "parts" and split.index == 1
        quarantine = None
        if split.index == 2:
            quarantine = _write(self.store, place.quarantine_uri(split), place, to_line(_failure(split, place)))
        piece = None
        if not writes_nothing:
            piece = _write(self.store, place.piece_uri(split), place, _answer(self.generation, split.index))
        first = Accounts(read=2, written=0 if writes_nothing else 1, quarantined=0, dropped=2 if writes_nothing else 1)
        if split.index == 2:
            first = Accounts(read=2, written=1, quarantined=1, dropped=0)
        ranges = tuple(RangeResult(r.object.index, r.start, r.start, r.stop, 1, first) for r in split.ranges[:1])
        return SplitResult(split.index, ranges, piece, quarantine)

    def _work_on_picks(self, split: Split, place: Place) -> SplitResult:
        """What failed is answered now."""
        piece = _write(self.store, place.piece_uri(split), place, REDRIVEN)
        answered = Accounts(read=1, written=1, quarantined=0, dropped=0)
        return SplitResult(split.index, (RangeResult(0, 0, 0, WHOLE, 1, answered),), piece, None)


def _failure(split: Split, place: Place) -> Failure:
    """The first record of a split, the third one of its object, has failed; whose attempt it was can be told."""
    [found] = split.ranges
    uri, version, start = found.object.uri, found.object.version, found.start
    return Failure(uri, version, start, 0, start, "none", "bad", place.attempt, record=2)


def _answer(generation: int, split: int) -> bytes:
    return f"generation {generation}, split {split}\n".encode() * (split + 1)


def _write(store: Store, uri: str, place: Place, data: bytes) -> dict[str, Any]:
    with store.open_pending(uri, staging=place.staging, attempt=place.attempt) as sink:
        sink.write(data)
        return sink.finish().to_json()


def _join_pieces(output: Output, run: Run, place: Place) -> None:
    """What `Run` has its workers do under mirror."""
    if place.job.output.layout != "mirror":
        return
    output.journal.flush()
    for assembly in output.assemblies(run.plan.inputs, place):
        output.assembled_as(assembly, assemble(assembly, place))


def _count_writes(root: str, kill_at: int, freeze_at: int) -> None:
    """From here on this process dies, or stops until it is told to go on, instead of a write below the root."""
    number = count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _is_write(event, arguments, root):
            return
        here = next(number)
        if here == freeze_at:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif here >= kill_at:  # other threads write at the same time: none of them gets any further
            signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
            time.sleep(60)

    sys.addaudithook(hook)


def _is_write(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        return flags & os.O_ACCMODE != os.O_RDONLY and _is_below(path, root)
    # Within a folder that is removed, files are named relative to it.
    return event in _CHANGES and any(_is_below(each, root) or _is_bare(each) for each in arguments[:2])


def _is_below(path: object, root: str) -> bool:
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root)


def _is_bare(path: object) -> bool:
    return isinstance(path, str) and "/" not in path


@contextlib.contextmanager
def ending(start: Start) -> Iterator[Start]:
    """A start that is killed at the end, should the test fail while it is frozen."""
    try:
        yield start
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(start.pid, signal.SIGKILL)
            os.waitpid(start.pid, 0)
