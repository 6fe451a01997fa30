"""LFM2 (Liquid AI 2025): short convolutions in most layers, attention in the others; also with experts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decoder import Decoder, Style
from .hparams import Hparams, Options

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights


@dataclass(frozen=True)
class Lfm2(Decoder):
    """The hyperparameters, and how they make a graph. Layers that have no heads of keys are convolutions.

    Attributes
    ----------
    width : int
        Tokens that a convolution sees.
    """

    width: int

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "Lfm2":
        """Reads them from a file's metadata; raises as `Style.read`."""
        decoder = Style(gating="sigmoid", normalize=True, mixed=True).read(hp, options)
        return cls(**vars(decoder), width=hp.size("shortconv.l_cache"))

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """The last layer's (n_tokens, n_embd) normalized. Early files name the norm as any other model's."""
        return w.norm("token_embd_norm" if w.has("token_embd_norm.weight") else "output_norm", x, self.eps)

    def attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's attention or convolution: (n_tokens, n_embd), normalized, to the same."""
        return super().attention(g, w, x, i) if self.n_head_kv[i] else self._convolution(g, w, x, f"blk.{i}.shortconv")

    def _convolution(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        n = self.n_embd
        before, after, x = (
            w.linear(f"{p}.{part}", n, x, (f"{p}.in_proj", k * n, 3 * n)) for k, part in enumerate(("b", "c", "x"))
        )
        y = g.op("MUL", before, x, name=f"{p}.bx")
        kernel = w.by_columns(f"{p}.conv.weight", n, self.width)
        y = g.op("SHORT_CONV", y, kernel, g.state(f"{p}.tail", self.width - 1, n), name=f"{p}.conv")
        return w.linear(f"{p}.out_proj", n, g.op("MUL", after, y, name=f"{p}.gated"))
