"""Tiny random models of transformers, converted, to compare logits with."""

import numpy as np
import torch
import transformers

from converters import convert
from tests.converters.conftest import N_VOCAB, save_tokenizer

N_TOKENS = 128


def ids(n=N_TOKENS, seed=0):
    """Random tokens of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


def converted(folder, model, type="f32"):
    """Saves a transformers model as a checkpoint and converts it; the path of the GGUF file."""
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    save_tokenizer(checkpoint)
    out = folder / f"{type}.gguf"
    convert(checkpoint, out, type)
    return out


def random_model(cls, config, seed=0):
    """A model with random weights, large enough that its logits differ clearly, and norms that aren't 1."""
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                around_1 = name.endswith("scale") or ("norm" in name.lower() and name.endswith("weight"))
                p.normal_(1.0 if around_1 else 0.0, 0.2)
            else:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model


def transformers_logits(model, tokens):
    """float32 (n_tokens, n_vocab)."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
