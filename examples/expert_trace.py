"""Which experts a mixture chooses, token by token.

python examples/expert_trace.py [MODEL]
"""

import sys

import ggpy
from ggpy.generate.experts import expert_use, simulate_cache


def main(path: str) -> None:
    text = "And the LORD said unto Moses, Stretch out thine hand over the sea."
    with ggpy.load(path, n_ctx=256) as model:
        ids = model.tokenize(text)
        use = expert_use(model, ids)  # trace: (n_tokens, n_layers, n_expert_used)
        print(f"{'token':<16}" + "".join(f"layer {i:<6}" for i in use.layers))
        for token, experts in zip(ids, use.trace, strict=True):
            row = "".join(f"{', '.join(map(str, chosen)):<12}" for chosen in experts)
            print(f"{model.detokenize([token])!r:<16}{row}")
        n_experts = use.counts.size
        hits = simulate_cache(use.trace, n_experts // 2, "lru")
        print(f"With half of the {n_experts} experts in memory, {hits:.0%} of the choices would find theirs there.")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
