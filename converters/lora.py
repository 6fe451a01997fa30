"""LoRA adapters (Hu et al. 2021) as PEFT saves them: read, and merged into a checkpoint's matrices.

A matrix W becomes W + scale · B A, with two thin matrices A (rank, n_in) and B (n_out, rank). The rules of names, scales
and ranks are PEFT's (tuners/lora/model.py and layer.py); what an adapter says beyond them is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError
from ggpy.file import GGUFFile
from ggpy.models.adapters import ThinPair, checked_pair, path_and_scale

from .checkpoint import (
    FLOAT_TYPES,
    Checkpoint,
    ComputedRows,
    Config,
    PickedRows,
    Rows,
    StoredRows,
    read_json,
    read_safetensors,
    shown,
)
from .family import refuse_unread

CONFIG, FILE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MERGE = "merge it at conversion (--lora)"
PART = re.compile(r"(.+)\.lora_(?:(embedding_)?([AB])(?:\.weight)?|(magnitude)_vector(?:\.weight)?)")

# What says nothing of the weights: where an adapter comes from, how it was made and which modules it was put on, which its
# tensors show.
HARMLESS = (
    *(
        "base_model_name_or_path",
        "revision",
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "target_modules",
    ),
    *("exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config"),
    *("eva_config", "runtime_config", "qalora_group_size", "modules_to_save", "bias", "use_dora", "fan_in_fan_out"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),  # which matrices ask for, if there are any
)
# Ways of beginning that leave the model's own weights alone.
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
# Regular expressions that take no time: few repetitions, none inside another.
PLAIN = re.compile(r"[\w.\\|^$*+-]{1,200}")


@dataclass(frozen=True)
class Pair:
    """What is added to a module's matrix: ``b @ a``, the scale in `b`.

    Attributes
    ----------
    a, b : numpy.ndarray
        float32, (rank, n_in) and (n_out, rank).
    magnitude : numpy.ndarray or None
        DoRA's (Liu et al. 2024) lengths of the rows of the sum, (n_out,).
    embedding : bool
        Whether the matrix is an embedding's, which is transposed.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder.

    Attributes
    ----------
    folder : Path
    pairs : dict of str to Pair
        By module, such as ``model.layers.0.self_attn.q_proj``.
    whole : dict of str to StoredRows
        Tensors that take the place of the model's, by name: biases, and modules that were trained as a whole.
    copies : dict of str to StoredRows
        The model's own embeddings and output matrix, which PEFT saves beside what is added to them.
    """

    folder: Path
    pairs: dict[str, Pair]
    whole: dict[str, StoredRows]
    copies: dict[str, StoredRows]


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path, scale: float = 1.0) -> Adapter:
    """An adapter's matrices, times a scale beside its own.

    Raises
    ------
    ConversionError
        A file is missing or damaged, or half of a pair.
    UnsupportedError
        Another kind of adapter, or a setting that isn't known.
    """
    from .pickled import read_pickled

    if not is_adapter(folder):
        raise ConversionError(f"{folder}: not an adapter's folder: it has no {CONFIG}")
    config = Config(read_json(folder / CONFIG), folder / CONFIG)
    config.only("peft_type", "LORA")
    if config.get("init_lora_weights", True) not in BEGINNINGS:
        raise UnsupportedError(
            f"{config.path}: init_lora_weights {shown(config.get('init_lora_weights'))} changes the model's own weights; "
            "save the adapter as a difference to the model (PEFT's path_initial_model_for_weight_conversion)"
        )
    path = folder / FILE if (folder / FILE).exists() else folder / PICKLED
    tensors = read_safetensors(path) if path.name == FILE else read_pickled(path)
    parts: dict[str, dict[str, StoredRows]] = {}
    whole: dict[str, StoredRows] = {}
    embeddings = set()
    for stored, rows in tensors.items():
        name = stored.removeprefix(PREFIX)
        if rows.dtype not in FLOAT_TYPES or (".lora_" in name and not PART.fullmatch(name)):
            raise UnsupportedError(f"{path}: tensor {stored} of type {rows.dtype} isn't understood")
        if match := PART.fullmatch(name):
            parts.setdefault(match[1], {})[match[3] or match[4]] = rows
            embeddings |= {match[1]} if match[2] else set()
        else:
            whole[name] = rows
    pairs = {module: _pair(path, config, module, found, scale, module in embeddings) for module, found in parts.items()}
    if not pairs and not whole:
        raise ConversionError(f"{path}: has no tensors")
    config.asked |= set(HARMLESS)
    refuse_unread(config)
    copies = {name.replace(".base_layer.", "."): rows for name, rows in whole.items() if ".base_layer." in name}
    whole = {name: rows for name, rows in whole.items() if ".base_layer." not in name}
    return Adapter(folder, pairs, whole, copies)


def _pair(path: Path, config: Config, module: str, parts: Mapping[str, StoredRows], scale: float, embedding: bool) -> Pair:
    where = f"{path}: {module}"
    if not {"A", "B"} <= parts.keys():
        raise ConversionError(f"{where} has only one of lora_A and lora_B")
    a, b = parts["A"], parts["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise UnsupportedError(f"{where}: lora_A is {a.shape} and lora_B {b.shape}; known: matrices of one rank")
    rank, said = a.shape[0], _of_pattern(config, "rank_pattern", "r", 8, module)
    if rank != said:
        raise ConversionError(f"{where} has rank {rank}, {config.path.name} says {said:g}")
    scale *= _of_pattern(config, "alpha_pattern", "lora_alpha", 8, module)
    scale /= math.sqrt(rank) if config.get("use_rslora") else rank
    magnitude = parts["magnitude"].read(0, 1)[0] if "magnitude" in parts else None
    if bool(config.get("use_dora")) != (magnitude is not None) or (
        magnitude is not None and magnitude.shape != b.shape[:1]
    ):
        raise ConversionError(f"{where}: use_dora and the tensors don't agree")
    return Pair(a.read(0, rank), b.read(0, b.shape[0]) * np.float32(scale), magnitude, embedding)


def _of_pattern(config: Config, patterns: str, key: str, default: float, module: str) -> float:
    """The setting `key`, or what the first of `patterns` that the module's name ends with says."""
    values = config.get(patterns) or {}
    if not isinstance(values, dict):
        raise ConversionError(f"{config.path}: {patterns} is not an object")
    for pattern in values:
        if not PLAIN.fullmatch(pattern) or sum(map(pattern.count, "*+")) > 3:
            raise UnsupportedError(f"{config.path}: {patterns}' {shown(pattern)} is too complex")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return Config(values, config.path).number(pattern, least=1e-30)
        except re.error as error:
            raise ConversionError(f"{config.path}: {patterns}' {shown(pattern)}: {error}") from None
    return config.number(key, default, least=1e-30)


@dataclass(frozen=True)
class MergedRows:
    """A matrix with an adapter added (implements `Rows`)."""

    rows: Rows
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    @property
    def sources(self) -> tuple[str, ...]:
        return self.rows.sources

    def read(self, start: int, stop: int) -> np.ndarray:
        values = self.rows.read(start, stop) + self.b[start:stop].astype(np.float64) @ self.a.astype(np.float64)
        if self.magnitude is not None:
            values *= (self.magnitude[start:stop] / np.linalg.norm(values, axis=1))[:, None]
        return values.astype(np.float32)


def merge(checkpoint: Checkpoint, adapters: Iterable[str | os.PathLike[str]]) -> None:
    """Add adapters to a checkpoint's matrices, one after the other.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its tensors are replaced, and its notes say so.
    adapters : iterable of str or path-like
        PEFT's folders; FOLDER:0.5 multiplies by 0.5.

    Raises
    ------
    ConversionError
        An adapter is damaged, or another model's.
    UnsupportedError
        It is of a kind that isn't known.
    """
    for text in adapters:
        path, scale = path_and_scale(text)
        adapter = read_adapter(path, scale)
        tensors = dict(checkpoint.tensors)
        if adapter.whole and scale != 1:
            raise UnsupportedError(
                f"{path}: holds {next(iter(adapter.whole))} as a whole, which can't be scaled by {scale:g}"
            )
        for name, rows in (adapter.whole | adapter.copies).items():
            tensors[name if name == "lm_head.weight" else _place(checkpoint, adapter, name)] = rows
        for module, pair in adapter.pairs.items():
            name = _place(checkpoint, adapter, f"{module}.weight")
            tensors[name] = _merged(adapter, module, pair, tensors[name], checkpoint)
        checkpoint.tensors = tensors
        also = f", and {len(adapter.whole)} tensors taken from it" if adapter.whole else ""
        checkpoint.notes.append(f"{path}: LoRA of {len(adapter.pairs)} matrices merged, times {scale:g}{also}")


def _place(checkpoint: Checkpoint, adapter: Adapter, name: str) -> str:
    """The checkpoint's name of a tensor that PEFT calls `name`, as the model's class in memory does: the same, or the only
    one that ends alike from the layer on."""
    if name in checkpoint.tensors:
        return name
    tail = re.search(r"(?:^|\.)(\w+\.\d+\..+)", name)
    found = [other for other in checkpoint.tensors if tail and f".{other}".endswith(f".{tail[1]}")]
    if len(found) != 1:
        raise ConversionError(f"{adapter.folder}: an adapter of another model: {checkpoint.folder} has no tensor {name}")
    return found[0]


def _merged(adapter: Adapter, module: str, pair: Pair, rows: Rows, checkpoint: Checkpoint) -> MergedRows:
    # GPT-2's matrices are transposed, as embeddings are.
    transposed = pair.embedding or (checkpoint.architecture == "GPT2LMHeadModel" and module != "lm_head")
    b, a = (pair.a.T, pair.b.T) if transposed else (pair.b, pair.a)
    if rows.shape != (b.shape[0], a.shape[1]):
        shape = (b.shape[0], a.shape[1])
        raise ConversionError(
            f"{adapter.folder}: an adapter of another model: {module} is {shape}, the model's {rows.shape}"
        )
    if transposed and pair.magnitude is not None:
        raise UnsupportedError(f"{adapter.folder}: DoRA of {module}, whose matrix is transposed")
    if pair.embedding and checkpoint.config.get("tie_word_embeddings") and "lm_head.weight" not in checkpoint.tensors:
        raise UnsupportedError(f"{adapter.folder}: {module} is adapted, and logits are made of the same matrix, unadapted")
    return MergedRows(rows, a, b, pair.magnitude)


# What converters ask of config.json to order a matrix's rows, and GGUF's names for it.
SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
}


def thin_pairs(folder: Path, model: GGUFFile, scale: float = 1.0) -> dict[str, ThinPair]:
    """What an adapter adds to the matrices of a model's GGUF file, left as thin matrices.

    Parameters
    ----------
    folder : Path
        PEFT's.
    model : GGUFFile
        Of an architecture whose matrices have the checkpoint's rows, in whatever order.
    scale : float

    Returns
    -------
    dict of str to ThinPair
        By GGUF's names.

    Raises
    ------
    Error
        See `read_adapter`; or the adapter can only be merged.
    """
    from .conversion import FAMILIES

    adapter = read_adapter(folder, scale)
    arch = model.get("general.architecture", str)
    family = next((f for f in FAMILIES if gguf.MODEL_ARCH_NAMES[f.arch] == arch), None)
    values = {key: model.get(f"{arch}.{name}", (int, np.ndarray), None) for key, name in SIZES.items()}
    config = Config({key: value for key, value in values.items() if isinstance(value, int)}, Path(model.path))
    whole = [*adapter.whole, *(m for m, pair in adapter.pairs.items() if pair.embedding or pair.magnitude is not None)]
    if family is None or whole:
        raise UnsupportedError(f"{folder}: {whole[0] if whole else arch} can't be adapted while running; {MERGE}")
    halves = {f"{module}.weight": ComputedRows(pair.b) for module, pair in adapter.pairs.items()}
    of = {id(halves[f"{module}.weight"]): pair for module, pair in adapter.pairs.items()}
    try:
        gathered = family.gather(halves, config)
        names = gguf.get_tensor_name_map(family.arch, config.integer("num_hidden_layers"))
        placed = {names.get_name(name, try_suffixes=(".weight",)) or name: rows for name, rows in gathered.items()}
        changed = {name: family.transform(name, rows, config) for name, rows in placed.items()}
    except (KeyError, IndexError, ValueError, ConversionError) as error:
        raise UnsupportedError(f"{folder}: the file alone doesn't say where its matrices go ({error}); {MERGE}") from None
    pairs = {}
    for name, rows in changed.items():
        inner = rows
        while isinstance(inner, PickedRows) and len(inner.shape) == 2:  # rows in another order
            inner = inner.rows
        pair = of.get(id(inner))
        if pair is None:
            raise UnsupportedError(f"{folder}: {name} is more than rows of the checkpoint's matrix; {MERGE}")
        pairs[name] = checked_pair(str(folder), model, name, pair.a, rows.read(0, rows.shape[0]))
    return pairs
