"""ggpy: convert, inspect and run GGUF language models on the CPU.

    import ggpy

    with ggpy.load("model.gguf") as model:
        for piece in model.generate("The capital of France is", max_tokens=16, temperature=0):
            print(piece, end="")

The package's parts import from left to right only: quant, file, graph (over kernels and simd), models, generate, cli.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
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
    from converters import convert

    from .batching import batch
    from .file import GGUFFile
    from .generate.generation import Generation
    from .generate.model import Model
    from .generate.options import ChatOptions, GenerationOptions, Processor, Sampler, SamplingOptions
    from .generate.piece import Piece
    from .generate.sampling import StandardSampler
    from .generate.score import Score
    from .generate.sequence import TokenSequence
    from .generate.session import Message, Reply, Session
    from .generate.tokenizer import Tokenizer
    from .quantization import quantize_model as quantize

__version__ = "0.1.0"
__all__ = [
    "ChatOptions",
    "ContextFullError",
    "ConversionError",
    "Error",
    "GGUFError",
    "GGUFFile",
    "Generation",
    "GenerationOptions",
    "GraphError",
    "Message",
    "Model",
    "Piece",
    "Processor",
    "Reply",
    "Sampler",
    "SamplingOptions",
    "Score",
    "Session",
    "StandardSampler",
    "TokenSequence",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedError",
    "batch",
    "convert",
    "load",
    "quantize",
]

# Where names come from, when they are first used.
_LAZY = {
    "ChatOptions": "ggpy.generate.options",
    "GGUFFile": "ggpy.file",
    "Generation": "ggpy.generate.generation",
    "GenerationOptions": "ggpy.generate.options",
    "Message": "ggpy.generate.session",
    "Model": "ggpy.generate.model",
    "Piece": "ggpy.generate.piece",
    "Processor": "ggpy.generate.options",
    "Reply": "ggpy.generate.session",
    "Sampler": "ggpy.generate.options",
    "SamplingOptions": "ggpy.generate.options",
    "Score": "ggpy.generate.score",
    "Session": "ggpy.generate.session",
    "StandardSampler": "ggpy.generate.sampling",
    "TokenSequence": "ggpy.generate.sequence",
    "Tokenizer": "ggpy.generate.tokenizer",
    "batch": "ggpy.batching",
    "convert": "converters",
    "quantize": "ggpy.quantization",
}


def __getattr__(name: str) -> Any:
    # `import ggpy` stays light: numpy and the rest come with their first use.
    if name not in _LAZY:
        raise AttributeError(f"module 'ggpy' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), "quantize_model" if name == "quantize" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    path: str | Path,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_batch: int = 512,
    kv_type: str = "f16",
    n_expert_used: int | None = None,
    mla: str = "absorbed",
    kv_memory: int | None = None,
    ram_budget: int | None = None,
    stages: int = 1,
    ray: str | None = None,
    lora: Iterable[str | Path] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> "Model":
    """Opens a model for running.

    Parameters
    ----------
    path : str or Path
        A .gguf file; of a split model, any part. A folder with such files, or a model of the Hugging Face hub, which is
        fetched once: "owner/name:Q4_K_M", "owner/name" (Q4_K_M or the nearest), "owner/name@revision",
        "owner/name/file.gguf". A checkpoint, of the hub or a folder, is converted to Q8_0, or the type after a colon,
        once and kept in the cache. "demo" is the small model that comes with ggpy.
    n_ctx : int, optional
        Tokens of context; by default what the model was trained with, but not more than 8192. Memory is taken as tokens
        come.
    n_threads : int, optional
        By default one for each physical core that this process may use.
    n_batch : int
        Tokens of a prompt that are run at once.
    kv_type : {"f16", "q8_0", "f32"}
        Of the cached keys and values. Q8_0 takes about half the memory of float16.
    n_expert_used : int, optional
        Experts for each token of a mixture, instead of the file's number.
    mla : {"absorbed", "naive"}
        How latent attention (DeepSeek) is computed: over cached latent vectors, or over keys and values of all heads,
        which takes several times the memory.
    kv_memory : int, optional
        Bytes for the cached keys and values of all sequences, at most; by default what four contexts take, or 32,768
        tokens, but no more than a quarter of the machine's memory. What nobody uses is kept for prompts that begin alike,
        until the room is needed.
    ram_budget : int, optional
        Bytes of memory that a mixture of experts bigger than that may take: experts are kept by use and read when their
        router has spoken. Costs time where the model fits.
    stages : int
        Processes that share the layers, each with its part of the weights and of the keys and values; text is the same.
        `n_threads` is for each of them.
    ray : str, optional
        The address of a Ray cluster whose nodes have the stages, and the file at the same path: for models that no machine
        holds.
    lora : iterable of str or Path
        LoRA adapters that the model is run with: GGUF files, or PEFT's folders; PATH:0.5 multiplies one by 0.5. They stay
        beside the weights, and take memory and time for their own thin matrices alone.
    progress : callable, optional
        Called as progress(done, total, kernel) while kernels are compiled, which happens once per machine.

    Returns
    -------
    Model

    Raises
    ------
    Error
        There is no such file, folder or repository, or a download failed.
    GGUFError
        The file is damaged, or lacks a tensor or key.
    UnsupportedError
        An architecture or block type that ggpy doesn't have.
    """
    from .generate.model import Model
    from .hub import model_file
    from .hub.adapters import read_adapters

    file = model_file(path, kernel_progress=progress)
    return Model(
        file,
        n_ctx=n_ctx,
        n_threads=n_threads,
        n_batch=n_batch,
        kv_type=kv_type,
        n_expert_used=n_expert_used,
        mla=mla,
        kv_memory=kv_memory,
        ram_budget=ram_budget,
        stages=stages,
        ray=ray,
        lora=read_adapters(lora, file),
        progress=progress,
    )
