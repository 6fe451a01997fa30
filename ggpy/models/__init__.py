"""The architectures: hyperparameters read from a file, and the graph that they make."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..errors import GGUFError, GraphError, UnsupportedError
from ..file.gguf import is_fit
from .adapters import ThinPair, added_up
from .decoder import Decoder, Style
from .deepseek2 import DeepSeek2
from .encoder import EncoderStyle
from .gemma4 import Gemma4
from .hparams import Hparams, Options
from .lfm2 import Lfm2
from .mamba2 import Hybrid, Mamba2, Parallel, Single, granite_style
from .nextn import NextN
from .qwen35 import Qwen35
from .rope import Rope
from .weights import DerivedWeight, Weights

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Batch, Graph, Tensor


class Architecture(Protocol):
    """What an architecture offers. Activations are (n_tokens, n_embd) between its parts."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def ropes(self) -> Mapping[str, Rope]: ...

    def embed(self, g: "Graph", w: Weights, ids: "Tensor") -> "Tensor": ...
    def layer(self, g: "Graph", w: Weights, x: "Tensor", i: int) -> "Tensor": ...
    def norm(self, g: "Graph", w: Weights, x: "Tensor") -> "Tensor": ...
    def logits(self, g: "Graph", w: Weights, x: "Tensor") -> "Tensor": ...


Reader = Callable[[Hparams, Options], Architecture]

_GEMMA: dict[str, Any] = {"norm_after": True, "act": "geglu", "embd_root": True}
_AFTER: dict[str, Any] = {"norm_before": False, "norm_after": True}
_PARALLEL: dict[str, Any] = {"layer_norm": True, "ffn_norm": "", "parallel": True}


def _read_granite(hp: Hparams, options: Options) -> Architecture:
    return granite_style(hp).read(hp, options)


def _read_minicpm(hp: Hparams, options: Options) -> Architecture:
    """Old files have no factors, which is no reason to do without."""
    for key in ("embedding_scale", "residual_scale", "logit_scale"):
        hp.positive(key)
    return Style(rope="norm", divide_logits=True).read(hp, options)


def _read_stablelm(hp: Hparams, options: Options) -> Architecture:
    """Layers without a norm before the feed-forward part have it beside attention, whatever old files' keys say."""
    in_turn = "blk.0.ffn_norm.weight" in hp.file.tensors
    return (Style(layer_norm=True) if in_turn else Style(**_PARALLEL)).read(hp, options)


#: `general.architecture` -> what reads a file of it
ARCHITECTURES: dict[str, Reader] = {
    # Llama 1, 2, 3 (Touvron et al. 2023) and what differs in sizes alone, such as Mistral and SmolLM2; Mixtral
    "llama": Style(rope="norm", normalize=True).read,
    "qwen2": Style().read,
    "qwen3": Style().read,
    "qwen2moe": Style().read,
    "qwen3moe": Style(normalize=True).read,
    "olmo": Style(rope="norm", layer_norm=True, norm_weights=False, clamps=True).read,  # OLMo 1
    "olmoe": Style(clamps=True).read,
    "dbrx": Style(layer_norm=True, ffn_norm="attn_output_norm", normalize=True, clamps=True).read,
    "gemma": Style(act="geglu", embd_root=True).read,
    "gemma2": Style(**_GEMMA, window=4096, window_every=2, shared_scale_at=46).read,
    "gemma3": Style(**_GEMMA, window_every=6, window_base=10000.0, shared_scale_at=62).read,
    "gemma-embedding": Style(**_GEMMA, window_every=6, window_base=10000.0, causal=False).read,
    "gemma4": Gemma4.read,
    "gpt-oss": Style(
        ffn_norm="post_attention_norm", act="swiglu_clamped", window_every=2, normalize=True, whole_yarn=False
    ).read,
    "mistral3": Style(rope="norm", normalize=True).read,
    "phi3": Style(normalize=True).read,
    "granite": _read_granite,
    "minicpm": _read_minicpm,
    "granite_swa": _read_granite,  # with windows and sinks
    "granitemoe": _read_granite,
    "smollm3": Style(rope="norm", no_rope_every=4).read,
    "olmo2": Style(**_AFTER, window_every=4, window_base=0.0).read,  # OLMo 2 and 3
    "exaone": Style().read,
    "exaone-moe": Style(gating="sigmoid", window=128, window_every=4, no_rope_unless_window=True).read,
    "exaone4": Style(**_AFTER, window_every=4, no_rope_unless_window=True).read,
    "hunyuan-dense": Style(norm_rotated=True).read,
    "hunyuan-moe": Style(norm_rotated=True, normalize=True).read,
    "afmoe": Style(
        norm_after=True, embd_root=True, window_every=4, no_rope_unless_window=True, gating="sigmoid", normalize=True
    ).read,
    "mellum": Style(window_every=4, window_base=0.0, normalize=True).read,
    "ernie4_5": Style(rope="norm").read,
    "ernie4_5-moe": Style(rope="norm", normalize=True).read,
    "glm4": Style(rope="norm", norm_after=True).read,
    "glm4moe": Style(ffn_norm="post_attention_norm", gating="sigmoid").read,
    "dots1": Style(gating="sigmoid").read,
    "bailingmoe2": Style(gating="sigmoid").read,  # Ling 2
    "minimax-m2": Style(gating="sigmoid", normalize=True).read,
    "deepseek": Style(rope="norm").read,  # DeepSeek's first mixture
    "seed_oss": Style(ffn_norm="post_attention_norm").read,
    "arcee": Style(rope="norm", act="relu_squared").read,
    "nemotron": Style(layer_norm=True, act="relu_squared").read,
    "jais2": Style(layer_norm=True, act="relu_squared").read,
    "starcoder2": Style(layer_norm=True, act="gelu").read,
    "command-r": Style(**_PARALLEL, rope="norm").read,
    "cohere2": Style(**_PARALLEL, rope="norm", window_every=4, no_rope_unless_window=True).read,
    "stablelm": _read_stablelm,
    "gptneox": Style(layer_norm=True, act="gelu_erf", parallel=None).read,
    "gpt2": Style(rope="", layer_norm=True, act="gelu").read,
    "phi2": Style(**_PARALLEL, act="gelu").read,
    "falcon": Style(**_PARALLEL, act="gelu_erf").read,
    "deepseek2": DeepSeek2.read,
    "deepseek32": DeepSeek2.read_indexed,
    "lfm2": Lfm2.read,
    "lfm2moe": Lfm2.read,
    "qwen35": Qwen35.read,
    "qwen35moe": Qwen35.read,
    "qwen3next": Qwen35.read,
    "granitehybrid": Hybrid.read_granite,
    "nemotron_h": Single.read,
    "nemotron_h_moe": Single.read,
    "falcon-h1": Parallel.read,
    "mamba2": Mamba2.read,
    # BERT (Devlin et al. 2018), RoBERTa and XLM-R
    "bert": EncoderStyle().read,
    "nomic-bert": EncoderStyle(rope=True, act="swiglu").read,
    "nomic-bert-moe": EncoderStyle(rope=True).read,
    "modern-bert": EncoderStyle(rope=True, act="", modern=True).read,
}


#: what a graph can end with; see `build_graph`
Output = Literal["logits", "embeddings", "both", "states", "x"]
#: forms of latent attention
MLA_FORMS = ("absorbed", "naive")


def read_architecture(
    file: "GGUFFile", n_expert_used: int | None = None, mla: str = "absorbed", n_ctx: int = 0
) -> Architecture:
    """The hyperparameters of the model in a file.

    Parameters
    ----------
    file : GGUFFile
    n_expert_used : int, optional
        Experts for each token, instead of the file's number.
    mla : {"absorbed", "naive"}
        The form of latent attention, where a model has it; see `deepseek2`.
    n_ctx : int
        The context that the model is loaded for, which models with LongRoPE depend on; 0 if unknown.

    Raises
    ------
    UnsupportedError
        An architecture or form that ggpy doesn't have; lists those it has.
    GGUFError
        Hyperparameters that are missing, or that no model has.
    """
    arch = _reader(file, mla)(Hparams(file), Options(n_expert_used, mla, n_ctx))
    for name, value in vars(arch).items():  # made of the file's numbers, which are fit themselves
        if isinstance(value, float) and not is_fit(value):
            raise GGUFError(f"{file.path}: by the metadata {name} is {value:g}, which is no number for a model")
    return arch


def read_nextn(file: "GGUFFile", n_expert_used: int | None = None, mla: str = "absorbed", n_ctx: int = 0) -> NextN:
    """The layer of a file that predicts the token after the next; parameters as those of `read_architecture`.

    Raises
    ------
    UnsupportedError
        The file has none.
    """
    hp = Hparams(file, whole=True)
    i = hp.n_layer() - hp.count("nextn_predict_layers")
    whole = _reader(file, mla)(hp, Options(n_expert_used, mla, n_ctx))
    if f"blk.{i}.nextn.eh_proj.weight" not in file.tensors or not isinstance(whole, Decoder):
        raise UnsupportedError(f"{file.path}: no layer that predicts further tokens (MTP)")
    return NextN(whole, i)


def _reader(file: "GGUFFile", mla: str) -> Reader:
    if mla not in MLA_FORMS:
        raise UnsupportedError(f"form of latent attention {mla!r}; there are {', '.join(MLA_FORMS)}")
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UnsupportedError(f"{file.path}: architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def build_graph(
    file: "GGUFFile",
    arch: Architecture,
    n_tokens: int,
    n_outputs: int | None = None,
    layers: range | None = None,
    embed: bool = True,
    output: Output = "logits",
    derived: dict[str, DerivedWeight] | None = None,
    adapters: Mapping[str, ThinPair] | None = None,
) -> "Graph":
    """The graph of a model, or of some of its layers.

    Parameters
    ----------
    file : GGUFFile
        Where the weights are.
    arch : Architecture
    n_tokens : int
        The most tokens that a run may have.
    n_outputs : int, optional
        Of how many of them, at most, logits or embeddings are computed; by default of all.
    layers : range, optional
        Which layers; all by default.
    embed : bool
        Whether it begins with token ids (input "ids"), or else with activations (input "x", (n_tokens, n_embd)).
    output : {"logits", "embeddings", "both", "states", "x"}
        What it ends with, mostly the output's name, too: logits (n_outputs, n_vocab); what they are made of, the last
        layer's activations after the final norm (n_outputs, n_embd); activations as they are (n_tokens, n_embd). "both"
        are outputs "logits" and "embeddings", the latter of all tokens. "states" are outputs "0", "1", …: what each layer
        takes, and at last what logits are made of, all (n_tokens, n_embd).
    derived : dict of str to DerivedWeight, optional
        Weights made at loading; graphs of a model that are given the same dict share them.
    adapters : mapping of str to ThinPair, optional
        What LoRA adapters add to matrices; see `ggpy.hub.adapters`.

    Raises
    ------
    GGUFError
        A tensor is missing or has the wrong shape.
    GraphError
        Sizes that the kernels can't take.
    UnsupportedError
        An adapter of a matrix that isn't multiplied as it is.
    """
    from ..graph import Graph

    g = Graph(n_tokens, n_outputs)
    w = Weights(file, g, {} if derived is None else derived, adapters or {})
    try:
        layers = range(arch.n_layer) if layers is None else layers
        graph = _build(g, w, arch, n_tokens, layers, embed, output)
        w.refuse_ignored_adapters(layers, output in ("logits", "both"))
        return graph
    except GraphError as error:
        raise GraphError(f"{file.path}: {error}") from None


def _build(
    g: "Graph", w: Weights, arch: Architecture, n_tokens: int, layers: range, embed: bool, output: Output
) -> "Graph":
    x = arch.embed(g, w, g.input("ids", (), "I32")) if embed else g.input("x", (arch.n_embd,))
    for i in layers:
        if output == "states":
            g.output(x, str(i))
        x = arch.layer(g, w, x, i)
    if output in ("states", "both"):
        x = arch.norm(g, w, x)
        g.output(x, "embeddings" if output == "both" else str(layers.stop))
    if output != "x" and output != "states":
        if n_tokens > 1:
            x = g.op("ROWS", x, g.input("outputs", (), "I32", per="output"), name="rows")
        if output != "both":
            x = arch.norm(g, w, x)
    if output in ("logits", "both"):
        g.output(arch.logits(g, w, x), "logits")
    elif output != "states":
        g.output(x, output)
    w.refuse_others()
    return g


def run_inputs(arch: Architecture, batch: "Batch") -> dict[str, np.ndarray]:
    """The inputs of a run that follow from its batch: token ids, which outputs are wanted, what depends on positions.

    Encoders know types of tokens: token i of type t stands in a batch as i + t * n_vocab."""
    tables = {name: rope.table(batch.positions) for name, rope in arch.ropes.items()}
    types, ids = np.divmod(batch.ids, np.int32(arch.n_vocab))
    return {"ids": ids, "types": types, "outputs": batch.outputs, "positions": batch.positions, **tables}


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "NextN",
    "Output",
    "Rope",
    "ThinPair",
    "Weights",
    "added_up",
    "build_graph",
    "read_architecture",
    "read_nextn",
    "run_inputs",
]
