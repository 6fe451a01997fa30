"""Hooks: switch one layer off after the other, and see what each is worth.

python examples/layer_off.py [MODEL]
"""

import sys

import numpy as np

import ggpy

TEXT = "And it came to pass, when the king heard the words of the book of the law, that he rent his clothes."


def surprise(model: ggpy.Model, ids: list[int]) -> float:
    """The mean of -log p over a text's tokens, in nats."""
    (score,) = model.score(ids[:1], [ids[1:]])
    return -score.logprob / len(score.ids)


def main(path: str) -> None:
    with ggpy.load(path, n_ctx=256) as model:
        ids = model.tokenizer.encode_prompt(TEXT)
        print(f"all layers: {surprise(model, ids):.2f} nats a token")
        for i in range(1, model.architecture.n_layer):
            before: list[np.ndarray] = []

            def keep(name: str, value: np.ndarray, kept: list[np.ndarray] = before) -> None:
                kept[:] = [value.copy()]

            def give_back(name: str, value: np.ndarray, kept: list[np.ndarray] = before) -> np.ndarray:
                return kept[0]  # what went in comes out

            with model.hooked({f"blk.{i - 1}.out": keep, f"blk.{i}.out": give_back}):
                print(f"without layer {i}: {surprise(model, ids):.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
