"""Ports for processes that meet over TCP."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of this machine that the system gives to nobody else within the block.

    The socket that holds it never listens and shares its address, as the stores of ``torch.distributed`` do,
    so one of those can listen there. A port that was only looked up could be somebody else's by then.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
