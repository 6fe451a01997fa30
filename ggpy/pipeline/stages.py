"""The stages of a pipeline as their user sees them: one program that runs batches."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np

from ..errors import Error, UnsupportedError
from ..graph import Pages, Pool, Span, States, pack
from ..kernels.table import SLAB
from ..models import Output
from .links import Lost

if TYPE_CHECKING:
    from ..file import GGUFFile

_T = TypeVar("_T")
_DEATHS = 3  # of stages, in one run

#: Brings back what a stage has lost: tokens to evaluate, or two slots, of which the first is to be copied to the other.
Known: TypeAlias = Span | tuple[int, int]


class Links(Protocol):
    """What carries messages; see `links.Processes`."""

    def start(self, stages: Sequence[int]) -> list[list[str]]: ...
    def send(self, i: int, message: tuple) -> None: ...
    def receive(self, stages: Sequence[int]) -> tuple[int, Any]: ...
    def dead(self) -> list[int]: ...
    def close(self) -> None: ...


class RemotePool(Pool):
    """Pieces that are in the stages: numbers and who holds them.

    Attributes
    ----------
    name : str
        Of the stages' pools.
    stages : Stages
    """

    name: str
    stages: "Stages"

    def copy(self, i: int, to: int) -> None:
        """Has all stages copy a piece."""
        self.stages.copy(self.name, i, to)

    def read(self, pieces: Sequence[int]) -> dict[str, np.ndarray]:
        """See `Pool.read`."""
        return self.stages.read(self.name, list(pieces))

    def write(self, pieces: Sequence[int], saved: Mapping[str, np.ndarray]) -> None:
        """See `Pool.write`."""
        self.stages.write(self.name, list(pieces), saved)


class RemoteStates(RemotePool, States):
    """Slots that are in the stages. These have one more, behind the last, for `Stages.restore`."""

    name = "states"


class RemotePages(RemotePool, Pages):
    """Pages, and slots beside them, that are in the stages; see `Pages`."""

    name = "pages"

    def __init__(self, n_pages: int, type: str = "F16", n_ctx: int | None = None, n_slots: int = 0):
        super().__init__(n_pages, type, n_ctx, n_slots)
        self.states: RemoteStates = RemoteStates(n_slots)


def split_layers(file: "GGUFFile", n_layer: int, n: int) -> list[range]:
    """The layers of n stages, of about as many bytes each, what logits are made with among them. Embeddings don't count: of
    their table a few rows are read.

    Raises
    ------
    Error
        Fewer layers than stages.
    """
    if not 1 <= n <= n_layer:
        raise Error(f"{file.path}: {n} stages; it has {n_layer} layers")
    sizes = [0] * n_layer
    for name, tensor in file.tensors.items():
        part = name.split(".")
        if part[0] == "token_embd" and "output.weight" in file.tensors:
            continue
        is_layer = part[0] == "blk" and part[1].isdecimal() and int(part[1]) < n_layer
        sizes[int(part[1]) if is_layer else n_layer - 1] += tensor.n_bytes
    ranges, first, done, total = [], 0, 0, sum(sizes)
    for i in range(n):
        stop, left = first + 1, n - 1 - i  # each of those that are left has a layer at least
        done += sizes[first]
        while stop < n_layer - left and done + sizes[stop] / 2 <= total * (i + 1) / n:
            done += sizes[stop]
            stop += 1
        stop = n_layer if not left else stop
        ranges.append(range(first, stop))
        first = stop
    return ranges


class Stages:
    """Runs batches through stages, piece after piece, so that all have something to do.

    Parameters
    ----------
    links : Links
    n : int
        How many stages there are.
    pages : RemotePages
    known : callable
        Gives what brings back all that is in use, in order: a stage that has died is started again, and knows nothing.

    Raises
    ------
    UnsupportedError
        Layers of two stages share keys and values.
    """

    def __init__(self, links: Links, n: int, pages: RemotePages, known: Callable[[], Iterable[Known]]):
        self._links, self._n, self._known = links, n, known
        self._busy: set[int] = set()
        pages.stages = pages.states.stages = self
        try:
            self._caches = links.start(range(n))
            names = [name for caches in self._caches for name in caches]
            if len(set(names)) < len(names):
                raise UnsupportedError("layers of different stages share keys and values; take fewer stages")
        except BaseException:
            links.close()
            raise

    def copy(self, pool: str, i: int, to: int) -> None:
        """Has all stages copy a piece of a pool of theirs."""
        for stage in range(self._n):
            with suppress(Lost):  # who asks next finds out, and all that is known is computed again
                self._links.send(stage, ("copy", pool, i, to))

    def read(self, pool: str, pieces: Sequence[int]) -> dict[str, np.ndarray]:
        """What all stages have in some pieces; see `Pool.read`. Raises as `run`."""
        return self._living(lambda: self._read(pool, pieces))

    def write(self, pool: str, pieces: Sequence[int], saved: Mapping[str, np.ndarray]) -> None:
        """The inverse of `read`. Raises as `run`."""
        self._living(lambda: self._write(pool, pieces, saved))

    def run(self, spans: Sequence[Span], output: Output) -> list[np.ndarray]:
        """Evaluates tokens of some sequences: for each what it wants, (n_outputs, …).

        Parameters
        ----------
        spans : sequence of Span
        output : {"logits", "embeddings"}

        Raises
        ------
        Error
            Stages die again and again, or can't be started.
        """
        return self._living(lambda: self._through(spans, output))

    def _living(self, work: Callable[[], _T]) -> _T:
        """What some work gives, begun anew where a stage has died."""
        deaths = 0
        while True:
            try:
                if deaths:
                    self._restore()
                return work()
            except Lost as lost:
                deaths += 1
                if deaths > _DEATHS:
                    raise Error(f"stage {lost.stage + 1} has died; stages have died {deaths} times in a row") from None
                dead = self._links.dead() or [lost.stage]
                self._busy.difference_update(dead)
                self._links.start(dead)
            except Error:
                raise
            except BaseException:  # where an interrupt came, a message may be half read
                self._links.close()
                self._busy.clear()
                raise

    def _restore(self) -> None:
        for known in self._known():
            if isinstance(known, Span):
                self._through([known], "logits")
            else:
                self.copy(RemoteStates.name, *known)

    def _settle(self) -> None:
        """Waits for stages that are busy with what is for nobody, since another was lost."""
        while self._busy:
            self._busy.discard(self._links.receive(sorted(self._busy))[0])

    def _read(self, pool: str, pieces: Sequence[int]) -> dict[str, np.ndarray]:
        self._settle()
        found: dict[str, np.ndarray] = {}
        for i in range(self._n):
            self._links.send(i, ("read", pool, pieces))
            self._busy.add(i)
        while self._busy:
            i, arrays = self._links.receive(sorted(self._busy))
            self._busy.discard(i)
            found |= arrays
        return found

    def _write(self, pool: str, pieces: Sequence[int], saved: Mapping[str, np.ndarray]) -> None:
        self._settle()
        for i, caches in enumerate(self._caches):
            own = {name: array for name, array in saved.items() if name.rpartition(".")[0] in caches}
            self._links.send(i, ("write", pool, pieces, own))

    def _through(self, spans: Sequence[Span], output: Output) -> list[np.ndarray]:
        pieces = _pieces(spans, self._n)
        packed = [pack([span for _, span in piece]) for piece in pieces]
        self._settle()
        waiting: list[deque[tuple[int, np.ndarray | None]]] = [deque() for _ in range(self._n)]
        waiting[0].extend((k, None) for k in range(len(pieces)))
        at_work = [-1] * self._n
        results: list[np.ndarray | None] = [None] * len(pieces)
        n_done = 0
        while n_done < len(pieces):
            for i in range(self._n):
                if waiting[i] and i not in self._busy:
                    at_work[i], x = waiting[i].popleft()
                    self._links.send(i, ("run", output, tuple(packed[at_work[i]][0]), x))
                    self._busy.add(i)
            i, result = self._links.receive(sorted(self._busy))
            self._busy.discard(i)
            if i + 1 < self._n:
                waiting[i + 1].append((at_work[i], result))
            else:
                results[at_work[i]], n_done = result, n_done + 1
        found: list[list[np.ndarray]] = [[] for _ in spans]
        for piece, (_, rows), result in zip(pieces, packed, results, strict=True):
            assert result is not None
            for (index, _), r in zip(piece, rows, strict=True):
                found[index].append(result[r])
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in found]

    def close(self) -> None:
        """Ends the stages."""
        self._links.close()


def _pieces(spans: Sequence[Span], n: int) -> list[list[tuple[int, Span]]]:
    """Spans in pieces, twice as many as stages if there is enough in them; with each, its place among the spans.

    Long spans are cut: a token's values don't depend on that. A piece comes after those with tokens before its own."""
    if n == 1:
        return [list(enumerate(spans))]
    total = sum(len(span.ids) for span in spans)
    most = max(-(-total // (2 * n)), 1 if total == len(spans) else SLAB // 2)
    pieces: list[list[tuple[int, Span]]] = [[]]
    room = most
    for index, span in enumerate(spans):
        first, n_tokens = 0, len(span.ids)
        while first < n_tokens:
            if not room:
                pieces.append([])
                room = most
            stop = min(n_tokens, first + room)
            wanted = max(0, stop - max(first, n_tokens - span.n_outputs))
            part = Span(span.ids[first:stop], span.n_past + first, span.pages, wanted, span.slot)
            pieces[-1].append((index, part))
            room -= stop - first
            first = stop
    return pieces
