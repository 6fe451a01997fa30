"""What families with experts share: GGUF keeps a matrix of all experts of a layer as one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Config, PickedRows, Rows, StackedRows, shown
from .family import Shapes, ffn_shapes

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")

# Mixtral's names.
MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def n_experts(config: Config) -> int:
    """How many experts a layer has that a router chooses from."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return config.integer(next((key for key in keys if config.get(key) is not None), keys[0]))


def leading_dense(config: Config) -> int:
    """How many layers, the first ones, have no experts.

    Raises
    ------
    UnsupportedError
        Other layers have none, either.
    """
    kinds, n_layer = config.get("mlp_layer_types"), config.integer("num_hidden_layers")
    n = config.integer("first_k_dense_replace", 0, least=0)
    if kinds is None:
        return n
    n = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else n_layer
    if kinds != ["dense"] * n + ["sparse"] * (n_layer - n):
        raise UnsupportedError(f"{config.path}: mlp_layer_types {shown(kinds)}; known: dense ones, then sparse ones")
    return n


def write_expert_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_expert_count(n_experts(config))
    writer.add_expert_used_count(config.integer("num_experts_per_tok"))


def expert_shapes(config: Config, n_ff: int) -> Shapes:
    """The router and the experts of a layer; experts along the first axis."""
    n_embd, n = config.integer("hidden_size"), n_experts(config)
    experts = {name: (n, *shape) for name, shape in ffn_shapes(n_embd, n_ff, "_exps").items()}
    return {"ffn_gate_inp.weight": (n, n_embd), **experts}


def gather_experts(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Stack the experts' matrices; the tensors come in either form that transformers has.

    Files have a matrix per expert, ``experts.7.gate_proj.weight``. In memory, and in files that were saved as they are
    in memory, all experts are one tensor: ``experts.down_proj``, and ``experts.gate_up_proj``, each expert's gate
    followed by its up.

    Raises
    ------
    ConversionError
        Experts are missing, or of different shapes.
    """
    gathered: dict[str, Rows] = {}
    experts: dict[str, dict[int, Rows]] = {}
    for source, rows in tensors.items():
        name = source.replace(".block_sparse_moe.", ".mlp.")
        if match := EXPERT.fullmatch(name):
            matrix = f"{match[1]}.{MATRICES.get(match[3], match[3])}.weight"
            experts.setdefault(matrix, {})[int(match[2])] = rows
        elif name.endswith(".experts.gate_up_proj") and len(rows.shape) == 3:
            n, n_both, n_embd = rows.shape
            order = np.arange(n * n_both).reshape(n, 2, -1)
            for i, part in enumerate(("gate_proj", "up_proj")):
                picked = PickedRows(rows, order[:, i].reshape(-1), (n, n_both // 2, n_embd))
                gathered[name.replace("gate_up_proj", f"{part}.weight")] = picked
        elif name.endswith(".experts.down_proj"):
            gathered[f"{name}.weight"] = rows
        else:
            gathered[name] = rows
    for name, parts in experts.items():
        n, shapes = n_experts(config), {rows.shape for rows in parts.values()}
        if len(parts) != n or max(parts) >= n:
            found = _ranges(sorted(parts))
            raise ConversionError(f"{config.path.parent}: {name} of experts {found}; config.json asks for {n}, 0-{n - 1}")
        if len(shapes) > 1:
            raise ConversionError(f"{config.path.parent}: {name} is of different shapes: {sorted(shapes)}")
        gathered[name] = StackedRows(tuple(parts[i] for i in range(n)))
    return gathered


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    starts = [i for i in numbers if i - 1 not in numbers]
    stops = [i for i in numbers if i + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
