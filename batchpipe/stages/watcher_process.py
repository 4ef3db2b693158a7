"""The watcher process: obeys its owner over a pipe, and releases everything when the pipe closes or the owner is gone.

Run by its path, in a session of its own, with the standard library alone. What is released: the groups of the
processes it started, containers and networks by label, folders; then it starts the clean-up command, if there is one.
"""

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time

GRACE_S = 3.0
SWEEP_S = 30.0
SWEEP_PAUSE_S = 0.2
MAX_LOG_BYTES = 8 << 20
"""A log is at most two files of this size, the older one ends in ``.1``."""
PR_SET_CHILD_SUBREAPER = 36


class Log:
    """A file that keeps the last 8 to 16 MB of what is written to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = self.open()

    def open(self) -> int:
        self.size = 0
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, data: bytes) -> None:
        if self.size + len(data) > MAX_LOG_BYTES:
            os.close(self.file)
            os.replace(self.path, self.path + ".1")  # noqa: PTH105 - pathlib is a third of the time to start
            self.file = self.open()
        self.size += os.write(self.file, data)

    def close(self) -> None:
        os.close(self.file)


class Watch:
    """What the watcher has been told: processes, labels, folders, the clean-up command."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ)
        self.begun = b""
        self.exit_codes: dict[int, int | None] = {}
        self.pipes: dict[int, int] = {}
        self.groups: set[int] = set()
        self.creating: set[int] = set()
        self.labels: dict[str, str] = {}
        self.folders: list[str] = []
        self.command: list[str] | None = None
        self.closed = False

    def run(self) -> None:
        """Obey until the owner says close, closes the pipe, or is gone."""
        while not self.closed and os.getppid() == self.owner:
            for key, _ in self.selector.select(timeout=1.0):
                if self.selector.get_map().get(key.fd) is not key:
                    continue  # an order before it in this round closed it
                if key.fd:
                    self.log(key.fd, key.data)
                elif data := os.read(0, 1 << 16):
                    self.obey(data)
                else:
                    return
            self.reap()

    def obey(self, data: bytes) -> None:
        """Carry out the complete lines so far: one reply each."""
        *lines, self.begun = (self.begun + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            number = order.pop("order", None)  # none where it only says that it closes
            reply = {"order": number, **(getattr(self, "do_" + order.pop("do"))(**order) or {})}
            with contextlib.suppress(BrokenPipeError):
                os.write(1, json.dumps(reply).encode() + b"\n")

    def log(self, pipe: int, log: Log) -> bool:
        """Append what a process wrote, up to 64 KB of it; say whether there may be more."""
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return False
        if data:
            with contextlib.suppress(OSError):  # a full disk must not end the watch
                log.write(data)
        else:
            self.selector.unregister(pipe)
            os.close(pipe)
            self.pipes = {pid: other for pid, other in self.pipes.items() if other != pipe}
            log.close()
        return bool(data)

    def reap(self) -> None:
        """Take exit codes, of orphans given to us too, and forget groups that are empty.

        A group is forgotten before anything else can get its number: its dead are ours and keep it until here.
        """
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in self.exit_codes:
                    self.exit_codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        self.groups = {pid for pid in self.groups if signal_group(pid, 0)}
        self.creating &= self.groups

    def do_start(self, command: list[str], env: dict[str, str], cwd: str, log: str, creates: bool) -> dict[str, object]:
        try:
            sink = Log(log)
            read, write = os.pipe()
            try:
                child = subprocess.Popen(
                    command, env=env, cwd=cwd, stdin=-3, stdout=write, stderr=write, start_new_session=True
                )
            except OSError:
                os.close(read)
                sink.close()
                raise
            finally:
                os.close(write)
        except (OSError, ValueError) as exc:
            return {"error": [getattr(exc, "errno", 0), getattr(exc, "strerror", str(exc)), command[0]]}
        child.returncode = 0  # we reap it ourselves
        self.exit_codes[child.pid] = None
        self.groups.add(child.pid)
        if creates:
            self.creating.add(child.pid)
        os.set_blocking(read, False)
        self.selector.register(read, selectors.EVENT_READ, sink)
        self.pipes[child.pid] = read
        return {"pid": child.pid}

    def do_poll(self, pid: int) -> dict[str, object]:
        self.reap()
        if self.exit_codes[pid] is not None:
            self.take_last_words(pid)
        return {"returncode": self.exit_codes[pid]}

    def take_last_words(self, pid: int) -> None:
        """Have in the log what a process wrote before it ended, as much as a pipe may hold, before its end is told."""
        pipe = self.pipes.pop(pid, None)
        if pipe is None:  # it ended the log itself, or its end was told before
            return
        key = self.selector.get_key(pipe)
        for _ in range(16):
            if not self.log(key.fd, key.data):
                return

    def do_signal(self, pid: int, number: int) -> dict[str, object]:
        self.reap()
        return {"alive": pid in self.groups and signal_group(pid, number)}

    def do_scratch(self, path: str) -> None:
        self.folders.append(path)

    def do_containers(self, label: str, engine: str) -> None:
        self.labels[label] = engine

    def do_at_end(self, command: list[str] | None) -> None:
        self.command = command

    def do_close(self) -> None:
        self.closed = True

    def release(self) -> None:
        """Give everything back; containers are removed while the processes have their grace."""
        for pid in self.groups - self.creating:
            signal_group(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        self.sweep()
        while self.groups and time.monotonic() < deadline:
            time.sleep(0.01)
            self.reap()
        for pid in self.groups:
            signal_group(pid, signal.SIGKILL)
        kill_orphans()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self.command and not self.closed:
            self.clean_up(self.command)

    def clean_up(self, command: list[str]) -> None:
        """Run the clean-up command. We stay for it: as an orphan another watcher might take it for a stray."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.Popen(command, stdin=-3, stdout=-3, stderr=-3, start_new_session=True).wait(SWEEP_S)

    def sweep(self) -> None:
        """Remove what carries our labels, until a sweep that began after the last creation finds nothing.

        A command that creates is let end: the engine would finish what it was asked for after its caller was killed.
        """
        deadline = time.monotonic() + SWEEP_S
        found = bool(self.labels)
        while found and time.monotonic() < deadline:
            self.reap()
            found = bool(self.creating)
            for label, engine in self.labels.items():
                found |= remove(engine, ["ps", "-aq"], ["rm", "-f", "-v"], label)
                found |= remove(engine, ["network", "ls", "-q"], ["network", "rm"], label)
            if found:
                time.sleep(SWEEP_PAUSE_S)


def remove(engine: str, find: list[str], remove: list[str], label: str) -> bool:
    """Remove what carries the label; say whether there was, or may have been, anything."""
    find = [engine, *find, "--filter", f"label={label}"]
    try:
        found = subprocess.run(find, capture_output=True, timeout=10, check=True, text=True).stdout.split()
        if found:
            subprocess.run([engine, *remove, *found], capture_output=True, timeout=20, check=False)
    except FileNotFoundError:
        return False
    except (OSError, subprocess.SubprocessError):
        return True
    return bool(found)


def signal_group(pid: int, number: int) -> bool:
    """Send a signal to a group; say whether it has members."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # the second: macOS, of a group of zombies
        return False
    return True


def adopt_orphans() -> None:
    """Become the parent of what a stage's processes leave behind, outside their group too (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_orphans() -> None:
    """Kill whatever is still a child of ours, and then the children of those, which become ours.

    Other watchers among them, those of workers that died, are waited for instead: they are releasing.
    """
    deadline = time.monotonic() + SWEEP_S
    while (children := own_children()) and time.monotonic() < deadline:
        for pid in children:
            if is_watcher(pid):
                os.waitpid(pid, os.WNOHANG)
            else:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        time.sleep(0.01)


def own_children() -> list[int]:
    """The processes whose parent is this one; none where the system cannot tell."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:  # noqa: PTH123 - as above
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def is_watcher(pid: int) -> bool:
    """Whether a process runs this very program."""
    with open(f"/proc/{pid}/cmdline", "rb") as line:  # noqa: PTH123 - as above
        return os.fsencode(__file__) in line.read().split(b"\0")


def main() -> None:
    """Watch for the process whose id is the first argument."""
    # Handlers that do nothing, not SIG_IGN: children would inherit that and ignore TERM for ever.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    adopt_orphans()
    watch = Watch(int(sys.argv[1]))
    try:
        watch.run()
    finally:
        watch.release()


if __name__ == "__main__":
    main()
