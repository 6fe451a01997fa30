"""The layer that predicts the token after the next (MTP, `nextn`), which some files carry behind those of the model.

It takes what the model's own logits are made of for a token (or what it gave itself for that) and the embedding of the
token that follows, and gives the logits of the one after that (DeepSeek-V3, 2024, section 2.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .decoder import Decoder
from .rope import Rope

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights

#: Tokens that can be predicted. In vocabularies made by merges the first are the most frequent by far; all would take
#: longer than the layer itself, and what is predicted is only a guess.
_MOST_PREDICTED = 1 << 16


@dataclass(frozen=True)
class NextN:
    """An architecture of one layer, with an input "hidden" (n_tokens, n_embd) beside the tokens.

    Attributes
    ----------
    whole : Decoder
        The model, with its further layers.
    i : int
        Which of them this is.
    """

    whole: Decoder
    i: int

    @property
    def n_layer(self) -> int:
        return 1

    @property
    def n_embd(self) -> int:
        return self.whole.n_embd

    @property
    def n_vocab(self) -> int:
        return self.whole.n_vocab

    @property
    def n_ctx_train(self) -> int:
        return self.whole.n_ctx_train

    @property
    def ropes(self) -> Mapping[str, Rope]:
        return self.whole.ropes

    def _own(self, part: str) -> str:
        return f"blk.{self.i}.nextn.{part}"

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,), and "hidden" of the tokens before them, to (n_tokens, n_embd)."""
        n, eps = self.n_embd, self.whole.eps
        table = self._own("embed_tokens") if w.has(f"{self._own('embed_tokens')}.weight") else "token_embd"
        x = g.op("GET_ROWS", w(f"{table}.weight", self.n_vocab, n), ids, name="embd")
        x = w.norm(self._own("enorm"), x, eps)
        h = w.norm(self._own("hnorm"), g.input("hidden", (n,)), eps)
        x, h = (g.op("RESHAPE", part, shape=(1, n), name=f"{part.name}.head") for part in (x, h))
        both = g.op("JOIN_HEADS", x, h, n=n, name="joined")
        return w.linear(self._own("eh_proj"), n, g.op("RESHAPE", both, shape=(2 * n,), name="joined_rows"))

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """The layer: (n_tokens, n_embd) to the same."""
        return self.whole.layer(g, w, x, self.i)

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """What logits are made of, and what "hidden" is for the token after the next."""
        name = self._own("shared_head_norm")
        return w.norm(name, x, self.whole.eps) if w.has(f"{name}.weight") else self.whole.norm(g, w, x)

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """(n_tokens, n_embd), normalized, to logits of the first tokens of the vocabulary."""
        n = min(self.n_vocab, _MOST_PREDICTED)
        names = (self._own("shared_head_head"), "output", "token_embd")
        name = next(name for name in names if w.has(f"{name}.weight") or name == "token_embd")
        weight = w.rows(f"{name}.weight", 0, n, self.n_vocab, self.n_embd)
        return g.op("MUL_MAT", weight, x, name="logits")
