"""LoRA adapters to run a model with: GGUF files and PEFT's folders alike."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..file import GGUFFile

if TYPE_CHECKING:
    from ..models.adapters import ThinPair


def read_adapters(
    adapters: Iterable[str | os.PathLike[str]] | None, model: str | os.PathLike[str]
) -> "list[dict[str, ThinPair]]":
    """What each of some adapters adds to a model's matrices, by their names.

    Parameters
    ----------
    adapters : iterable of str or path-like, optional
        GGUF files or folders; PATH:0.5 multiplies by 0.5.
    model : path-like
        The model's .gguf file.

    Raises
    ------
    Error
        An adapter is damaged, another model's, or can't be used while running.
    """
    from ..models.adapters import path_and_scale, read_adapter

    found: list[dict[str, ThinPair]] = []
    if adapters:
        with GGUFFile(model) as file:
            for path, scale in map(path_and_scale, adapters):
                if path.is_dir():
                    from converters.lora import thin_pairs

                    found.append(thin_pairs(path, file, scale))
                else:
                    found.append(read_adapter(path, file, scale))
    return found
