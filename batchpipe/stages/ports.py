"""Free ports on 127.0.0.1 for stages that share this machine's network: one to serve on and some to spare."""

import random
import socket
from contextlib import suppress

from batchpipe.stages import CannotStart

BLOCK = 16
_FIRST, _LAST = 20_000, 32_000
"""Below the range that outgoing connections take their ports from."""


class PortBlock:
    """Ports that no other stage of batchpipe on this machine uses, until it is closed.

    A bound socket on the block's first port is the mark that it is taken; the stage gets the ports after it.
    """

    def __init__(self, mark: socket.socket) -> None:
        self._mark = mark
        first: int = mark.getsockname()[1]
        self.port = first + 1
        self.safe_range = f"{first + 2}-{first + BLOCK - 1}"

    def close(self) -> None:
        """Give the ports back. May be called twice."""
        self._mark.close()


def take_ports() -> PortBlock:
    """Find a block of free ports and hold it. Raises CannotStart where none is free."""
    firsts = list(range(_FIRST, _LAST, BLOCK))
    random.shuffle(firsts)
    for first in firsts:
        mark = _bind(first)
        if mark is None:
            continue
        with suppress(OSError):
            for port in range(first + 1, first + BLOCK):
                _check_free(port)
            return PortBlock(mark)
        mark.close()
    msg = f"no {BLOCK} consecutive ports are free between {_FIRST} and {_LAST}"
    raise CannotStart(msg, next="`ss -ltn` lists who holds them; end what is not needed, or run fewer workers here")


def _bind(port: int) -> socket.socket | None:
    mark = socket.socket()
    try:
        mark.bind(("127.0.0.1", port))
    except OSError:
        mark.close()
        return None
    return mark


def _check_free(port: int) -> None:
    # As a server binds: what lingers in TIME_WAIT does not stand in its way.
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(("0.0.0.0", port))
