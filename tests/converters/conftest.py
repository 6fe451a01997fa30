"""Tiny random checkpoints, made by transformers and tokenizers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ggpy.generate.pretokenizers import PRETOKENIZERS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N_VOCAB = 512
TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock,   isn't it?\n\n",
    "def f(x):\n    return x + 1\n\tDie Straße ist größer als 1000 Meter; we've seen that they'll go there.",
    "in the there that then these over under other another mother brother and the hand stands",
]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


# The list of letters in DeepSeek V2's tokenizer.json, which has the characters themselves.
CASED_LETTERS = re.sub(r"\\x\{(\w+)\}", lambda m: chr(int(m[1], 16)), PRETOKENIZERS["deepseek-llm"].patterns[1])
DEEPSEEK3_PATTERN = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def patterns(*regexes, digits=()):
    """Regular expressions in sequence, each applied to the pieces that the one before left."""
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, *digits, byte_level])


# The pre-tokenizers in the tokenizer.json of models with this tokenizer.ggml.pre.
SPLITTINGS = {
    "gpt-2": GPT2_WORDS,
    "olmo": GPT2_WORDS,
    "smollm": pre_tokenizers.Sequence([DIGITS, GPT2_WORDS]),
    "llama-bpe": patterns(LLAMA3_PATTERN),
    "glm4": patterns(LLAMA3_PATTERN),
    "qwen2": patterns(LLAMA3_PATTERN.replace("{1,3}", "")),
    "deepseek-llm": patterns(
        "[\r\n]",
        CASED_LETTERS,
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-\ud7ff]+",
        digits=[DIGITS],
    ),
    "deepseek-v3": patterns(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3_PATTERN),
}


def train_tokenizer(pre):
    """A byte-level BPE tokenizer; that of "llama-bpe" puts <|endoftext|> first and ignores merges, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "glm4")))
    tokenizer.pre_tokenizer = SPLITTINGS[pre]
    if pre in ("olmo", "qwen2"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B", special_tokens=[("<|endoftext|>", 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 20,  # checkpoints round their number of tokens up
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def save_tokenizer(folder, pre="smollm"):
    train_tokenizer(pre).save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": {"content": "<|endoftext|>", "special": True},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far apart, so that a wrong weight shows
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def save_llama(folder, dtype=torch.float32, pre="smollm", shard_size="10GB", **changes):
    """A random LlamaForCausalLM with its tokenizer; returns the folder."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))
    with torch.no_grad():
        for weights in model.parameters():  # norms and biases too, which start as ones and zeros
            weights.add_(0.1 * torch.randn_like(weights))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder, pre)
    return Path(folder)


def save_mistral(folder):
    torch.manual_seed(2)
    model = MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, rms_norm_eps=1e-6))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder, "llama-bpe")
    return Path(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """float32, one file, tied embeddings."""
    return save_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory):
    """bfloat16, shards, an output matrix, heads wider than the embedding's share."""
    return save_mistral(tmp_path_factory.mktemp("mistral"))


@pytest.fixture
def damaged_folder(llama_folder, tmp_path):
    """A copy of the checkpoint for a test to damage."""
    return Path(shutil.copytree(llama_folder, tmp_path / "checkpoint"))
