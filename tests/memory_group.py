"""A control group whose processes have a gigabyte together: what meets its end there, no test can play."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tests.jobs import until


@contextmanager
def open_memory_group() -> Iterator[Path]:
    """The group's folder: write a pid into its ``cgroup.procs``. Raises OSError without Linux and root."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.exists() else Path("/sys/fs/cgroup")) / f"batchpipe-test-{uuid4().hex[:8]}"
    group.mkdir()
    limit = group / ("memory.limit_in_bytes" if version_1.exists() else "memory.max")
    limit.write_text(str(1 << 30))
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()
