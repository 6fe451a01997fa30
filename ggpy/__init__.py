"""ggpy: convert, inspect and run GGUF language models on the CPU.

    import ggpy

    with ggpy.load("model.gguf") as model:
        for piece in model.generate("The capital of France is", max_tokens=16, temperature=0):
            print(piece, end="")

The package's parts import from left to right only: quant, file, graph (over kernels and simd), models, generate, cli.
"""

from typing import TYPE_CHECKING, Any

from .errors import (
    ContextFullError,
    ConversionError,
    Error,
    GGUFError,
    GraphError,
    TokenizerError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .file import GGUFFile
    from .generate.generation import Generation
    from .generate.model import Model
    from .generate.options import SamplingOptions
    from .generate.sampling import Sampler, StandardSampler

__version__ = "0.1.0"
__all__ = [
    "ContextFullError",
    "ConversionError",
    "Error",
    "GGUFError",
    "GGUFFile",
    "Generation",
    "GraphError",
    "Model",
    "Sampler",
    "SamplingOptions",
    "StandardSampler",
    "TokenizerError",
    "UnsupportedError",
    "load",
]

_LAZY = {
    "GGUFFile": "file",
    "Generation": "generate.generation",
    "Model": "generate.model",
    "Sampler": "generate.sampling",
    "SamplingOptions": "generate.options",
    "StandardSampler": "generate.sampling",
}


def __getattr__(name: str) -> Any:
    # `import ggpy` stays light: numpy and the rest come with their first use.
    if name not in _LAZY:
        raise AttributeError(f"module 'ggpy' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def load(path: Any, **options: Any) -> "Model":
    """Opens a model for running: `ggpy.load(path, n_ctx=…, n_threads=…)`. Options and errors: see `Model`."""
    from .generate.model import Model

    return Model(path, **options)
