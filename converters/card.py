"""The model card (README.md) and what else says where a model comes from, as ``general.*`` metadata.

A card is decoration: what can't be read in it is left out, and said; it never stops a conversion.
"""

from __future__ import annotations

import re
from typing import Any

import gguf
import yaml

from ggpy.errors import ConversionError

from .checkpoint import Checkpoint, read_bytes

# Bytes of a card, and of its header without the results of evaluations, which fill megabytes and aren't used.
MAX_CARD = 10_000_000
MAX_HEADER = 100_000
HEADER = re.compile(r"---\s*\n(.*?\n)---\s*(?:\n|$)", re.DOTALL)
RESULTS = re.compile(r"^model-index:.*\n(?:[ \-].*\n|\s*\n)*", re.MULTILINE)

LISTS = frozenset({"license", "tags", "language", "languages", "base_model", "base_models", "datasets", "dataset"})

# What generation_config.json says of sampling -> the attribute of gguf.Metadata.
SAMPLING = {"temperature": "sampling_temp", "top_k": "sampling_top_k", "top_p": "sampling_top_p", "min_p": "sampling_min_p"}


class _Loader(yaml.BaseLoader):
    """All scalars as the strings that they are (1.0, no), and no aliases, which make much of little."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def read_card(checkpoint: Checkpoint, n_parameters: int) -> gguf.Metadata:
    """Name, license, tags and the like, from the card, config.json, generation_config.json and the folder's name."""
    header = _header(checkpoint).items()
    card = {key: value for key, value in header if (isinstance(value, str) or key in LISTS) and _is_text(value)}
    name = checkpoint.config.get("_name_or_path")
    hf_params = {"_name_or_path": name} if isinstance(name, str) else {}
    given = (hf_params, checkpoint.folder, n_parameters)
    try:
        general = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, *given)
    except Exception as error:  # names of models are taken apart in there, which can go wrong in many ways
        checkpoint.notes.append(f"{checkpoint.folder / 'README.md'}: left aside: {error}")
        general = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {}, {}, None, n_parameters)
    sampling = checkpoint.json("generation_config.json", optional=True)
    for key, attribute in SAMPLING.items():
        value = sampling.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 31:
            setattr(general, attribute, int(value) if key == "top_k" else float(value))
    return general


def _header(checkpoint: Checkpoint) -> dict[str, Any]:
    """The YAML between the first lines of dashes, its scalars as strings; empty where there is none."""
    path = checkpoint.folder / "README.md"
    if not path.exists():
        return {}
    try:
        text = read_bytes(path, MAX_CARD).decode("utf-8-sig", "replace").replace("\r\n", "\n")
        if not text.startswith("---"):
            return {}
        found = HEADER.match(text)
        if found is None:
            raise ConversionError("its header has no end")
        header = RESULTS.sub("", found[1].replace("\t", "  "))
        if len(header) > MAX_HEADER:
            raise ConversionError(f"its header has more than {MAX_HEADER:,} characters")
        values = yaml.load(header, _Loader)
    except (ConversionError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        checkpoint.notes.append(f"{path}: left aside: {reason}")
        return {}
    return values if isinstance(values, dict) else {}


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can spell, or a list of such."""
    if isinstance(value, list):
        return all(isinstance(item, str) and _is_text(item) for item in value)
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)
