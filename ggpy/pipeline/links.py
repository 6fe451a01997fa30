"""How messages come to a pipeline's stages and back."""

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import Error, UnsupportedError
from .stage import How


class Lost(Exception):  # noqa: N818
    """A stage has died."""

    def __init__(self, stage: int):
        super().__init__(stage)
        self.stage = stage


class Processes:
    """Stages as processes of this machine.

    Parameters
    ----------
    hows : sequence of How
    """

    def __init__(self, hows: Sequence[How]):
        self._hows = list(hows)
        self._processes: list[subprocess.Popen | None] = [None] * len(hows)
        self._connections: list[Connection | None] = [None] * len(hows)

    def start(self, stages: Sequence[int]) -> list[list[str]]:
        """Starts stages, anew if they have died; the names of each one's caches.

        Raises
        ------
        Error
            One can't open the model, or dies as it does.
        """
        if os.name != "posix":
            raise UnsupportedError("stages as processes need a system that hands on descriptors, as Linux and macOS do")
        for i in stages:
            self._end(i)
            here, there = Pipe()
            command = [sys.executable, "-m", "ggpy.pipeline", str(there.fileno())]
            # A session of its own: Ctrl-C is for the process that the stages work for.
            process = subprocess.Popen(command, pass_fds=[there.fileno()], start_new_session=True)
            there.close()
            self._processes[i], self._connections[i] = process, here
            self.send(i, self._hows[i])
        found = []
        for i in stages:
            try:
                kind, said = self._connection(i).recv()
            except (EOFError, OSError):
                raise Error(f"{self._hows[i].path}: stage {i + 1} has died as it opened the model") from None
            if kind == "error":
                raise Error(said)
            found.append(said)
        return found

    def _connection(self, i: int) -> Connection:
        connection = self._connections[i]
        if connection is None:
            raise Lost(i)
        return connection

    def send(self, i: int, message: tuple) -> None:
        """Sends a stage a message.

        Raises
        ------
        Lost
        """
        try:
            self._connection(i).send(message)
        except OSError:
            raise Lost(i) from None

    def receive(self, stages: Sequence[int]) -> tuple[int, Any]:
        """Waits for one of some stages; which it is, and its result.

        Raises
        ------
        Lost
        Error
            What one of them has raised.
        """
        connections = [self._connection(i) for i in stages]
        i = stages[connections.index(wait(connections)[0])]  # type: ignore[arg-type]
        try:
            kind, said = self._connection(i).recv()
        except (EOFError, OSError):
            raise Lost(i) from None
        if kind == "error":
            raise Error(f"stage {i + 1}: {said}")
        return i, said

    def dead(self) -> list[int]:
        """Which stages have died."""
        return [i for i, process in enumerate(self._processes) if process is None or process.poll() is not None]

    def _end(self, i: int) -> None:
        connection, process = self._connections[i], self._processes[i]
        self._connections[i] = self._processes[i] = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Ends all stages."""
        for i in range(len(self._hows)):
            self._end(i)
