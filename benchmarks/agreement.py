"""Do ggpy's logits agree with llama.cpp's on the same file, and with transformers on the same checkpoint?

    python benchmarks/agreement.py MODEL.gguf [--text FILE] [-n 256] [--checkpoint FOLDER]

Prints, over n tokens of the text: the mean and largest Kullback-Leibler divergence (nats) of ggpy's distribution from the
other's, how often both have the same likeliest token, and the largest difference of logits.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Agreement of two arrays of logits (n, n_vocab)."""
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = (np.exp(p) * (p - q)).sum(-1)
    top = np.sort(theirs, -1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    delta = np.abs(ours - theirs).max()
    close = top[:, -1] - top[:, -2] <= delta
    return {
        "mean KL": float(kl.mean()),
        "max KL": float(kl.max()),
        "top-1 agreement": float(same.mean()),
        "top-1 agreement where it's decided": float((same | close).mean()),
        "max |difference|": float(delta),
    }


def transformers_logits(folder: str, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def main() -> None:
    from engines import ENGINES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "text.txt")
    parser.add_argument("-n", "--tokens", type=int, default=256)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="compare with transformers on this folder instead of llama.cpp")
    a = parser.parse_args()
    # transformers keeps its cache in float32; llama.cpp's is float16 as ours.
    ggpy = ENGINES["ggpy"](a.model, a.tokens, a.threads, "f32" if a.checkpoint else "f16")
    ids = ggpy.tokenize(a.text.read_text())[: a.tokens]
    ours = ggpy.logits(ids)
    if a.checkpoint:
        theirs = transformers_logits(a.checkpoint, ids)
    else:
        theirs = ENGINES["llama-cpp-python"](a.model, a.tokens, a.threads).logits(ids)
    other = "transformers" if a.checkpoint else "llama.cpp"
    print(f"{a.model}: {len(ids)} tokens, ggpy against {other}")
    for name, value in compare(ours, theirs).items():
        print(f"  {name:<36} {value:.3g}")


if __name__ == "__main__":
    main()
