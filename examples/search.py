"""Embeddings: the texts that are nearest to a query.

    python examples/search.py [MODEL]

A model made for embeddings does this well. Any model can do it somehow: here, one trained to continue text.
"""

import sys

import ggpy

TEXTS = (
    "And he went up into the mountain, and prayed.",
    "The waters of the river were turned to blood.",
    "And they sat down to eat bread and to drink wine.",
    "The sword of the enemy is sharp, and the battle is long.",
    "She gleaned in the field after the reapers.",
)


def main(path: str) -> None:
    queries = ("They did eat and were filled.", "He climbed up to the top of the hill.")
    with ggpy.load(path, n_ctx=256) as model:
        texts = model.embed(TEXTS, pooling="mean")  # float32 (n_texts, n_embd), of length 1
        for query, vector in zip(queries, model.embed(queries, pooling="mean"), strict=True):
            scores = texts @ vector
            print(query)
            for i in scores.argsort()[::-1][:3]:
                print(f"  {scores[i]:.3f} {TEXTS[i]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
