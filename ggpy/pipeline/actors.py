"""Stages as actors of a Ray cluster, and how clusters are connected to."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import Error, UnsupportedError
from .links import Lost
from .stage import How, Stage

_SECONDS = 5.0  # for a first answer of an address


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at an address, if it isn't to one already.

    Raises
    ------
    Error
        There is none.
    UnsupportedError
        Ray isn't installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UnsupportedError("several machines need Ray: pip install 'ggpy[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        try:
            socket.create_connection((host, int(port)), _SECONDS).close()
        except (OSError, ValueError, OverflowError) as error:
            raise Error(f"no Ray cluster at {address}: {error}") from None
    elif address not in ("auto", "local"):
        raise Error(f"{address!r} is no address of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto or local")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Error(f"no Ray cluster at {address}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def nodes_for(ray: Any, n_threads: int | None, n: int) -> list[dict[str, Any]]:
    """The nodes that have processors. There may be none yet, where they come as they are needed.

    Raises
    ------
    Error
        They haven't enough for n processes with so many threads each, which would wait for ever.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    room = n if n_threads is None else sum(int(node["Resources"]["CPU"] // n_threads) for node in nodes)
    if nodes and room < n:
        what = f"{room} of {n} processes" if n > 1 else "no process"
        raise Error(f"the Ray cluster has room for {what} with {n_threads} threads; a smaller n_threads (-t) may do")
    return nodes


def cause(error: BaseException) -> str:
    """What Ray wraps in its own errors and their traces."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and inner is not error:
        error = inner
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class Actors:
    """Stages as actors, on different nodes as far as there are some; see `links.Processes`.

    Parameters
    ----------
    address : str
        Of the cluster.
    hows : sequence of How
        The model's file is at the same path on all nodes.
    """

    def __init__(self, address: str, hows: Sequence[How]):
        self._stack, self._hows = ExitStack(), list(hows)
        self._ray = self._stack.enter_context(connected(address))
        try:
            nodes_for(self._ray, hows[0].n_threads, len(hows))
        except BaseException:
            self._stack.close()
            raise
        self._actors: list[Any] = [None] * len(hows)
        self._results: list[Any] = [None] * len(hows)

    def start(self, stages: Sequence[int]) -> list[list[str]]:
        """Starts stages; the names of each one's caches. Raises Error if one can't open the model."""
        from ray.exceptions import RayError

        kind = self._ray.remote(Stage)
        for i in stages:
            options = {"num_cpus": self._hows[i].n_threads, "scheduling_strategy": "SPREAD", "max_restarts": 0}
            self._actors[i] = kind.options(**options).remote(self._hows[i])
        try:
            return self._ray.get([self._actors[i].do.remote(("caches",)) for i in stages])
        except RayError as error:
            raise Error(f"{self._hows[0].path}: a stage hasn't started: {cause(error)}") from None

    def send(self, i: int, message: tuple) -> None:
        """Sends a stage a message, of which it does one after the other."""
        if self._actors[i] is None:
            raise Lost(i)
        result = self._actors[i].do.remote(message)
        if message[0] in ("run", "read"):
            self._results[i] = result

    def receive(self, stages: Sequence[int]) -> tuple[int, Any]:
        """Waits for one of some stages; which it is, and its result. Raises Lost, or Error with what it has raised."""
        from ray.exceptions import RayActorError, RayError

        results = [self._results[i] for i in stages]
        (ready,), _ = self._ray.wait(results, num_returns=1)
        i = stages[results.index(ready)]
        try:
            return i, self._ray.get(ready)
        except RayActorError:
            self._actors[i] = None
            raise Lost(i) from None
        except RayError as error:
            raise Error(f"stage {i + 1}: {cause(error)}") from None

    def dead(self) -> list[int]:
        """Which stages are known to have died."""
        return [i for i, actor in enumerate(self._actors) if actor is None]

    def close(self) -> None:
        """Ends all stages, and the connection."""
        for i, actor in enumerate(self._actors):
            if actor is not None:
                self._ray.kill(actor)
            self._actors[i] = None
        self._stack.close()
