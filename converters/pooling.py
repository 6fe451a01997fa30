"""What a folder of sentence-transformers says of how tokens' vectors become one."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Checkpoint, Config, Rows, read_safetensors, shown
from .family import Family
from .ranking import RERANKERS

#: architectures whose pooled vectors may be multiplied by matrices
PROJECTED = ("Gemma3TextModel",)

_POOLINGS = {
    "cls": gguf.PoolingType.CLS,
    "cls_token": gguf.PoolingType.CLS,
    "mean": gguf.PoolingType.MEAN,
    "mean_tokens": gguf.PoolingType.MEAN,
    "lasttoken": gguf.PoolingType.LAST,
}


def write_pooling(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add ``{arch}.pooling_type``, if modules.json says how vectors are pooled. Whether they are normalized is the reader's
    choice.

    Raises
    ------
    ConversionError
        A broken modules.json or config.json of a module.
    UnsupportedError
        A kind of pooling or a module that GGUF can't say, such as a matrix behind the pooling.
    """
    written = {"LogitScore": RERANKERS, "Dense": PROJECTED}  # by `as_reranker` and `with_projections`
    for kind, where in _modules(checkpoint):
        if kind == "Pooling":
            writer.add_pooling_type(_pooling(checkpoint, f"{where}/config.json"))
        elif kind not in ("Transformer", "Normalize") and checkpoint.architecture not in written.get(kind, ()):
            raise UnsupportedError(
                f"{checkpoint.folder / 'modules.json'}: a module {kind}; known: Transformer, Pooling, Normalize"
            )


def _modules(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The kinds and folders of what modules.json names."""
    path, text = checkpoint.folder / "modules.json", checkpoint.text("modules.json")
    try:
        modules = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not a JSON file: {error}") from error
    for module in modules if isinstance(modules, list) else [modules]:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise ConversionError(f"{path}: {shown(module)} is no module")
    return [(module["type"].rpartition(".")[2], str(module.get("path") or "")) for module in modules]


def with_projections(checkpoint: Checkpoint, family: Family) -> Family:
    """The family with the matrices that pooled vectors are multiplied by: EmbeddingGemma has two, of which the second one
    gives vectors of the model's own length.

    Raises
    ------
    ConversionError
        A matrix isn't there.
    UnsupportedError
        Others than two, of other lengths, with an activation or a bias.
    """
    folders = [where for kind, where in _modules(checkpoint) if kind == "Dense"]
    if not folders:
        return family
    found: dict[str, Rows] = {}
    n_embd = checkpoint.config.integer("hidden_size")
    for name, where in zip(("dense_2", "dense_3"), folders, strict=False):
        path, settings = checkpoint.folder / where / "config.json", checkpoint.json(f"{where}/config.json")
        activation = settings.get("activation_function", "")
        if settings.get("bias") or not str(activation).endswith("Identity"):
            raise UnsupportedError(f"{path}: a matrix with a bias, or activation {shown(activation)}; known: Identity")
        rows = read_safetensors(path.with_name("model.safetensors")).get("linear.weight")
        if rows is None:
            raise ConversionError(f"{path.with_name('model.safetensors')}: no tensor linear.weight")
        found[f"{name}.weight"] = rows
    shapes = {name: rows.shape for name, rows in found.items()}
    n = next(iter(shapes.values()))[0]
    if len(folders) != 2 or shapes != {"dense_2.weight": (n, n_embd), "dense_3.weight": (n_embd, n)}:
        raise UnsupportedError(
            f"{checkpoint.folder / 'modules.json'}: {len(folders)} matrices of {list(shapes.values())} behind the pooling; "
            f"known: two, from {n_embd} values and back"
        )

    def write(writer: gguf.GGUFWriter, config: Config) -> None:
        family.write_hparams(writer, config)
        for name, shape in shapes.items():
            writer.add_dense_features_dims(name.partition(".")[0], shape[1], shape[0])

    return replace(
        family,
        write_hparams=write,
        shapes=lambda config: family.shapes(config) | shapes,
        gather=lambda tensors, config: family.gather(tensors, config) | found,
    )


def _pooling(checkpoint: Checkpoint, name: str) -> gguf.PoolingType:
    settings, path = checkpoint.json(name), checkpoint.folder / name
    modes = [key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    if "pooling_mode" in settings:
        modes = [settings["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in tuple(_POOLINGS):
        raise UnsupportedError(f"{path}: pooling {shown(modes)}; known: one of {', '.join(_POOLINGS)}")
    return _POOLINGS[modes[0]]
