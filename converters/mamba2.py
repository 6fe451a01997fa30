"""What families with Mamba-2 layers share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np

from ggpy.errors import UnsupportedError

from .checkpoint import ChangedRows, Config, PickedRows, ReshapedRows, Rows, shown
from .family import Shapes

# Limits of a step that are none; transformers writes infinity as an object.
UNLIMITED = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}])


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

    @property
    def n_conv(self) -> int:
        """Columns of the convolution: values, keys and queries."""
        return self.n + 2 * self.n_group * self.n_state

    def write_hparams(self, writer: gguf.GGUFWriter, config: Config) -> None:
        limits = config.get("time_step_limit", UNLIMITED[0])
        if limits not in UNLIMITED:
            raise UnsupportedError(f"{config.path}: time_step_limit {shown(limits)}; known: from 0 on")
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
