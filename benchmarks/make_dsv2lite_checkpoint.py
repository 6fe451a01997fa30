"""A checkpoint with the shapes of DeepSeek-V2-Lite and random bfloat16 values, to measure the conversion of a large one.

    python benchmarks/make_dsv2lite_checkpoint.py OUT [--layers 5]

27 layers are the whole model, 31.4 GB; 5 are 5.7 GB, in shards of at most 2 GB. Config, names and shapes are those of
https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite; the tokenizer is a stand-in that knows little more than bytes.
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "bos_token_id": 258,
    "eos_token_id": 259,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
SHARD_BYTES = 2_000_000_000
CHUNK_VALUES = 1 << 22


def ffn(name: str, n_ff: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (n_ff, 2048)
    yield f"{name}.up_proj.weight", (n_ff, 2048)
    yield f"{name}.down_proj.weight", (2048, n_ff)


def shapes(n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (102400, 2048)
    for i in range(n_layer):
        p = f"model.layers.{i}"
        yield f"{p}.input_layernorm.weight", (2048,)
        yield f"{p}.self_attn.q_proj.weight", (16 * 192, 2048)
        yield f"{p}.self_attn.kv_a_proj_with_mqa.weight", (512 + 64, 2048)
        yield f"{p}.self_attn.kv_a_layernorm.weight", (512,)
        yield f"{p}.self_attn.kv_b_proj.weight", (16 * 256, 512)
        yield f"{p}.self_attn.o_proj.weight", (2048, 16 * 128)
        yield f"{p}.post_attention_layernorm.weight", (2048,)
        if i == 0:
            yield from ffn(f"{p}.mlp", 10944)
            continue
        yield f"{p}.mlp.gate.weight", (64, 2048)
        for expert in range(64):
            yield from ffn(f"{p}.mlp.experts.{expert}", 1408)
        yield from ffn(f"{p}.mlp.shared_experts", 2 * 1408)
    yield "model.norm.weight", (2048,)
    yield "lm_head.weight", (102400, 2048)


def chunks(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The values' upper halves, which are bfloat16: ones for a norm, or else of a standard deviation that keeps scale."""
    left = math.prod(shape)
    while left:
        n = min(left, CHUNK_VALUES)
        values = np.ones(n, np.float32) if len(shape) == 1 else rng.standard_normal(n, np.float32)
        if len(shape) > 1:
            values *= np.float32(shape[-1] ** -0.5)
        yield (values.view(np.uint32) >> 16).astype("<u2")
        left -= n


def save_weights(folder: Path, n_layer: int) -> int:
    """Writes the shards and their index; their bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes(n_layer):
        n_bytes = 2 * math.prod(shape)
        if n_bytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= n_bytes
    rng = np.random.default_rng(0)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file_name
        encoded = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for shape in shard.values():
                for chunk in chunks(shape, rng):
                    file.write(chunk.data)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def save_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    ends = [AddedToken(text, special=True) for text in ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")]
    tokenizer.add_special_tokens(ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": ends[0].content, "eos_token": ends[1].content, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": a.layers}, indent=2))
    save_tokenizer(a.out)
    print(f"{a.out}: {save_weights(a.out, a.layers) / 1e9:.1f} GB of weights")
