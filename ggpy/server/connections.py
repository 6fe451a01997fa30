"""Connections: how uvicorn serves an application, and the end of those that come to nothing."""

import asyncio
import os
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import Error
from .transport import KEEP_ALIVE

#: seconds in which a connection must get on: its request's headers come whole, and what is sent to it is read a bit
SECONDS = 3 * KEEP_ALIVE


class Connection(H11Protocol):
    """HTTP/1.1, with 64 KB of headers at most, and an end to clients that send or read nothing when it is their turn."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to look, from time to time."""
        super().connection_made(transport)
        self._seen: Any = None
        self._look_again = self.loop.call_later(SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends that."""
        self._look_again.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        is_idle = self.cycle is None or self.cycle.response_complete
        seen, self._seen = self._seen, (unsent, self.cycle) if unsent or is_idle else None
        if seen is not None and seen == self._seen:
            self.transport.abort()
        else:
            self._look_again = self.loop.call_later(SECONDS, self._look)


def config(app: Any, host: str, port: int) -> uvicorn.Config:
    """How uvicorn runs an application."""
    how: dict[str, Any] = {"http": Connection, "ws": "none", "lifespan": "on"}
    return uvicorn.Config(app, host, port, access_log=False, log_config=None, server_header=False, **how)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which doesn't listen yet.

    Raises
    ------
    Error
        Somebody listens there, or the address isn't this machine's.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it lets two have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise Error(f"can't listen at {host}, port {port}: {error.strerror}") from None
    return made
