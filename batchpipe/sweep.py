"""Discard the unjournaled pieces of a driver that is killed: the order, and what its watcher starts to follow it."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchpipe.errors import LockedError
from batchpipe.orders import HIDDEN
from batchpipe.processes import SWEEP_PREFIX
from batchpipe.publication import sweep
from batchpipe.runs import RunFolder
from batchpipe.stages.watcher import Watcher, WatcherLostError
from batchpipe.storage import join, open_store, owner


@contextlib.contextmanager
def sweeping_if_killed(folder: RunFolder, options: dict[str, Any], watcher: Watcher) -> Iterator[None]:
    """Have the watcher run this module after a kill -9 of this process, which can then not sweep by itself."""
    descriptor, name = tempfile.mkstemp(prefix=SWEEP_PREFIX)  # readable by this user only
    try:
        with os.fdopen(descriptor, "w") as file:
            me = owner.this_process({"run": folder.run_id})
            order = {"root": folder.root, "options": options, "run_id": folder.run_id, "owner": me}
            json.dump(order, file)
        watcher.at_end([sys.executable, "-P", "-m", "batchpipe.sweep", name])
        yield
    finally:
        with contextlib.suppress(WatcherLostError):  # it is gone, and what matters is how the run ended
            watcher.at_end(None)
        Path(name).unlink(missing_ok=True)


def main() -> None:
    """Sweep the run that FILE names, unless somebody has taken it over: then he has swept it. FILE is deleted."""
    file = Path(sys.argv[1])
    order = json.loads(file.read_text())
    file.unlink()
    store, folder = open_store(order["root"], order["options"]), RunFolder(order["root"], order["run_id"])
    try:
        with store.lock(join(folder.root, HIDDEN, "lock"), {"run": folder.run_id, "sweeps": True}):
            sweep(store, folder)
    except LockedError:
        return


if __name__ == "__main__":
    main()
