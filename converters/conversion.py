"""The conversion: plan everything, check what can be checked, then stream the tensors into the file."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from ggpy.errors import ConversionError, Error, UnsupportedError
from ggpy.file import writing_aside
from ggpy.quant import block_type

from . import deepseek2, llama, mixtral, olmoe, qwen
from .checkpoint import FILE_PATTERNS, Checkpoint, ComputedRows, Rows
from .family import Family
from .vocabulary import check_vocabulary, read_encoder, write_vocabulary

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mixtral.FAMILY, *qwen.FAMILIES, olmoe.FAMILY, deepseek2.FAMILY)

Progress = Callable[[int, int, str], None]

# Values converted at a time. Bounds memory: the encoders hold a few float32 copies of that many.
CHUNK_VALUES = 1 << 23


@dataclass(frozen=True)
class FileType:
    """Which block types a file's tensors get.

    Attributes
    ----------
    id : LlamaFileType
        The metadata's ``general.file_type``.
    weights : str
        Block type of the matrices.
    output : str
        Block type of the output matrix, or of the embeddings where they serve as one.
    """

    id: LlamaFileType
    weights: str
    output: str


# llama.cpp's mixes. Its Q4_0 files have the output matrix in Q6_K; Q8_0 stands in for it while Q6_K has no encoder here.
TYPES = {
    "f32": FileType(LlamaFileType.ALL_F32, "F32", "F32"),
    "f16": FileType(LlamaFileType.MOSTLY_F16, "F16", "F16"),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, "BF16", "BF16"),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, "Q8_0", "Q8_0"),
    "q4_0": FileType(LlamaFileType.MOSTLY_Q4_0, "Q4_0", "Q8_0"),
}

# Routers are small and decide much: llama.cpp keeps them, too, in float32.
ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")

# Largest magnitudes that the types' float16, or float16 scales, can hold.
LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}


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


@dataclass(frozen=True)
class Plan:
    """What a conversion writes.

    Attributes
    ----------
    path : Path
        The file.
    type : str
        A key of `TYPES`.
    metadata : dict
        GGUF's key-values.
    tensors : tuple of TensorPlan
    """

    path: Path
    type: str
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorPlan, ...] = field(repr=False)

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
) -> Plan:
    """Convert a Hugging Face checkpoint to a GGUF file.

    The file is written beside its place and moved there when whole; on any error nothing is left. Memory doesn't grow
    with the model. Before the weights, the tokenizer is rebuilt from what will be written and compared with the
    checkpoint's own.

    Parameters
    ----------
    source : str or path-like
        A checkpoint's folder (config.json, safetensors, a tokenizer), or a model's id on the Hugging Face hub.
    out : str or path-like
        The file to write; one that is there is replaced.
    type : str
        A key of `TYPES`. Norms, biases and routers stay float32; matrices whose rows a block type doesn't divide become
        float16.
    dry_run : bool
        Plan and check, but write nothing.
    progress : callable, optional
        ``progress(done_bytes, total_bytes, tensor_name)``, called after each chunk.

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
    if type not in TYPES:
        raise UnsupportedError(f"type {type!r}; known: {', '.join(TYPES)}")
    folder, hub_id = find_source(source)
    checkpoint = Checkpoint(folder)
    family = find_family(checkpoint)
    path = Path(out)
    encoder = read_encoder(checkpoint)
    tensors = plan_tensors(checkpoint, family, TYPES[type])
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, GGMLQuantizationType[tensor.type]
        )
    write_metadata(writer, checkpoint, family, TYPES[type], hub_id)
    plan = Plan(path, type, {key: value.value for key, value in writer.kv_data[0].items()}, tuple(tensors))
    if encoder is not None:
        check_vocabulary(plan.metadata, encoder)
    if not dry_run:
        write_file(plan, writer, progress)
    return plan


def find_source(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The checkpoint's folder, and the hub's id where it came from there.

    Raises
    ------
    ConversionError
        No such folder and not an id either, or the hub can't be reached or hasn't got it.
    """
    folder = Path(source)
    hub_id = str(source)
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise ConversionError(f"{folder}: not a checkpoint's folder")
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")) or hub_id.endswith("/"):
        raise ConversionError(f"{hub_id}: no such folder, nor an id of the form owner/model")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(FILE_PATTERNS))), hub_id
    except Exception as error:  # HTTP, network, cache and validation errors, which have no common base
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(f"{hub_id}: no such folder here, and the hub gave no such model: {reason}") from error


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of the checkpoint's architecture; UnsupportedError where there is none."""
    for family in FAMILIES:
        if checkpoint.architecture in family.checkpoints:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.checkpoints)
    raise UnsupportedError(f"{checkpoint.config.path}: architecture {checkpoint.architecture}; known: {known}")


def plan_tensors(checkpoint: Checkpoint, family: Family, types: FileType) -> list[TensorPlan]:
    """What the model's tensors are made of, checked against the shapes that config.json promises."""
    config = checkpoint.config
    names = gguf.get_tensor_name_map(family.arch, config.integer("num_hidden_layers"))
    shapes = family.shapes(config)
    sources: dict[str, Rows] = {}
    for source, rows in family.gather(checkpoint.tensors, config).items():
        path = checkpoint.tensors[rows.sources[0]].path
        if source.endswith(".rotary_emb.inv_freq"):
            continue  # old checkpoints store what config.json determines
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name == "output.weight" and name not in shapes:
            continue  # tied to the embeddings, yet stored
        if name is None or name not in shapes:
            raise ConversionError(
                f"{path}: tensor {rows.sources[0]} has no place in a {checkpoint.architecture} of this config.json"
            )
        if name in sources:
            raise ConversionError(f"{path}: tensors {source} and {sources[name].sources[0]} are both {name}")
        if rows.shape != shapes[name]:
            raise ConversionError(f"{path}: tensor {source} is {rows.shape}, config.json asks for {shapes[name]}")
        sources[name] = rows
    for name in shapes:
        if name not in sources:
            raise ConversionError(f"{checkpoint.folder}: no tensor for {name}")

    output = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    tensors = [
        _plan_tensor(name, family.transform(name, sources[name], config), types.output if name == output else types.weights)
        for name in shapes
    ]
    return [_plan_tensor(name, ComputedRows(values), "F32") for name, values in family.computed(config).items()] + tensors


def _plan_tensor(name: str, rows: Rows, wanted: str) -> TensorPlan:
    n_columns = rows.shape[-1]
    type_ = block_type(wanted)
    if len(rows.shape) == 1 or name.split(".")[-2] in ROUTERS:
        type_ = block_type("F32")
    elif n_columns % type_.block_size:
        type_ = block_type("F16")
    n_bytes = math.prod(rows.shape[:-1]) * type_.row_bytes(n_columns)
    return TensorPlan(name, rows.sources, rows.shape, type_.name, n_bytes, rows)


def write_metadata(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, family: Family, types: FileType, hub_id: str | None
) -> None:
    """Add all metadata, under the keys and with the types that llama.cpp's own converter uses."""
    n_all, n_shared, n_expert, expert_count = writer.get_total_parameter_count()
    try:
        general = gguf.Metadata.load(None, checkpoint.folder, None, n_all)
    except Exception as error:  # a model card's YAML can be broken in many ways
        raise ConversionError(f"{checkpoint.folder / 'README.md'}: its header can't be read: {error}") from error
    general.name = hub_id or general.name or checkpoint.folder.resolve().name
    general.size_label = general.size_label or gguf.size_label(n_all, n_shared, n_expert, expert_count)
    writer.add_type(gguf.GGUFType.MODEL)
    general.set_gguf_meta_model(writer)
    family.write_hparams(writer, checkpoint.config)
    writer.add_file_type(int(types.id))
    write_vocabulary(writer, checkpoint)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def write_file(plan: Plan, writer: gguf.GGUFWriter, progress: Progress | None = None) -> None:
    """Write the plan's file; `writer` holds its metadata and tensor infos."""
    done = 0
    try:
        free = shutil.disk_usage(plan.path.absolute().parent).free
        if free < plan.n_bytes:
            raise ConversionError(f"{plan.path}: needs {_megabytes(plan.n_bytes)}, the disk has {_megabytes(free)} left")
        with writing_aside(plan.path) as aside:
            with closing(writer):
                writer.write_header_to_file(aside)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            with aside.open("ab") as file:
                _pad(file, writer.data_alignment)
                for tensor in plan.tensors:
                    for chunk in encoded_chunks(tensor):
                        file.write(chunk.data)
                        done += chunk.nbytes
                        if progress is not None:
                            progress(done, plan.n_bytes, tensor.name)
                    _pad(file, writer.data_alignment)
    except KeyboardInterrupt:
        share = 100 * done // plan.n_bytes
        raise ConversionError(f"{plan.path}: interrupted at {share} %, nothing was kept") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"{plan.path}: no space left after {_megabytes(done)} of {_megabytes(plan.n_bytes)}, nothing was kept"
            ) from error
        raise ConversionError(f"{plan.path}: can't be written: {error.strerror or error}") from error
    except ConversionError:
        raise
    except Error as error:
        raise ConversionError(str(error)) from error


def encoded_chunks(tensor: TensorPlan) -> Iterator[np.ndarray]:
    """The tensor's bytes, some rows at a time: uint8 arrays.

    Raises
    ------
    ConversionError
        A value isn't finite or is too large for the type.
    """
    n_columns = tensor.shape[-1]
    n_rows = math.prod(tensor.shape[:-1])
    step = max(1, CHUNK_VALUES // n_columns)
    largest = LARGEST.get(tensor.type, math.inf)
    type_ = block_type(tensor.type)
    source = tensor.sources[0] if len(tensor.sources) == 1 else tensor.name
    for start in range(0, n_rows, step):
        values = tensor.rows.read(start, min(start + step, n_rows))
        # NaN is propagated by max and min: one pass each finds NaN, infinity and overflow.
        high, low = float(values.max()), float(values.min())
        if not (math.isfinite(high) and math.isfinite(low)):
            raise ConversionError(f"tensor {source}: holds NaN or infinity")
        if max(high, -low) > largest:
            raise ConversionError(f"tensor {source}: {max(high, -low):.4g} is too large for {tensor.type}; convert to bf16")
        yield type_.quantize(values)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
