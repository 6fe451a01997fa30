"""Quantize a model to several types: size, and how far its predictions move.

python examples/quantization_sweep.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import ggpy
from ggpy.hub import model_file

TEXT = "And David said unto Saul, Thy servant kept his father's sheep, and there came a lion, and a bear."


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def main(path: str) -> None:
    source = model_file(path, "f16")
    with ggpy.load(source, n_ctx=256) as model:
        ids = model.tokenize(TEXT)
        base = log_softmax(model.logits(ids))
    print(f"{'type':<8}{'MB':>6}{'KL divergence':>16}{'same best token':>18}")
    with tempfile.TemporaryDirectory() as folder:
        for type in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"):
            out = Path(folder) / f"{type}.gguf"
            ggpy.quantize(source, out, type)
            with ggpy.load(out, n_ctx=256) as model:
                other = log_softmax(model.logits(ids))
            divergence = float((np.exp(base) * (base - other)).sum(axis=-1).mean())
            same = float((base.argmax(-1) == other.argmax(-1)).mean())
            print(f"{type:<8}{out.stat().st_size / 1e6:>6.1f}{divergence:>16.4f}{same:>18.0%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
