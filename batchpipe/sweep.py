"""What the driver's watcher starts after a kill -9 as `python -m batchpipe.sweep FILE`: discard unjournaled pieces."""

import json
import sys
from pathlib import Path

from batchpipe.errors import LockedError
from batchpipe.orders import HIDDEN
from batchpipe.publication import sweep
from batchpipe.runs import RunFolder
from batchpipe.storage import join, open_store


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
