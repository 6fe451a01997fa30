"""Models of llama.cpp's architectures, as far as a quantizer looks at them: names, shapes, hyperparameters."""

import gguf
import numpy as np


def matrices(*names_and_shapes):
    return dict(names_and_shapes)


def attention(n_embd, n_kv):
    return {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_embd, n_embd),
        "attn_k.weight": (n_kv, n_embd),
        "attn_v.weight": (n_kv, n_embd),
        "attn_output.weight": (n_embd, n_embd),
        "ffn_norm.weight": (n_embd,),
    }


def dense(n_embd, n_ff):
    return {"ffn_gate.weight": (n_ff, n_embd), "ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)}


def experts(n_embd, n_ff, n_expert):
    return {
        "ffn_gate_inp.weight": (n_expert, n_embd),
        "ffn_gate_exps.weight": (n_expert, n_ff, n_embd),
        "ffn_up_exps.weight": (n_expert, n_ff, n_embd),
        "ffn_down_exps.weight": (n_expert, n_embd, n_ff),
    }


def shared(n_embd, n_ff):
    return {name.replace(".weight", "_shexp.weight"): shape for name, shape in dense(n_embd, n_ff).items()}


def latent_attention(n_embd, n_head, split):
    """DeepSeek-V2's; newer files have kv_b split by head."""
    halves = {"attn_k_b.weight": (n_head, 256, 128), "attn_v_b.weight": (n_head, 128, 256)}
    return {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_head * 192, n_embd),
        "attn_kv_a_mqa.weight": (256 + 64, n_embd),
        "attn_kv_a_norm.weight": (256,),
        **(halves if split else {"attn_kv_b.weight": (n_head * 256, 256)}),
        "attn_output.weight": (n_embd, n_head * 128),
        "ffn_norm.weight": (n_embd,),
    }


def model(n_embd, layers, tied=False, n_vocab=64):
    tensors = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    if not tied:
        tensors["output.weight"] = (n_vocab, n_embd)
    for i, layer in enumerate(layers):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def hyperparameters(arch, n_embd, n_layer, n_head, n_head_kv, n_ff, n_expert=0, **more):
    keys = {
        "context_length": 512,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "vocab_size": 64,
        **({"expert_count": n_expert, "expert_used_count": 2} if n_expert else {}),
        **more,
    }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def deepseek2(split):
    layers = [latent_attention(512, 4, split) | dense(512, 768)]
    layers += [latent_attention(512, 4, split) | experts(512, 256, 6) | shared(512, 512) for _ in range(26)]
    more = {
        "leading_dense_block_count": 1,
        "attention.kv_lora_rank": 256,
        "attention.key_length": 320,
        "attention.value_length": 256,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "expert_feed_forward_length": 256,
        "expert_shared_count": 2,
        "rope.dimension_count": 64,
    }
    keys = hyperparameters("deepseek2", 512, 27, 4, 1 if split else 4, 768, 6, **more)
    return keys, model(512, layers)


#: name -> architecture's hyperparameters, tensors. Wide enough only for blocks of 256.
SHAPES = {
    "llama": (hyperparameters("llama", 256, 30, 9, 3, 512), model(256, [attention(256, 128) | dense(256, 512)] * 30)),
    "llama_odd_rows": (  # 288 and 40 can't be cut into blocks of 256, 40 not into 32 either
        hyperparameters("llama", 288, 8, 9, 3, 40),
        model(288, [attention(288, 96) | dense(288, 40)] * 8, tied=True),
    ),
    "llama_70b": (hyperparameters("llama", 256, 80, 8, 1, 256), model(256, [attention(256, 32) | dense(256, 256)] * 80)),
    "mixtral": (
        hyperparameters("llama", 256, 32, 8, 2, 256, 8),
        model(256, [attention(256, 64) | experts(256, 256, 8)] * 32),
    ),
    "qwen2": (
        hyperparameters("qwen2", 512, 28, 4, 2, 768),
        model(512, [attention(512, 256) | {"attn_v.bias": (256,)} | dense(512, 768)] * 28, tied=True),
    ),
    "qwen2_grouped": (
        hyperparameters("qwen2", 512, 24, 8, 2, 768),
        model(512, [attention(512, 128) | {"attn_q.bias": (512,)} | dense(512, 768)] * 24),
    ),
    "deepseek2": deepseek2(split=False),
    "deepseek2_split": deepseek2(split=True),
    "falcon": (
        hyperparameters("falcon", 256, 32, 4, 1, 1024),
        model(
            256,
            [
                {
                    "attn_norm.weight": (256,),
                    "attn_qkv.weight": (384, 256),
                    "attn_output.weight": (256, 256),
                    "ffn_up.weight": (1024, 256),
                    "ffn_down.weight": (256, 1024),
                }
            ]
            * 32,
        ),
    ),
}


def write_gguf(path, keys, tensors, values=None, arch=None):
    """A GGUF file of float32 tensors; without `values`, {name: array}, a hole is where the data would be."""
    writer = gguf.GGUFWriter(None, arch or next(iter(keys)).split(".")[0])
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, shape in tensors.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        for name, shape in tensors.items():
            file.seek(-file.tell() % 32, 1)
            file.truncate(file.tell() + -file.tell() % 32)
            file.seek(0, 2)
            if values is None:
                file.truncate(file.tell() + 4 * int(np.prod(shape)))
                file.seek(0, 2)
            else:
                file.write(np.ascontiguousarray(values[name], np.float32).tobytes())
        file.truncate(file.tell() + -file.tell() % 32)
    return path
