"""What families with Mamba-2 layers share, and Mamba-2 by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import ChangedRows, Config, PickedRows, ReshapedRows, Rows, shown
from .family import Family, Shapes, model_shapes

# No upper limit of a step; transformers writes infinity as an object.
INFINITE = (math.inf, {"__float__": "Infinity"})


@dataclass(frozen=True)
class Scan:
    """Sizes of a Mamba-2 layer.

    Attributes
    ----------
    n_head : int
    n : int
        Values of all heads.
    n_group, n_state : int
        Heads of keys, and the values of each.
    width : int
        Tokens that its convolution sees.
    has_bias : bool
        Whether the convolution has one.
    """

    n_head: int
    n: int
    n_group: int
    n_state: int
    width: int
    has_bias: bool

    @classmethod
    def of_hybrid(cls, config: Config, n: int) -> Scan:
        """That of a model with other kinds of layers, too, whose keys begin with "mamba_"; of n values.

        Raises
        ------
        ConversionError
            The heads don't share n values evenly, or have another length.
        """
        n_head = config.integer("mamba_n_heads")
        if n % n_head or config.get("mamba_d_head", "auto") not in ("auto", n // n_head):
            raise ConversionError(f"{config.path}: mamba_d_head isn't {n} / {n_head}")
        return cls(
            n_head=n_head,
            n=n,
            n_group=config.integer("mamba_n_groups"),
            n_state=config.integer("mamba_d_state"),
            width=config.integer("mamba_d_conv", least=2),
            has_bias=bool(config.get("mamba_conv_bias", True)),
        )

    @property
    def n_conv(self) -> int:
        """Columns of the convolution: values, keys and queries."""
        return self.n + 2 * self.n_group * self.n_state

    def write_hparams(self, writer: gguf.GGUFWriter, config: Config) -> None:
        limits = config.get("time_step_limit", [0.0, math.inf])
        least, most = limits if isinstance(limits, list) and len(limits) == 2 else (None, None)
        if not isinstance(least, int | float) or not 0 <= least <= 1 or most not in INFINITE:
            raise UnsupportedError(f"{config.path}: time_step_limit {shown(limits)}; known: from 0 to 1 on, without end")
        if least:  # a key of ggpy's own
            writer.add_float32(f"{writer.arch}.ssm.time_step_min", least)
        writer.add_ssm_conv_kernel(self.width)
        writer.add_ssm_state_size(self.n_state)
        writer.add_ssm_group_count(self.n_group)
        writer.add_ssm_inner_size(self.n)
        writer.add_ssm_time_step_rank(self.n_head)

    def shapes(self, n_embd: int) -> Shapes:
        """The layer's tensors, and the norm before it."""
        bias: Shapes = {"ssm_conv1d.bias": (self.n_conv,)} if self.has_bias else {}
        return {
            "attn_norm.weight": (n_embd,),
            "ssm_in.weight": (self.n + self.n_conv + self.n_head, n_embd),
            "ssm_conv1d.weight": (self.n_conv, self.width),
            **bias,
            "ssm_dt.bias": (self.n_head,),
            "ssm_a": (self.n_head, 1),
            "ssm_d": (self.n_head, 1),
            "ssm_norm.weight": (self.n_group, self.n // self.n_group),
            "ssm_out.weight": (n_embd, self.n),
        }

    def gathered(self, name: str, rows: Rows) -> tuple[str, Rows]:
        """A tensor of the layer under the name that gguf's table knows, and in GGUF's shape."""
        if name.endswith(".conv1d.weight") and len(rows.shape) == 3 and rows.shape[1] == 1:
            rows = PickedRows(rows, np.arange(rows.shape[0]), (rows.shape[0], rows.shape[2]))
        elif name.endswith((".A_log", ".D")):
            rows = ReshapedRows(rows, (rows.shape[0], 1))
        elif name.endswith((".mamba.norm.weight", ".mixer.norm.weight")) and rows.shape[0] % self.n_group == 0:
            rows = ReshapedRows(rows, (self.n_group, rows.shape[0] // self.n_group))
        return name.replace(".dt_bias", ".dt_proj.bias"), rows


def decays(name: str, rows: Rows) -> Rows:
    """Decays as they are used: -e^A_log."""
    return ChangedRows(rows, lambda x: -np.exp(x)) if name.endswith("ssm_a") else rows


# --- models of nothing else ---

# What training or a program did, what other keys say, and what transformers doesn't heed.
_IGNORED_NAMES = (
    "chunk_size residual_in_fp32 rescale_prenorm_residual time_step_rank time_step_min time_step_max time_step_floor "
    "time_step_init_scheme time_step_scale intermediate_size norm_before_gate fused_add_norm pad_vocab_size_multiple"
)
IGNORED = _IGNORED_NAMES.split()


def _scan(config: Config) -> Scan:
    n_head = config.integer("num_heads")
    n = n_head * config.integer("head_dim")
    config.only("expand", n / config.integer("hidden_size"))
    return Scan(
        n_head=n_head,
        n=n,
        n_group=config.integer("n_groups"),
        n_state=config.integer("state_size"),
        width=config.integer("conv_kernel", least=2),
        has_bias=bool(config.get("use_conv_bias", True)),
    )


def _write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("use_bias", False)
    config.only("hidden_act", "silu")
    config.only("rms_norm", True)
    for key in IGNORED:
        config.get(key)
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_context_length(1 << 20)  # none that the model knows of: llama.cpp's number
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_vocab_size(config.integer("vocab_size"))
    writer.add_layer_norm_rms_eps(config.number("layer_norm_epsilon", 1e-5, least=0))
    _scan(config).write_hparams(writer, config)


FAMILY = Family(
    ("Mamba2ForCausalLM",),
    gguf.MODEL_ARCH.MAMBA2,
    _write_hparams,
    lambda config: model_shapes(config, lambda i: _scan(config).shapes(config.integer("hidden_size"))),
    lambda tensors, config: dict(_scan(config).gathered(name, rows) for name, rows in tensors.items()),
    lambda name, rows, config: decays(name, rows),
    defaults={
        "Mamba2ForCausalLM": {
            "num_heads": 128,
            "head_dim": 64,
            "state_size": 128,
            "n_groups": 8,
            "expand": 2,
            "conv_kernel": 4,
        }
    },
)
