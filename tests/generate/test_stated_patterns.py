"""Ids beside those of Hugging Face's tokenizers with the patterns that transformers states. The full comparison, with many
more texts and llama.cpp, is benchmarks/token_ids.py."""

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from ggpy.generate.pretokenizers import PRETOKENIZERS
from ggpy.generate.tokenizer import Tokenizer

from .test_tokenizer import bpe_metadata, trained_bpe
from .texts import odd_lines

try:  # not all releases of transformers have them
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
except ImportError:
    SPLITS = {}


def of_transformers() -> dict[str, pre_tokenizers.PreTokenizer]:
    """What transformers' classes cut texts by."""
    with_digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    gpt2, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Sequence(with_digits)
    cutters = dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "modern-bert", "roberta-bpe"), gpt2)
    cutters |= dict.fromkeys(("command-r", "starcoder", "smollm"), digits)
    splits = SPLITS | {"qwen2": QWEN2}
    return cutters | {name: cutter([pattern]) for name, pattern in splits.items() if isinstance(pattern, str)}


def cutter(patterns: list[str]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def beside(pre: str, cut: pre_tokenizers.PreTokenizer, lines: list[str]) -> list[str]:
    """The lines for which ggpy gives other ids than Hugging Face's tokenizers, both with one small vocabulary."""
    row, (tokens, merges) = PRETOKENIZERS[pre], trained_bpe()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, ignore_merges=row.ignore_merges))
    theirs.pre_tokenizer = cut
    if row.nfc:
        theirs.normalizer = normalizers.NFC()
    ours = Tokenizer.from_metadata(bpe_metadata(pre))
    expected = [found.ids for found in theirs.encode_batch(lines)]
    return [line for line, ids in zip(lines, expected, strict=True) if ours.encode(line, special=False, bos=False) != ids]


@pytest.mark.parametrize("pre", sorted(of_transformers()))
def test_ids_equal_on_odd_texts(pre):
    assert beside(pre, of_transformers()[pre], list(odd_lines(200, seed=9))) == []
