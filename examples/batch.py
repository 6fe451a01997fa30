"""Many prompts at once, each with the text that it gives alone; and the best of several tries.

python examples/batch.py [MODEL]
"""

import sys

import ggpy

PROMPTS = ("In the beginning", "And the king said", "Blessed are they that", "Woe unto")


def main(path: str) -> None:
    options: ggpy.GenerationOptions = {"max_tokens": 24, "temperature": 0.8, "seed": 0}
    with ggpy.load(path, n_ctx=1024) as model:
        for done in model.generate_batch(PROMPTS, **options):  # as they end
            print(f"{done.index}: {PROMPTS[done.index]}{done.text}")

        print("\nThe two likeliest of eight:")
        for done in model.generate_batch(PROMPTS[:1], n=2, best_of=8, **options):
            mean = sum(piece.logprob or 0 for piece in done.pieces) / len(done.pieces)
            print(f"{mean:6.2f} {PROMPTS[0]}{done.text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
