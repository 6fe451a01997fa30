"""The feed-forward part as a mixture of experts; shared by the architectures that have one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GGUFError

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor
    from .weights import Weights

#: GGUF's numbers for how a router turns logits into weights
_GATINGS = {0: "softmax", 1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True)
class Experts:
    """The experts of a layer and how tokens are routed to them. Names are GGUF's.

    Attributes
    ----------
    n_expert, n_expert_used : int
    n_ff : int
        Values inside an expert.
    n_ff_shared : int
        Values inside the experts that all tokens take, as one; 0 for none.
    gating : {"softmax", "sigmoid"}
    normalize : bool
        Whether the weights of the chosen experts sum to 1.
    scale : float
        Factor of the weights.
    n_group, n_group_used : int
        Experts stand in groups, of which only the best few count.
    """

    n_expert: int
    n_expert_used: int
    n_ff: int
    n_ff_shared: int = 0
    gating: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    n_group: int = 1
    n_group_used: int = 1

    @classmethod
    def read(cls, file: "GGUFFile", arch: str, n_ff: int, normalize: bool, n_expert_used: int | None) -> "Experts | None":
        """The experts of a file, None for a dense model.

        Parameters
        ----------
        n_ff : int
            The length inside an expert where the file has none for experts.
        normalize : bool
            What holds where the file doesn't say.
        n_expert_used : int, optional
            Instead of the file's number.

        Raises
        ------
        GGUFError
            Numbers that make no sense.
        """
        n_expert = file.get(f"{arch}.expert_count", int, default=0)
        if n_expert == 0:
            return None
        used = n_expert_used or file.get(f"{arch}.expert_used_count", int)
        if not 0 < used <= n_expert:
            raise GGUFError(f"{file.path}: {used} of {n_expert} experts used")
        n_ff = file.get(f"{arch}.expert_feed_forward_length", int, default=n_ff)
        n_shared = file.get(f"{arch}.expert_shared_count", int, default=0)
        gating = file.get(f"{arch}.expert_gating_func", int, default=0)
        if gating not in _GATINGS:
            raise GGUFError(f"{file.path}: key {arch}.expert_gating_func: {gating}; known are 1 (softmax), 2 (sigmoid)")
        n_group = file.get(f"{arch}.expert_group_count", int, default=0)
        return cls(
            n_expert=n_expert,
            n_expert_used=used,
            n_ff=n_ff,
            n_ff_shared=file.get(f"{arch}.expert_shared_feed_forward_length", int, default=n_shared * n_ff),
            gating=_GATINGS[gating],
            normalize=file.get(f"{arch}.expert_weights_norm", bool, default=normalize),
            scale=file.get(f"{arch}.expert_weights_scale", float, default=1.0) or 1.0,
            n_group=max(n_group, 1),
            n_group_used=max(file.get(f"{arch}.expert_group_used_count", int, default=1), 1),
        )

    def build(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        """The mixture for (n_tokens, n_embd), of the tensors that begin with `p`."""
        n_embd = x.shape[1]
        logits = g.op("MUL_MAT", w(f"{p}.ffn_gate_inp.weight", self.n_expert, n_embd), x, name=f"{p}.router")
        bias = w.optional(f"{p}.exp_probs_b.bias", self.n_expert)
        route = g.op(
            "ROUTE",
            logits,
            *([] if bias is None else [bias]),
            n_used=self.n_expert_used,
            gating=self.gating,
            normalize=self.normalize,
            scale=self.scale,
            n_group=self.n_group,
            n_group_used=self.n_group_used,
            name=f"{p}.route",
        )

        def experts(part: str, n_rows: int, n_cols: int, y: "Tensor") -> "Tensor":
            weight = w(f"{p}.ffn_{part}_exps.weight", self.n_expert, n_rows, n_cols)
            return g.op("MUL_MAT_ID", weight, y, route, name=f"{p}.ffn_{part}_exps")

        gate, up = experts("gate", self.n_ff, n_embd, x), experts("up", self.n_ff, n_embd, x)
        down = experts("down", n_embd, self.n_ff, g.op("SWIGLU", gate, up, name=f"{p}.ffn_act_exps"))
        y = g.op("COMBINE", down, route, name=f"{p}.experts")
        if not self.n_ff_shared:
            return y
        gate, up = (w.linear(f"{p}.ffn_{part}_shexp", self.n_ff_shared, x) for part in ("gate", "up"))
        shared = w.linear(f"{p}.ffn_down_shexp", n_embd, g.op("SWIGLU", gate, up, name=f"{p}.ffn_act_shexp"))
        gate_row = w.optional_row(f"{p}.ffn_gate_inp_shexp.weight", n_embd)
        if gate_row is not None:
            amount = g.op("MUL_MAT", gate_row, x, name=f"{p}.shared_gate")
            shared = g.op("SIGMOID_GATE", shared, amount, name=f"{p}.shared_gated")
        return g.op("ADD", y, shared, name=f"{p}.ffn_out")
