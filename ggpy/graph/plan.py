"""From a graph to a tape: which kernels run in which order, where everything lies, and where threads must meet.

Planning walks the nodes in order and lets each lower itself to kernel calls (`ops`). Activations get their place in one
arena by their lifetimes, first fit in order of time. A barrier stands before a kernel only when it touches memory that
one since the last barrier has written, or writes what one has read.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.table import KERNELS, QUANTIZED, activation_bytes, scratch_bytes
from .ops import OPS

if TYPE_CHECKING:
    from .pages import Pages
    from .tensor import Graph, Tensor

_ALIGN = 64
_PAD_TOKENS = 16  # matrix kernels take tokens in groups of up to 16


@dataclass(eq=False)
class Buffer:
    """A piece of the arena, needed from step `first` to step `last`."""

    n_bytes: int
    first: int = -1
    last: int = -1
    offset: int = -1


@dataclass(eq=False)
class Memory:
    """Memory outside the arena that kernels write: a cache or a state."""

    address: int
    n_bytes: int


@dataclass(frozen=True)
class At:
    """A place within a buffer."""

    buffer: Buffer
    offset: int


@dataclass(eq=False)
class Step:
    """One kernel call. `node` is the graph's node that it works for."""

    kernel: str
    node: "Tensor"
    params: dict
    writes: tuple[str, ...]
    barrier: bool = True


class Plan:
    """The kernel calls of a graph, with places in the arena.

    Parameters
    ----------
    graph : Graph
    pages : Pages
        Where the graph's caches are.
    n_threads : int
    lanes : int
        Weight rows that a matrix kernel takes at once (`simd.target`).
    watched : collection of str
        Names of nodes whose values must exist: they aren't fused away.

    Attributes
    ----------
    steps : list of Step
    arena_bytes : int
    names : list of str
        The kernels needed.
    """

    def __init__(self, graph: "Graph", pages: "Pages", n_threads: int, lanes: int, watched: Collection[str] = ()):
        self.graph, self.n_ctx, self._pages, self._lanes = graph, pages.n_ctx, pages, lanes
        self.n_threads, self.kv_type = n_threads, pages.type
        self.steps: list[Step] = []
        self._buffers: dict[Tensor, Buffer] = {}
        self._made: dict[tuple, Buffer] = {}
        self._computed: set[Tensor] = set()
        self._users: dict[Tensor, list[Tensor]] = {}
        for node in graph:
            for i in node.inputs:
                self._users.setdefault(i, []).append(node)
        self._keep = {id(t) for t in graph.outputs.values()}
        self._watched = {id(graph[name]) for name in watched}
        self._scratch_stride = 0
        self._memories: dict[int, Memory] = {}
        self._padded_weights: dict[Tensor, np.ndarray] = {}
        self._lower()
        self._scratch = Buffer(self._scratch_stride * n_threads)
        self._place()
        self._set_barriers()
        self.names = sorted({s.kernel for s in self.steps})

    @property
    def padded_bytes(self) -> int:
        """Bytes of weights that were copied to pad their rows."""
        return sum(array.nbytes for array in self._padded_weights.values())

    # What operations use to lower themselves

    def step(self, kernel: str, node: "Tensor", writes: tuple[str, ...] = ("out",), **params) -> None:
        """Emits a kernel call. Tensors stand for their addresses; `state`, `counter`, `scratch` are filled in."""
        for key, value in params.items():
            if hasattr(value, "op"):
                params[key] = self.place_of(value)
        self.steps.append(Step(kernel, node, params, writes))

    def buffer(self, n_bytes: int) -> Buffer:
        """A new piece of the arena."""
        return Buffer(-(-n_bytes // _ALIGN) * _ALIGN)

    def cache(self, cache: "Tensor") -> tuple[Memory, ...]:
        """The arrays of a cache."""
        return tuple(self._memory(a) for a in self._pages.arrays(cache))

    def state(self, state: "Tensor") -> Memory:
        """The array of a state."""
        return self._memory(self._pages.states.array(state))

    def at(self, t: "Tensor", offset: int) -> At:
        """The place `offset` bytes into a tensor."""
        buffer = self.place_of(t)
        assert isinstance(buffer, Buffer)
        return At(buffer, offset)

    def scratch(self, n_bytes: int) -> None:
        """Sees to it that each thread has n_bytes of scratch, which `scratch` and `scratch_stride` name."""
        self._scratch_stride = max(self._scratch_stride, -(-n_bytes // _ALIGN) * _ALIGN)

    def once(self, key: tuple, n_bytes: int, make: Callable[[Buffer], None]) -> Buffer:
        """What `make` leaves in a buffer of n_bytes; made once for all that ask with the same key."""
        if key not in self._made:
            buffer = self.buffer(n_bytes)
            make(buffer)
            self._made[key] = buffer
        return self._made[key]

    def activations(self, x: "Tensor", weight_type: str, n_cols: int) -> "tuple[Buffer, int]":
        """The first n_cols values of each row (last dimension) of x as weights of a type take them, and a row's bytes.

        Quantized once for all products that take them.
        """
        source = self.place_of(x)
        assert isinstance(source, Buffer)
        width = x.shape[-1]
        n_rows = x.n_values // x.shape[0] // width
        sizes: dict[str, Any] = {"n_cols": n_cols, "n_rows_per_token": n_rows}
        if weight_type not in QUANTIZED:
            n_padded = _whole_columns(n_cols)
            if n_padded == n_cols:
                return source, 4 * width

            def pad(out: Buffer) -> None:
                self.step("pad_rows", x, x=source, out=out, x_row_stride=4 * width, n_padded=n_padded, **sizes)

            n_bytes = 4 * n_padded * n_rows * self.padded(x)
            return self.once((source, "padded", width, n_cols), n_bytes, pad), 4 * n_padded
        fmt, stride = QUANTIZED[weight_type], activation_bytes(n_cols)
        sizes |= {"out_stride": stride}
        sizes |= {"x_stride": 4 * width * n_rows, "x_row_stride": 4 * width}

        def quantize(out: Buffer) -> None:
            self.step(f"quantize_{fmt}", x, x=source, out=out, **sizes)

        return self.once((source, fmt, width, n_cols), stride * n_rows * self.padded(x), quantize), stride

    def product(self, w: "Tensor", node: "Tensor", one: bool, n_most: int | None = None, /, **params: Any) -> None:
        """A matrix product: `params` are those of the kernel that don't follow from the weights, n_most the rows of x that
        one matrix may meet; without it, all of the node's tokens."""
        data = self._rows_of(w)
        n_rows, n_cols = w.shape[-2], _whole_columns(w.shape[-1])
        self.scratch(scratch_bytes(w.type, n_most or self.padded(node), data.shape[-1], n_cols, self._lanes))
        params = {"residual": 0, "ids": 0, "groups": 0, "w_stride": data.strides[0], **params}
        params |= {"w": data.ctypes.data, "n_rows": n_rows, "n_cols": n_cols}
        self.step(f"mul_mat_{'one_' if one else ''}{w.type}", node, **params)

    def _rows_of(self, w: "Tensor") -> np.ndarray:
        """The bytes of a weight's rows: as they are stored or, of float types with odd columns, a copy with zeros added."""
        data = w.attrs["weight"].data
        n_more = (_whole_columns(w.shape[-1]) - w.shape[-1]) * data.shape[-1] // w.shape[-1]
        if not n_more:
            return data
        if w not in self._padded_weights:
            self._padded_weights[w] = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, n_more)])
        return self._padded_weights[w]

    def only_user(self, node: "Tensor") -> "Tensor | None":
        """The node that alone takes `node`, unless `node` is also a result or watched."""
        users = self._users.get(node, [])
        return users[0] if len(users) == 1 and not self._is_seen(node) else None

    def _is_seen(self, node: "Tensor") -> bool:
        return id(node) in self._keep or id(node) in self._watched

    def quantized_format(self, node: "Tensor") -> str | None:
        """The format of activations in which alone `node` is needed, if so."""
        formats = set()
        for user in self._users.get(node, []):
            is_product = user.op in ("MUL_MAT", "MUL_MAT_ID") and user.inputs[1] is node
            formats.add(QUANTIZED.get(user.inputs[0].type) if is_product else None)
        return formats.pop() if len(formats) == 1 and not self._is_seen(node) else None

    def make_quantized(self, node: "Tensor", fmt: str, **params: Any) -> None:
        """Lowers a node to a kernel that writes it as quantized activations only; see `activations`."""
        width = node.shape[-1]
        stride, n_rows = activation_bytes(width), node.n_values // node.shape[0] // width

        def make(out: Buffer) -> None:
            kernel = f"{node.op.lower()}_{fmt}"
            self.step(kernel, node, out=out, n_cols=width, n_rows_per_token=n_rows, out_stride=stride, **params)

        self.once((self.place_of(node), fmt, width, width), stride * n_rows * self.padded(node), make)

    def is_computed(self, node: "Tensor") -> bool:
        """Whether the steps so far compute `node`."""
        return node in self._computed

    def mark_computed(self, node: "Tensor") -> None:
        """Says that the steps so far compute `node`, too."""
        self._computed.add(node)

    def alias(self, node: "Tensor", of: "Tensor") -> None:
        """Gives `node` the place of `of`."""
        place = self.place_of(of)
        assert isinstance(place, Buffer)
        self._buffers[node] = place

    # Planning

    def _lower(self) -> None:
        for node in self.graph:
            if node.op == "INPUT":
                self._computed.add(node)
            if node.op in OPS and node not in self._computed:
                OPS[node.op].lower(self, node)
                self._computed.add(node)

    def padded(self, t: "Tensor") -> int:
        """Tokens that buffers for t have room for."""
        return 1 if t.shape[0] == 1 else -(-t.shape[0] // _PAD_TOKENS) * _PAD_TOKENS

    def place_of(self, t: "Tensor") -> "Buffer | int":
        """Where a tensor is: its buffer, or a weight's address."""
        if t.op == "WEIGHT":
            return t.attrs["weight"].data.ctypes.data
        if t not in self._buffers:
            self._buffers[t] = self.buffer(4 * t.n_values // t.shape[0] * self.padded(t))
        return self._buffers[t]

    def _memory(self, array: np.ndarray) -> Memory:
        address = array.ctypes.data
        return self._memories.setdefault(address, Memory(address, array.nbytes))

    def place(self, t: "Tensor") -> tuple[int, int]:
        """Offset and bytes of a tensor in the arena."""
        buffer = self._buffers[t]
        return buffer.offset, buffer.n_bytes

    def step_after(self, t: "Tensor") -> int:
        """The index of the step after the one that completes a tensor."""
        buffer = self._buffers[t]
        return 1 + max(i for i, s in enumerate(self.steps) if any(_buffer(s.params[w]) is buffer for w in s.writes))

    def _place(self) -> None:
        end = len(self.steps)
        for i, step in enumerate(self.steps):
            for value in map(_buffer, step.params.values()):
                if isinstance(value, Buffer):
                    value.first = i if value.first < 0 else value.first
                    value.last = i
        for node, buffer in self._buffers.items():
            if node.op == "INPUT":
                buffer.first = 0
            if id(node) in self._keep:
                buffer.last = end
        arena = _Arena()
        self._scratch.offset = arena.take(self._scratch.n_bytes)
        used = {v for s in self.steps for v in map(_buffer, s.params.values()) if isinstance(v, Buffer)}
        used |= {self._buffers[t] for t in self.graph.outputs.values()}
        by_first: dict[int, list[Buffer]] = {}
        by_last: dict[int, list[Buffer]] = {}
        for b in sorted(used, key=lambda b: -b.n_bytes):
            by_first.setdefault(b.first, []).append(b)
            by_last.setdefault(b.last, []).append(b)
        for i in range(end):
            for b in by_first.get(i, ()):
                b.offset = arena.take(b.n_bytes)
            for b in by_last.get(i, ()):
                arena.give(b.offset, b.n_bytes)
        self.arena_bytes = arena.size

    def _set_barriers(self) -> None:
        reads: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        for step in self.steps:
            step_reads: list[tuple[int, int]] = []
            step_writes: list[tuple[int, int]] = []
            for key, value in step.params.items():
                value = _buffer(value)
                if isinstance(value, Buffer):
                    span = (value.offset, value.offset + value.n_bytes)
                elif isinstance(value, Memory):
                    span = (value.address + (1 << 62), value.address + value.n_bytes + (1 << 62))
                else:
                    continue
                (step_writes if key in step.writes else step_reads).append(span)
            touched = _overlap(step_reads, writes) or _overlap(step_writes, writes) or _overlap(step_writes, reads)
            step.barrier = touched
            if touched:
                reads, writes = [], []
            reads += step_reads
            writes += step_writes

    # The tape

    def encode(self, arena: int, states: dict[str, int], counters: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The parameters of all steps, as int64s, and for each step (its first parameter, whether it has a barrier).

        Parameters
        ----------
        arena : int
            Address of the arena.
        states : dict of str to int
            Addresses of the states of rows that stand for a "token" and for an "output".
        counters : int
            Address of an int64 for each step.
        """
        values: list[int] = []
        starts: list[tuple[int, int]] = []
        for i, step in enumerate(self.steps):
            params = dict(step.params)
            params["state"] = states[step.node.per]
            params["counter"] = counters + 8 * i
            params["scratch"], params["scratch_stride"] = self._scratch, self._scratch_stride
            starts.append((len(values), int(step.barrier)))
            for key in KERNELS[step.kernel].params:
                value = params[key]
                if isinstance(value, At):
                    value = arena + value.buffer.offset + value.offset
                elif isinstance(value, Buffer):
                    value = arena + value.offset
                elif isinstance(value, Memory):
                    value = value.address
                elif isinstance(value, float):
                    value = struct.unpack("<i", struct.pack("<f", value))[0]
                values.append(int(value))
        return np.array(values, np.int64), starts


def _whole_columns(n: int) -> int:
    """Columns of a matrix as the kernels take them: a multiple of 32."""
    return -(-n // 32) * 32


def _buffer(value: Any) -> Any:
    return value.buffer if isinstance(value, At) else value


def _overlap(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)


class _Arena:
    """First-fit allocation of a growing piece of memory."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes), by offset

    def take(self, n: int) -> int:
        for i, (offset, room) in enumerate(self._free):
            if room >= n:
                self._free[i : i + 1] = [(offset + n, room - n)] if room > n else []
                return offset
        # What is free at the end can grow.
        offset = self.size
        if self._free and sum(self._free[-1]) == self.size:
            offset = self._free.pop()[0]
        self.size = offset + n
        return offset

    def give(self, offset: int, n: int) -> None:
        self._free.append((offset, n))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for start, room in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged
