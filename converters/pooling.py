"""What a folder of sentence-transformers says of how tokens' vectors become one."""

from __future__ import annotations

import json

import gguf

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Checkpoint, shown
from .ranking import RERANKERS

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
    path, text = checkpoint.folder / "modules.json", checkpoint.text("modules.json")
    if text is None:
        return
    try:
        modules = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not a JSON file: {error}") from error
    for module in modules if isinstance(modules, list) else [modules]:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise ConversionError(f"{path}: {shown(module)} is no module")
        kind, where = module["type"].rpartition(".")[2], str(module.get("path") or "")
        if kind == "Pooling":
            writer.add_pooling_type(_pooling(checkpoint, f"{where}/config.json"))
        elif kind == "LogitScore" and checkpoint.architecture in RERANKERS:
            pass  # `as_reranker` has written it
        elif kind not in ("Transformer", "Normalize"):
            raise UnsupportedError(f"{path}: a module {kind}; known: Transformer, Pooling, Normalize")


def _pooling(checkpoint: Checkpoint, name: str) -> gguf.PoolingType:
    settings, path = checkpoint.json(name), checkpoint.folder / name
    modes = [key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    if "pooling_mode" in settings:
        modes = [settings["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UnsupportedError(f"{path}: pooling {shown(modes)}; known: one of {', '.join(_POOLINGS)}")
    return _POOLINGS[modes[0]]
