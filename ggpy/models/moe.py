"""The feed-forward part as a mixture of experts; shared by the architectures that have one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .hparams import Hparams
from .weights import ACTS

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights

#: GGUF's numbers for how a router turns logits into weights
_GATINGS = {1: "softmax", 2: "sigmoid"}


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
    act : str
        The experts' activation, a key of `weights.ACTS`.
    gating : {"softmax", "sigmoid"}
    normalize : bool
        Whether the weights of the chosen experts sum to 1.
    scale : float
        Factor of the weights.
    n_group, n_group_used : int
        Experts stand in groups, of which only the best few count.
    n_latent : int
        Values that experts take instead of an embedding's, by a matrix that all share, and give; 0 for none.
    """

    n_expert: int
    n_expert_used: int
    n_ff: int
    n_ff_shared: int = 0
    act: str = "swiglu"
    gating: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    n_group: int = 1
    n_group_used: int = 1
    n_latent: int = 0

    @classmethod
    def read(
        cls,
        hp: Hparams,
        n_ff: int,
        n_expert_used: int | None = None,
        *,
        normalize: bool = False,
        gating: str = "softmax",
        act: str = "swiglu",
    ) -> "Experts | None":
        """The experts of a file, None for a dense model.

        Parameters
        ----------
        n_ff : int
            The length inside an expert where the file has none for experts.
        n_expert_used : int, optional
            Instead of the file's number.
        normalize, gating
            What holds where the file doesn't say.
        act : str
            Which files don't say.

        Raises
        ------
        GGUFError
            Numbers that make no sense.
        """
        n_expert = hp.count("expert_count")
        if n_expert == 0:
            return None
        used = n_expert_used or hp.size("expert_used_count")
        if not 0 < used <= n_expert:
            raise hp.error(f"{used} of {n_expert} experts used")
        n_ff = hp.size("expert_feed_forward_length", n_ff)
        function = hp.count("expert_gating_func")
        if function not in (0, *_GATINGS):
            known = ", ".join(f"{number} ({name})" for number, name in _GATINGS.items())
            raise hp.error(f"key {hp.arch}.expert_gating_func: {function}; known are {known}")
        return cls(
            n_expert=n_expert,
            n_expert_used=used,
            n_ff=n_ff,
            n_ff_shared=hp.count("expert_shared_feed_forward_length", hp.count("expert_shared_count") * n_ff),
            act=act,
            gating=_GATINGS.get(function, gating),
            normalize=hp.flag("expert_weights_norm", normalize),
            scale=hp.number("expert_weights_scale", 1.0) or 1.0,
            n_group=max(hp.count("expert_group_count"), 1),
            n_group_used=max(hp.count("expert_group_used_count", 1), 1),
            n_latent=hp.count("moe_latent_size"),
        )

    def build(self, g: "Graph", w: "Weights", x: "Tensor", p: str, logits: "Tensor | None" = None) -> "Tensor":
        """The mixture for (n_tokens, n_embd), of the tensors that begin with `p`; `logits`: the router's, if not of x."""
        n_embd = x.shape[1]
        if logits is None:
            logits = w.linear(f"{p}.ffn_gate_inp", self.n_expert, x, node=f"{p}.router")
        each = w.table(self.n_expert, **{f"{p}.exp_probs_b.bias": 0.0, f"{p}.ffn_down_exps.scale": 1.0})
        route = g.op(
            "ROUTE",
            logits,
            *([] if each is None else [each]),
            n_used=self.n_expert_used,
            gating=self.gating,
            normalize=self.normalize,
            scale=self.scale,
            n_group=self.n_group,
            n_group_used=self.n_group_used,
            name=f"{p}.route",
        )

        both = f"{p}.ffn_gate_up_exps.weight"  # gates stand in front

        def experts(part: str, n_rows: int, n_cols: int, y: "Tensor") -> "Tensor":
            name = f"{p}.ffn_{part}_exps"
            bias = w.optional(f"{name}.bias", self.n_expert, n_rows)
            if part != "down" and w.has(both):
                shape = (self.n_expert, 2 * n_rows, n_cols)
                weight = w.rows(both, n_rows if part == "up" else 0, n_rows, *shape)
            else:
                weight = w(f"{name}.weight", self.n_expert, n_rows, n_cols)
            y = g.op("MUL_MAT_ID", weight, y, route, name=name if bias is None else f"{name}.product")
            return y if bias is None else g.op("ADD_EXPERT_BIAS", y, bias, route, name=name)

        n, taken = self.n_latent or n_embd, x
        if self.n_latent:
            taken = w.linear(f"{p}.ffn_latent_down", n, x)
        n_inputs, act, attrs = ACTS[self.act]
        parts = [experts(part, self.n_ff, n, taken) for part in ("gate", "up")[-n_inputs:]]
        down = experts("down", n, self.n_ff, g.op(act, *parts, name=f"{p}.ffn_act_exps", **attrs))
        y = g.op("COMBINE", down, route, name=f"{p}.experts")
        if self.n_latent:
            y = w.linear(f"{p}.ffn_latent_up", n_embd, y)
        if not self.n_ff_shared:
            return y
        shared = w.feed_forward(p, self.n_ff_shared, x, self.act, "_shexp")
        gate_row = w.optional_row(f"{p}.ffn_gate_inp_shexp.weight", n_embd)
        if gate_row is not None:
            amount = g.op("MUL_MAT", gate_row, x, name=f"{p}.shared_gate")
            shared = g.op("SIGMOID_GATE", shared, amount, name=f"{p}.shared_gated")
        return g.op("ADD", y, shared, name=f"{p}.ffn_out")
