"""The models that are served: by name, loaded when they are asked for, unloaded when others need the memory."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..generate.model import Model
from .engine import Engine
from .errors import APIError


class Cache(NamedTuple):
    """See `Model.keep_cache`."""

    folder: Path
    n_bytes: int


class Served:
    """A model under a name.

    Attributes
    ----------
    name : str
    path : Path
    created : int
        The file's time, in seconds since 1970.
    model, engine
        While it is loaded.
    cache : Cache or None
        The folder that keeps what it computes, and how many bytes it may have.
    n_used : int
        Requests that use it now.
    n_answers : int
        Answers that they want.
    """

    def __init__(self, name: str, path: Path, how: Mapping[str, Any], cache: Cache | None = None):
        self.name, self.path, self._how, self.cache = name, path, dict(how), cache
        self.created = int(path.stat().st_mtime)
        self._model: Model | None = None
        self._engine: Engine | None = None
        self.n_used = self.n_answers = 0
        self.last_used = 0.0

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory."""
        return self._model is not None

    @property
    def model(self) -> Model:
        """The model; only where it is loaded."""
        assert self._model is not None
        return self._model

    @property
    def engine(self) -> Engine:
        """What steps its generations; only where it is loaded."""
        assert self._engine is not None
        return self._engine

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes: weights, and keys and values; of one that isn't loaded, its weights."""
        return self.path.stat().st_size + (self.model.kv_bytes if self.is_loaded else 0)

    async def load(self) -> None:
        """Opens the file."""
        model = await asyncio.to_thread(lambda: Model(self.path, **self._how))
        if self.cache is not None:
            await asyncio.to_thread(model.keep_cache, *self.cache)
        self._model = model
        self._engine = Engine(asyncio.get_running_loop(), f"ggpy {self.name}")

    async def unload(self) -> None:
        """Closes the file; nobody uses it."""
        model, engine, self._model, self._engine = self.model, self.engine, None, None
        await asyncio.to_thread(engine.close)
        await asyncio.to_thread(model.close)


class Models:
    """The models of a server.

    Parameters
    ----------
    served : sequence of Served
        The first is the one that requests get which name none. Where there is just one, any name means it: many clients
        send names of other servers' models.
    memory : int
        Bytes that loaded models may take together.

    Attributes
    ----------
    starting : bool
        Whether the first one is still being loaded as the server starts: until then nobody is let wait.
    """

    def __init__(self, served: Sequence[Served], memory: int):
        self.served = {one.name: one for one in served}
        self._memory = memory
        self._loading = asyncio.Lock()
        self.starting = False

    async def start(self) -> None:
        """Loads the first one."""
        self.starting = True
        try:
            async with self._use(self.named(None)):
                pass
        finally:
            self.starting = False

    def check_started(self) -> None:
        """Raises APIError while the first one is being loaded."""
        if self.starting:
            raise APIError(503, "the model is being loaded", headers={"Retry-After": "2"})

    def named(self, name: str | None) -> Served:
        """The model of a name.

        Raises
        ------
        APIError
            There is none.
        """
        first = next(iter(self.served.values()))
        if name is None or len(self.served) == 1:
            return first
        if name not in self.served:
            known = ", ".join(self.served)
            raise APIError(404, f"no model {name!r}; there are {known}", param="model", code="model_not_found")
        return self.served[name]

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """A model, loaded, for as long as the block runs.

        Raises
        ------
        APIError
            There is none of that name, or no memory for it while others are at work; or the server only starts.
        """
        self.check_started()
        async with self._use(self.named(name)) as served:
            yield served

    @asynccontextmanager
    async def _use(self, served: Served) -> AsyncIterator[Served]:
        served.n_used += 1
        try:
            if not served.is_loaded:
                async with self._loading:
                    if not served.is_loaded:
                        await self._make_room(served)
                        await served.load()
            yield served
        finally:
            served.n_used -= 1
            served.last_used = time.monotonic()

    async def _make_room(self, wanted: Served) -> None:
        """Unloads models that nobody uses, those first that were used longest ago."""
        while True:
            loaded = [one for one in self.served.values() if one.is_loaded]
            if not loaded or sum(one.n_bytes for one in loaded) + wanted.n_bytes <= self._memory:
                return
            idle = [one for one in loaded if not one.n_used]
            if not idle:
                text = f"no memory to load {wanted.name} while others answer"
                raise APIError(503, text, headers={"Retry-After": "10"})
            await min(idle, key=lambda one: one.last_used).unload()

    async def close(self) -> None:
        """Unloads all."""
        for one in self.served.values():
            if one.is_loaded:
                await one.unload()
