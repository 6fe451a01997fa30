"""Which block type each tensor gets: llama.cpp's mixes, as tables.

The rules are those of llama-quantize (src/llama-quant.cpp, `llama_tensor_get_type_impl`, of llama.cpp in llama-cpp-python
0.3.36). A file type gives most matrices one block type; tensors that lose more by it get a better one, some of them in
some layers only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import Error, UnsupportedError
from ..file.cursor import shorten
from ..quant import block_type


class FileType(NamedTuple):
    """The metadata's ``general.file_type``, and the block type of most matrices."""

    id: int
    weights: str


#: what llama-quantize calls them -> the file types that ggpy writes
FILE_TYPES = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q4_0": FileType(2, "Q4_0"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q2_K": FileType(10, "Q2_K"),
    "Q2_K_S": FileType(21, "Q2_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "MXFP4_MOE": FileType(38, "MXFP4"),
    "TQ1_0": FileType(36, "TQ1_0"),
    "TQ2_0": FileType(37, "TQ2_0"),
}
#: llama.cpp's mixes of block types that ggpy runs and has no encoder for: grids of points, which take a search of their own
_ONLY_RUN = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M")
#: leaves every tensor as it is
COPY = "COPY"
#: other names for the same
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

#: parts of the names of matrices that stay as they are, being small or sensitive
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *(f"time_mix_{part}.weight" for part in ("first", *(f"{k}{i}" for k in "wv" for i in range(3)), "a0", "a1", "a2")),
    *(f"time_mix_{part}.weight" for part in ("g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
    *("attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd"),
    *(".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")

#: parts of a tensor's name, tried in this order -> what the rules call such tensors; "=" stands for the whole name
_KINDS = (
    ("=output.weight", "output"),
    ("=token_embd.weight", "embedding"),
    ("=per_layer_token_embd.weight", "embedding"),
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn"),
    ("ffn_gate", "ffn"),
    ("ffn_down", "ffn_down"),
)

#: rows that can't be cut into the type's blocks of 256 -> a type with blocks of 32; where they can't either, F16
_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


class TensorFacts(Protocol):
    """What the rules ask about a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> str: ...


class ModelFacts(Protocol):
    """What the rules ask about a model: `GGUFFile` has it, and so has a conversion's plan."""

    @property
    def metadata(self) -> Container[str]: ...
    @property
    def tensors(self) -> Mapping[str, TensorFacts]: ...
    def get(self, key: str, kind: tuple[type, ...], default: Any) -> Any:
        """A value of the metadata, arrays as numpy's."""


@dataclass
class _Case:
    """What the rules ask about a tensor."""

    #: of the tensor's kind: how many came before it, and how many there are; in models with experts the layer instead
    i: int
    n: int
    #: query heads that share a key and value head
    n_group: int
    n_expert: int
    falcon: bool
    has_importance: bool

    def more_bits(self) -> bool:
        """The first and last eighth of the layers, and a third of the others."""
        return self.i < self.n // 8 or self.i >= 7 * self.n // 8 or (self.i - self.n // 8) % 3 == 2


_Condition = Callable[[_Case], bool]


def _always(case: _Case) -> bool:
    return True


def _first(share: int) -> _Condition:
    return lambda case: case.i < case.n // share


def _grouped(case: _Case) -> bool:
    return case.n_group >= 4


def _eight(case: _Case) -> bool:
    return case.n_expert == 8


_MIXED = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")

#: kind of tensor -> rules (file types, condition, block type; "" for that of most matrices): the first that applies counts
_RULES: dict[str, tuple[tuple[tuple[str, ...], _Condition, str], ...]] = {
    "attn_v": (
        (tuple(FILE_TYPES), _eight, "Q8_0"),
        (("Q2_K", "Q2_K_S"), _grouped, "Q4_K"),
        (("Q2_K",), _always, "Q3_K"),
        (("Q3_K_M",), lambda case: case.i < 2, "Q5_K"),
        (("Q3_K_M",), _always, "Q4_K"),
        (("Q3_K_L",), _always, "Q5_K"),
        (("IQ4_NL", "IQ4_XS"), _grouped, "Q5_K"),
        (("Q4_K_M", "Q5_K_M"), _Case.more_bits, "Q6_K"),
        (("Q4_K_S",), lambda case: case.i < 4, "Q5_K"),
    ),
    "attn_k": ((tuple(FILE_TYPES), _eight, "Q8_0"),),
    "attn_output": (
        (("Q3_K_L",), lambda case: case.falcon, "Q4_K"),
        (tuple(FILE_TYPES), lambda case: case.falcon, ""),
        (_MIXED, _eight, "Q5_K"),
        (tuple(FILE_TYPES), _eight, ""),
        (("Q2_K",), _always, "Q3_K"),
        (("Q3_K_M",), _always, "Q4_K"),
        (("Q3_K_L",), _always, "Q5_K"),
    ),
    "ffn_down": (
        (("Q2_K",), _always, "Q3_K"),
        (("Q2_K_S",), _first(8), "Q4_K"),
        (("Q3_K_M",), _first(16), "Q5_K"),
        (("Q3_K_M",), lambda case: not case.falcon or case.more_bits(), "Q4_K"),
        (("Q3_K_L",), lambda case: case.falcon, "Q4_K"),
        (("Q3_K_L",), _always, "Q5_K"),
        (("Q4_K_M",), lambda case: case.falcon and not case.i < case.n // 16 and case.more_bits(), "Q5_K"),
        (("Q4_K_M",), lambda case: case.i < case.n // 16 if case.falcon else case.more_bits(), "Q6_K"),
        (("IQ4_NL", "IQ4_XS"), lambda case: case.i < case.n // 8 and not case.has_importance, "Q5_K"),
        (("Q5_K_M",), _Case.more_bits, "Q6_K"),
        (("Q4_K_S",), lambda case: case.i < case.n // 8 and not case.falcon, "Q5_K"),
        (("Q4_0",), lambda case: case.i < case.n // 8 and case.has_importance, "Q4_1"),
        (("Q5_0",), lambda case: case.i < case.n // 8 and case.has_importance, "Q5_1"),
    ),
    "embedding": ((("TQ1_0", "TQ2_0"), _always, "Q4_K"),),
}


@dataclass(frozen=True)
class Override:
    """Tensors whose names hold the regular expression `pattern` get the block type `type`."""

    pattern: re.Pattern[str]
    type: str

    @classmethod
    def parse(cls, text: str) -> Override:
        """From PATTERN=TYPE.

        Raises
        ------
        UnsupportedError
            There is no such type.
        Error
            There is no "=", or the pattern isn't a regular expression.
        """
        pattern, equals, type = text.rpartition("=")
        if not equals or not pattern:
            raise Error(f"{text!r}: expected PATTERN=TYPE, such as ffn_down=q6_k")
        try:
            return cls(re.compile(pattern), block_type(type.upper()).name)
        except (re.error, RecursionError, OverflowError) as error:
            raise Error(f"{shorten(pattern)} is no regular expression: {error}") from None


def file_type(name: str, copy: bool = True) -> str:
    """The file type of a name in any case; COPY counts as one where there is something to copy.

    Raises
    ------
    UnsupportedError
        There is none; the message lists those there are.
    """
    upper = name.upper()
    found = _ALIASES.get(upper, upper)
    known = (*FILE_TYPES, COPY) if copy else tuple(FILE_TYPES)
    if found in _ONLY_RUN:
        raise UnsupportedError(
            f"{found}: ggpy runs such files, but has no encoder for their blocks; IQ4_XS, Q3_K_S, Q2_K can be made"
        )
    if found not in known:
        raise UnsupportedError(f"unknown file type {name!r}; known are {', '.join(known)}")
    return found


def tensor_types(
    file: ModelFacts, type: str, has_importance: bool = False, overrides: Iterable[Override] = ()
) -> dict[str, str]:
    """The block type of each tensor.

    Parameters
    ----------
    file : GGUFFile or ModelFacts
        The model.
    type : str
        A name of `FILE_TYPES`, or COPY.
    has_importance : bool
        Whether there is an importance matrix: some rules depend on it.
    overrides : iterable of Override
        The first that matches a matrix's name is taken instead of the rules. Vectors and other tensors that are never
        quantized keep their types all the same.

    Returns
    -------
    dict
        Tensor's name -> block type, in the file's order.

    Raises
    ------
    UnsupportedError
        There is no such file type.
    Error
        A tensor's layer is beyond the model's.
    """
    type = file_type(type)
    overrides = tuple(overrides)
    model = _Model(file, type, has_importance)
    chosen = {name: tensor.type for name, tensor in file.tensors.items()}
    # In llama.cpp's order, on which the rules' counts depend: those of no layer first.
    for name in sorted(file.tensors, key=lambda name: (_layer(name), name.encode())):
        tensor = file.tensors[name]
        if not _is_quantized(tensor):
            continue
        override = next((o for o in overrides if o.pattern.search(name)), None)
        if override is not None:
            chosen[name] = _fitting(tensor, override.type)
        elif type != COPY:
            chosen[name] = _fitting(tensor, model.block_type(tensor))
    return chosen


def check_without_importance(name: str, block_type: str, file_type: str) -> None:
    """Refuses a tensor that is useless without an importance matrix, by llama.cpp's experience.

    Raises
    ------
    Error
    """
    if file_type == "Q2_K_S" and block_type == "Q2_K" and _kind(name) not in ("output", "embedding"):
        raise Error(f"{name}: {file_type} is useless without an importance matrix (--imatrix) for this tensor")


class _Model:
    """The facts and counts of a model that the rules ask for."""

    def __init__(self, file: ModelFacts, type: str, has_importance: bool) -> None:
        self.type = type
        self.tied = "output.weight" not in file.tensors
        self.arch = file.get("general.architecture", (str,), "")
        self.n_layer = self._first_of(file, "block_count")
        n_head, n_head_kv = self._first_of(file, "attention.head_count"), self._first_of(file, "attention.head_count_kv")
        n_head_kv = n_head if f"{self.arch}.attention.head_count_kv" not in file.metadata else n_head_kv
        self.n_group = n_head // n_head_kv if n_head_kv else 0
        self.n_expert = self._first_of(file, "expert_count")
        large = {"llama": n_head != n_head_kv, "qwen2": True, "deci": True, "olmo": True}
        self.is_70b = (self.n_layer == 80 and large.get(self.arch, False)) or (self.arch, self.n_layer) == ("jais2", 68)
        self.has_importance = has_importance
        self.done = {"attn_v": 0, "ffn_down": 0}
        self.total = {"attn_v": sum(_kind(name) == "attn_v" for name in file.tensors), "ffn_down": self.n_layer}

    def _first_of(self, file: ModelFacts, key: str) -> int:
        """An integer, or the first of an array; 0 where there is none."""
        value = file.get(f"{self.arch}.{key}", (int, np.ndarray), 0)
        return value if isinstance(value, int) else int(value[0]) if value.size else 0

    def block_type(self, tensor: TensorFacts) -> str:
        weights = FILE_TYPES[self.type].weights
        kind = _kind(tensor.name)
        if weights in ("F32", "F16", "BF16"):
            return weights
        if kind == "output" or (kind == "embedding" and self.tied):
            cut = tensor.shape[-1] % block_type(weights).block_size
            if weights in ("MXFP4", "Q8_0") or self.arch == "falcon" or cut:
                return "Q8_0"
            return "Q6_K"
        is_3d = len(tensor.shape) > 2 and tensor.shape[-3] > 1
        if weights == "MXFP4":
            expert = self.arch != "bailingmoe3" or kind in ("ffn", "ffn_down")
            return "MXFP4" if is_3d and expert else "Q8_0"
        case = _Case(
            *self._count(kind, tensor.name),
            n_group=self.n_group,
            n_expert=self.n_expert,
            falcon=self.arch == "falcon",
            has_importance=self.has_importance,
        )
        rules = _RULES.get(kind, ())
        found = next((found for types, condition, found in rules if self.type in types and condition(case)), "") or weights
        # With 80 layers eight heads share each of attn_v's: it is small, and more bits cost little.
        return "Q5_K" if kind == "attn_v" and self.is_70b and found in ("Q3_K", "Q4_K") else found

    def _count(self, kind: str, name: str) -> tuple[int, int]:
        """The number of this tensor among those of its kind, or its layer, and how many there are."""
        if kind not in self.done:
            return 0, 0
        i, n = self.done[kind], self.total[kind]
        self.done[kind] += 1
        if kind == "ffn_down" and self.n_expert > 1:
            i = _layer(name)
            if not 0 <= i < n:
                raise Error(f"tensor {name!r} is in layer {i}, but the model has {n}")
        return i, n


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _kind(name: str) -> str:
    for part, kind in _KINDS:
        if name == part[1:] if part.startswith("=") else part in name:
            return kind
    return ""


def _is_quantized(tensor: TensorFacts) -> bool:
    """Whether llama.cpp would quantize this tensor: a matrix of weights, or a stack of them."""
    is_matrix = any(size > 1 for size in tensor.shape[:-1])
    name = tensor.name
    return is_matrix and name.endswith("weight") and name not in _KEPT_NAMES and not any(part in name for part in _KEPT)


def _fitting(tensor: TensorFacts, type: str) -> str:
    """The type, or what takes its place for rows that can't be cut into its blocks."""
    n_cols = tensor.shape[-1]
    if n_cols % block_type(type).block_size:
        type = _FALLBACKS.get(type, type)
    return "F16" if n_cols % block_type(type).block_size else type


def sizes(file: ModelFacts, types: Mapping[str, str]) -> dict[str, int]:
    """Bytes of each tensor with the types given."""
    return {
        name: int(np.prod(tensor.shape[:-1], dtype=np.int64)) * block_type(types[name]).row_bytes(tensor.shape[-1])
        for name, tensor in file.tensors.items()
    }
