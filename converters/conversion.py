"""The conversion: plan everything, check what can be checked, then stream the tensors into the file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from ggpy.cpus import default_threads
from ggpy.errors import ConversionError, Error, UnsupportedError
from ggpy.file import NewFile, write_files
from ggpy.kernels.build import Progress as KernelProgress
from ggpy.kernels.build import load
from ggpy.kernels.table import ENCODED
from ggpy.quant import block_type
from ggpy.quantization import FILE_TYPES, encode, tensor_types
from ggpy.quantization.mixes import check_without_importance, file_type, sizes
from ggpy.quantization.model import in_order

from . import (
    bert,
    decoders,
    deepseek2,
    falcon_h1,
    gemma,
    gemma4,
    gpts,
    granite,
    lfm2,
    llama,
    mamba2,
    mixtral,
    mixtures,
    modernbert,
    nemotron,
    nomic,
    olmoe,
    qwen,
    qwen35,
)
from .card import read_card
from .checkpoint import Checkpoint, ComputedRows, Rows
from .family import ROPE_OF_SOME, Family, refuse_unread, rope_parameters
from .lora import merge
from .pooling import write_pooling
from .quantized import BlockRows
from .text_part import take_text_part
from .vocabulary import check_vocabulary, read_encoder, write_vocabulary

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mixtral.FAMILY,
    *qwen.FAMILIES,
    olmoe.FAMILY,
    deepseek2.FAMILY,
    deepseek2.INDEXED,
    *decoders.FAMILIES,
    *gpts.FAMILIES,
    *gemma.FAMILIES,
    *mixtures.FAMILIES,
    gemma4.FAMILY,
    *qwen35.FAMILIES,
    *lfm2.FAMILIES,
    granite.FAMILY,
    nemotron.FAMILY,
    falcon_h1.FAMILY,
    mamba2.FAMILY,
    *bert.FAMILIES,
    nomic.FAMILY,
    *modernbert.FAMILIES,
)

Progress = Callable[[int, int, str], None]

# Values that a thread reads and encodes at a time. Bounds memory.
CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write.

    Attributes
    ----------
    name : str
        GGUF's name.
    sources : tuple of str
        The checkpoint's names; empty for a tensor that is computed.
    shape : tuple of int
        NumPy order.
    type : str
        Block type.
    n_bytes : int
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    rows: Rows = field(repr=False, compare=False)

    @property
    def as_stored(self) -> bool:
        """Whether the checkpoint's blocks are written, without being decoded."""
        return isinstance(self.rows, BlockRows) and self.rows.block_type == self.type


@dataclass(frozen=True)
class Plan:
    """What a conversion writes.

    Attributes
    ----------
    path : Path
        The file.
    type : str
        The file type, a key of `ggpy.quantization.FILE_TYPES`.
    metadata : dict
        GGUF's key-values.
    tensors : tuple of TensorPlan
    notes : tuple of str
        What a user should know: what was changed, left aside, or is lost in the form that GGUF has.
    """

    path: Path
    type: str
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorPlan, ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Size of all tensors; the file adds its header."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    dry_run: bool = False,
    progress: Progress | None = None,
    *,
    lora: Iterable[str | os.PathLike[str]] = (),
    n_threads: int | None = None,
    kernel_progress: KernelProgress | None = None,
) -> Plan:
    """Convert a Hugging Face checkpoint to a GGUF file.

    The file is written beside its place and moved there when whole; on any error nothing is left. It is the one that
    `quantize_model` makes of a conversion to F32, but neither disk nor memory is taken for more than the result. Weights
    that are quantized already are dequantized; those in blocks that GGUF has (gpt-oss' experts, MXFP4) stay so, unless the
    type asked for is F32 or takes fewer bytes. Before the weights, the tokenizer is rebuilt from what will be written and
    compared with the checkpoint's own.

    Parameters
    ----------
    source : str or path-like
        A checkpoint's folder (config.json, safetensors, a tokenizer), or a model's id on the Hugging Face hub.
    out : str or path-like
        The file to write; one that is there is replaced.
    type : str
        A name of `ggpy.quantization.FILE_TYPES` in any case, such as q8_0 or q4_k_m; which tensor gets which block type:
        `ggpy.quantization.tensor_types`.
    dry_run : bool
        Plan and check, but write nothing.
    progress : callable, optional
        ``progress(done_bytes, total_bytes, tensor_name)``, called after each chunk.
    lora : iterable of str or path-like
        Folders of LoRA adapters, as PEFT saves them, that are merged into the weights; FOLDER:0.5 multiplies one by 0.5.
    n_threads : int, optional
        Default: the physical cores.
    kernel_progress : callable, optional
        Told of encoders that must be compiled first; see `ggpy.kernels.build.load`.

    Returns
    -------
    Plan

    Raises
    ------
    ConversionError
        The checkpoint can't be converted or the file can't be written; names the file or the tensor.
    UnsupportedError
        An architecture, type or tokenizer without code here.
    """
    type = file_type(type, copy=False)
    folder, hub_id = find_source(source)
    checkpoint = Checkpoint(folder)
    if not any(checkpoint.architecture in family.checkpoints for family in FAMILIES):
        take_text_part(checkpoint)
    family = find_family(checkpoint)
    family = family.special(checkpoint, family)
    checkpoint.config.defaults = family.defaults.get(checkpoint.architecture, {})
    checkpoint.config = checkpoint.config.replaced(**family.usual(checkpoint.config))
    merge(checkpoint, lora)
    path = Path(out)
    encoder = read_encoder(checkpoint)
    tensors = plan_tensors(checkpoint, family, type)
    writer = gguf.GGUFWriter(None, family.name)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, GGMLQuantizationType[tensor.type]
        )
    write_metadata(writer, checkpoint, family, type, hub_id)
    refuse_unread(checkpoint.config)
    if rope_parameters(checkpoint.config, *ROPE_OF_SOME).get("rope_type") == "dynamic":
        checkpoint.notes.append(
            f"{checkpoint.config.path}: dynamic rope scaling begins beyond the context and isn't written"
        )
    metadata = _values(writer)
    if family.name == "olmo2" and "olmo2.rope.freq_base_swa" in metadata:
        checkpoint.notes.append(
            f"{checkpoint.config.path}: layers with windows have a rope_theta of their own, which llama.cpp doesn't read"
        )
    if encoder is not None:
        checkpoint.notes += check_vocabulary(metadata, encoder)
    plan = Plan(path, type, metadata, tuple(tensors), tuple(checkpoint.notes))
    if not dry_run:
        encoded = {tensor.type for tensor in tensors if not tensor.as_stored}
        load([f"encode_{name}" for name in ENCODED if name in encoded], kernel_progress)
        n_threads = n_threads or default_threads()
        data = [(tensor.name, partial(encoded_chunks, tensor, n_threads)) for tensor in tensors]
        try:
            write_files([NewFile(path, writer, data)], path, plan.n_bytes, progress)
        except ConversionError:
            raise
        except Error as error:
            raise ConversionError(str(error)) from error
    return plan


def _values(writer: gguf.GGUFWriter) -> dict[str, Any]:
    return {key: value.value for key, value in writer.kv_data[0].items()}


def find_source(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The checkpoint's folder, and the hub's id where it came from there.

    Raises
    ------
    ConversionError
        No such folder and not an id either, or the hub can't be reached or hasn't got it.
    """
    from ggpy.hub import fetch_checkpoint, name_of_snapshot

    folder = Path(source)
    hub_id = str(source)
    if folder.is_dir():
        return folder, name_of_snapshot(folder)
    if folder.is_file():
        with folder.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        what = "a GGUF file already; 'ggpy quantize' makes other types of it" if is_gguf else "a file; name its folder"
        raise ConversionError(f"{folder}: not a checkpoint's folder, but {what}")
    if folder.exists():
        raise ConversionError(f"{folder}: not a checkpoint's folder")
    try:
        fetched = fetch_checkpoint(hub_id)
    except Error as error:
        raise ConversionError(f"{hub_id}: no such folder here; {error}") from error
    if fetched is None:
        raise ConversionError(f"{hub_id}: no such folder, nor a name like owner/model")
    return find_source(fetched)


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of the checkpoint's architecture; UnsupportedError where there is none."""
    for family in FAMILIES:
        if checkpoint.architecture in family.checkpoints:
            return replace(family, arch=family.arch_of(checkpoint.config)) if family.arch_of else family
    known = ", ".join(name for family in FAMILIES for name in family.checkpoints)
    raise UnsupportedError(f"{checkpoint.config.path}: architecture {checkpoint.architecture}; known: {known}")


class _Described(NamedTuple):
    """A tensor as the rules of mixes see it."""

    name: str
    shape: tuple[int, ...]
    type: str = "F32"


@dataclass(frozen=True)
class _Model:
    """The model as the rules of mixes see it (implements `ggpy.quantization.mixes.ModelFacts`)."""

    metadata: dict[str, Any]
    tensors: dict[str, _Described]

    def get(self, key: str, kind: tuple[type, ...], default: Any) -> Any:
        value = self.metadata.get(key, default)
        return np.asarray(value) if isinstance(value, list) else value


def plan_tensors(checkpoint: Checkpoint, family: Family, type: str) -> list[TensorPlan]:
    """What the model's tensors are made of, checked against the shapes that config.json promises."""
    config = checkpoint.config
    n_layer, folder = config.integer("num_hidden_layers"), checkpoint.folder
    if n_layer > len(checkpoint.tensors):  # before anything is made for each layer
        raise ConversionError(f"{config.path}: num_hidden_layers {n_layer}, of {len(checkpoint.tensors)} tensors in all")
    shapes = family.shapes(config)
    n_blocks = max((int(name.split(".")[1]) + 1 for name in shapes if name.startswith("blk.")), default=n_layer)
    names = gguf.get_tensor_name_map(family.arch, n_blocks)
    sources: dict[str, Rows] = {}
    gathered = family.gather(checkpoint.tensors, config)
    checkpoint.refuse_quantized(gathered)
    for source, rows in gathered.items():
        if source.endswith(".rotary_emb.inv_freq"):
            continue  # old checkpoints store what config.json determines
        name = source if source in shapes else names.get_name(source, try_suffixes=(".weight", ".bias", ".scale"))
        stored = rows.sources[0]
        if name is None or (name not in shapes and name != "output.weight"):
            raise ConversionError(
                f"{folder}: tensor {stored} has no place in a {checkpoint.architecture} of this config.json"
            )
        if name in sources:
            raise ConversionError(f"{folder}: tensors {source} and {sources[name].sources[0]} are both {name}")
        if rows.shape != shapes.get(name, rows.shape):
            raise ConversionError(f"{folder}: tensor {source} is {rows.shape}, config.json asks for {shapes[name]}")
        sources[name] = rows
    if "output.weight" in sources and "output.weight" not in shapes:
        if _equal(sources["output.weight"], sources["token_embd.weight"]):
            del sources["output.weight"]
        else:
            head = sources["output.weight"]
            if head.shape != shapes["token_embd.weight"]:
                raise ConversionError(f"{folder}: tensor {head.sources[0]} is {head.shape}, other than the embeddings")
            shapes["output.weight"] = head.shape
            checkpoint.notes.append(
                f"{config.path}: tie_word_embeddings is true, but {head.sources[0]} isn't the embeddings: it is kept"
            )
    for name in shapes:
        if name not in sources:
            why = ""
            if name == "output.weight":
                why = " (lm_head.weight); config.json's tie_word_embeddings isn't true, which would do without"
            raise ConversionError(f"{folder}: no tensor for {name}{why}")

    rows_of: dict[str, Rows] = {name: ComputedRows(values) for name, values in family.computed(config).items()}
    rows_of |= {name: family.transform(name, sources[name], config) for name in shapes}
    hparams = gguf.GGUFWriter(None, family.name)
    family.write_hparams(hparams, config)
    model = _Model(_values(hparams), {name: _Described(name, rows.shape) for name, rows in rows_of.items()})
    types = tensor_types(model, type)
    kept = _as_stored(rows_of, types)
    if checkpoint.quantized:
        checkpoint.notes.append(
            f"{folder}: weights were quantized ({', '.join(checkpoint.quantized)}): "
            + (f"{len(kept)} tensors keep their blocks, others " if kept else "they ")
            + f"are dequantized and encoded as {type}"
        )
    types |= kept
    n_bytes = sizes(model, types)
    for name, chosen in types.items():
        check_without_importance(name, chosen, type)
    return [TensorPlan(name, r.sources, r.shape, types[name], n_bytes[name], r) for name, r in rows_of.items()]


def _as_stored(rows_of: Mapping[str, Rows], types: Mapping[str, str]) -> dict[str, str]:
    """The types of tensors whose blocks are written as the checkpoint has them: more bytes would say nothing more.

    F32 counts as asking for the values themselves.
    """
    return {
        name: rows.block_type
        for name, rows in rows_of.items()
        if isinstance(rows, BlockRows)
        and types[name] != "F32"
        and _row_bytes(types[name], rows) >= _row_bytes(rows.block_type, rows)
    }


def _row_bytes(type: str, rows: Rows) -> int:
    return block_type(type).row_bytes(rows.shape[-1])


def _equal(a: Rows, b: Rows) -> bool:
    """Whether two tensors have the same values."""
    if a.shape != b.shape:
        return False
    n_rows, step = math.prod(a.shape[:-1]), max(1, CHUNK_VALUES // a.shape[-1])
    parts = ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))
    return all(np.array_equal(a.read(*part), b.read(*part), equal_nan=True) for part in parts)


def write_metadata(writer: gguf.GGUFWriter, checkpoint: Checkpoint, family: Family, type: str, hub_id: str | None) -> None:
    """Add all metadata, under the keys and with the types that llama.cpp's own converter uses."""
    n_all, n_shared, n_expert, expert_count = writer.get_total_parameter_count()
    general = read_card(checkpoint, n_all)
    general.name = hub_id or general.name or checkpoint.folder.resolve().name
    general.size_label = general.size_label or gguf.size_label(n_all, n_shared, n_expert, expert_count)
    writer.add_type(gguf.GGUFType.MODEL)
    general.set_gguf_meta_model(writer)
    family.write_hparams(writer, checkpoint.config)
    write_pooling(writer, checkpoint)
    write_vocabulary(writer, checkpoint)
    # Last, and in this order, as quantize_model has them.
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[type].id)


def encoded_chunks(tensor: TensorPlan, n_threads: int) -> Generator[np.ndarray, None, None]:
    """The tensor's bytes, some rows at a time: uint8 arrays. The encoder must be loaded.

    Raises
    ------
    ConversionError
        A value isn't finite or is too large for the type.
    """
    n_rows = math.prod(tensor.shape[:-1])
    step = max(1, CHUNK_VALUES // tensor.shape[-1])
    source = tensor.sources[0] if len(tensor.sources) == 1 else tensor.name

    def rows(start: int) -> np.ndarray:
        if isinstance(tensor.rows, BlockRows) and tensor.as_stored:
            return tensor.rows.read_blocks(start, min(start + step, n_rows))
        values = tensor.rows.read(start, min(start + step, n_rows))
        try:
            return encode(values, tensor.type, first_row=start)
        except Error as error:
            raise ConversionError(f"tensor {source}: {error}") from None

    return in_order((partial(rows, start) for start in range(0, n_rows, step)), n_threads)
