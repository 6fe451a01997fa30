"""How much memory a model takes, said before it takes it."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..file import StringArray
from ..graph import Pages, Plan, pages_of, slot_bytes
from ..models import build_graph
from ..simd.target import target
from .snapshots import SNAPSHOT_TOKENS

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph
    from ..models import Architecture
    from ..models.weights import DerivedWeight

#: bytes of a process that has loaded a model and generated text, without what grows with the model
_PROCESS = 98 << 20
#: bytes that a tokenizer takes for each token of its vocabulary
_PER_TOKEN = 560
#: slots of states that a sequence has, beside one every SNAPSHOT_TOKENS of a prompt: the one at work, and the last page's
_SLOTS = 2


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a model takes once it has filled a context.

    Attributes
    ----------
    n_ctx : int
        Tokens of the context.
    weights : int
        Of the file's map: the system may take these pages back, and reads them again when they are used again.
    made : int
        Of weights made at loading.
    cache : int
        Of keys and values of one sequence. Several sequences share `Model.kv_bytes`.
    states : int
        Of layers with states of fixed size.
    computing : int
        Of activations.
    process : int
        Of Python, its modules, kernels and the tokenizer.
    """

    n_ctx: int
    weights: int
    made: int
    cache: int
    states: int
    computing: int
    process: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.made + self.cache + self.states + self.computing + self.process

    def with_context(self, n_ctx: int) -> "MemoryUse":
        """The same with another context."""
        return replace(self, n_ctx=n_ctx, cache=self.cache // pages_of(self.n_ctx) * pages_of(n_ctx))


def memory_use(
    file: "GGUFFile", arch: "Architecture", n_ctx: int, n_threads: int, n_batch: int = 512, kv_type: str = "f16"
) -> MemoryUse:
    """What a model will take.

    Parameters
    ----------
    file, arch
        The model.
    n_ctx, n_threads, n_batch, kv_type
        See `ggpy.load`.

    Raises
    ------
    GGUFError, GraphError
        The model can't be run.
    """
    derived: dict[str, DerivedWeight] = {}
    single = build_graph(file, arch, 1, output="embeddings", derived=derived)
    is_encoder = not all(t.attrs.get("causal", True) for t in single)
    n_tokens = max(n_batch, n_ctx) if is_encoder else n_batch
    graph = build_graph(file, arch, n_tokens, 1, output="embeddings" if is_encoder else "logits", derived=derived)
    # A plan asks for pages, whose memory isn't touched.
    plan = Plan(graph, Pages(1, kv_type.upper(), n_ctx, 1), n_threads, target().lanes)
    by_rows = _read_by_rows(graph)
    return MemoryUse(
        n_ctx,
        weights=sum(t.n_bytes for name, t in file.tensors.items() if name not in by_rows),
        made=plan.padded_bytes + sum(weight.data.nbytes for weight in derived.values() if _is_own(weight.data)),
        cache=pages_of(n_ctx) * Pages(0, kv_type.upper()).page_bytes(single),
        states=(_SLOTS + n_ctx // SNAPSHOT_TOKENS) * slot_bytes(single),
        computing=plan.arena_bytes,
        process=_PROCESS + _PER_TOKEN * _n_tokens(file),
    )


def _read_by_rows(graph: "Graph") -> set[str]:
    """The weights of which a run reads its tokens' rows alone."""
    all_of = {i.name for node in graph if node.op != "GET_ROWS" for i in node.inputs}
    return {i.name for node in graph if node.op == "GET_ROWS" for i in node.inputs} - all_of


def _is_own(array: np.ndarray) -> bool:
    """Whether an array has memory of its own, and isn't a view of a file's map."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is None


def _n_tokens(file: "GGUFFile") -> int:
    return len(file.get("tokenizer.ggml.tokens", StringArray, default=()))


def machine_memory() -> int:
    """Bytes that all processes may take together: what the machine has, or the process's group of resources; 4 GB where the
    system doesn't say."""
    found = [limit for limit, _ in _groups()]
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=4 << 30)


def available_memory() -> int | None:
    """Bytes that this process may still take without pushing out others'; None where the system doesn't say.

    The least of what the machine has and what the process's group of resources allows.
    """
    found = [n for n in (_of_machine(), *(free for _, free in _groups())) if n is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def _groups() -> Iterable[tuple[int, int]]:
    """The limits of the process's groups of resources (v2, v1), and how much of each is free."""
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):
            root = Path("/sys/fs/cgroup")
            most = int((root / limit).read_text())
            facts = dict(line.split() for line in (root / statistics).read_text().splitlines())
            cached = int(facts.get("inactive_file", 0)) + int(facts.get("active_file", 0))
            yield most, most - int((root / used).read_text()) + cached
