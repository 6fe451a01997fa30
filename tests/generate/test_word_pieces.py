"""Tokenizers of encoders, word pieces and unigrams, against tokenizers', sentencepiece's and llama.cpp's."""

import io
import json
import re
from functools import cache

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from converters.vocabulary import _fields
from ggpy.errors import TokenizerError
from ggpy.generate.tokenizer import Tokenizer

from .test_tokenizer import CONTROL, NORMAL, UNKNOWN, LlamaCpp, assert_same_ids, write_vocabulary
from .texts import mixed_lines, odd_lines

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ODD = ["", " ", "a" * 101, "[CLS] x [MASK]y [SEP]", "e\u0301\u0301 \u200b\x00\x07 İstanbul ǅ ﬁ", "\U00040000", "##ing #"]


@cache
def trained_wordpiece(lowercase, strip_accents):
    """A BERT tokenizer of the tokenizers package."""
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator(mixed_lines(2000, seed=1), trainer)
    trained.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return trained


def bert_metadata(trained, **changes):
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    words = sorted(vocab, key=vocab.get)[len(SPECIAL) :]
    # As llama.cpp's converter spells them.
    tokens = [*SPECIAL, *(w[2:] if w.startswith("##") else f"\u2581{w}" for w in words)]
    fields = {
        "model": "bert",
        "tokens": tokens,
        "token_type": [CONTROL] * len(SPECIAL) + [NORMAL] * len(words),
        "unknown_token_id": 1,
        "bos_token_id": 2,
        "seperator_token_id": 3,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("lowercase", "strip_accents"), [(True, None), (False, None), (True, False), (False, True)], ids=str
)
def test_word_pieces_equal_tokenizers(lowercase, strip_accents):
    trained = trained_wordpiece(lowercase, strip_accents)
    flags = {"normalizer.lowercase": lowercase, "normalizer.strip_accents": strip_accents}
    ours = Tokenizer.from_metadata(bert_metadata(trained, **flags))
    assert_same_ids(
        lambda line: ours.encode(line, bos=False),
        lambda line: trained.encode(line, add_special_tokens=False).ids,
        [*mixed_lines(3000, seed=3), *ODD],
    )
    assert ours.encode("Hello, you") == trained.encode("Hello, you").ids
    assert ours.encode("") == [2, 3]


def test_word_pieces_equal_llama_cpp(tmp_path):
    metadata = bert_metadata(trained_wordpiece(True, None))
    write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    oracle, ours = LlamaCpp(tmp_path / "vocabulary.gguf"), Tokenizer.from_metadata(metadata)
    # It keeps some combining marks that BERT takes away, and doesn't take Korean syllables apart.
    odd = re.compile("[\u0483-\u0489\u0900-\u0e4e\u3040-\u30ff\uac00-\ud7a3]")
    lines = [line for line in mixed_lines(3000, seed=5) if not odd.search(line)]
    assert_same_ids(lambda line: ours.encode(line, special=False, bos=False), oracle.encode, lines)
    oracle.close()
    assert len(lines) > 1000


def test_words_come_back_with_single_spaces():
    ours = Tokenizer.from_metadata(bert_metadata(trained_wordpiece(True, None)))
    assert ours.decode(ours.encode("The  QUICK   brown fox!")) == "the quick brown fox !"


@cache
def trained_unigrams(**options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.replace("\n", " ") for line in mixed_lines(2000, seed=1)]),
        model_writer=out,
        vocab_size=600,
        model_type="unigram",
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        pad_id=3,
        **options,
    )
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(out.getvalue())
    return model, out.getvalue()


def unigram_metadata(model, data, **changes):
    normalizer = next(dict(_fields(value)) for number, value in _fields(data) if number == 3)
    ids = range(model.get_piece_size())
    fields = {
        "model": "t5",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else NORMAL for i in ids],
        "precompiled_charsmap": normalizer[2],
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "unknown_token_id": model.unk_id(),
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
    }
    fields |= changes
    fields["precompiled_charsmap"] = list(fields["precompiled_charsmap"])
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_unigrams_equal_sentencepiece(prefix):
    model, data = trained_unigrams(add_dummy_prefix=prefix)
    ours = Tokenizer.from_metadata(unigram_metadata(model, data, add_space_prefix=prefix))
    lines = [*mixed_lines(3000, seed=7), "", "   ", "<s> a </s> <pad>", "<unk>", "\u0000 \ufb01"]
    assert_same_ids(lambda line: ours.encode(line, special=False, bos=False), model.encode, lines)
    assert ours.encode("fox") == [*model.encode("fox"), model.eos_id()]
    assert ours.encode("<s>fox</s>", bos=False) == [1, *model.encode("fox"), 2]


@pytest.mark.parametrize(("prefix", "extra"), [(True, True), (True, False), (False, False)])
def test_unigrams_equal_tokenizers_on_odd_texts(prefix, extra):
    """Where Hugging Face's package departs from sentencepiece, in marks behind spaces and line ends, it is followed."""
    model, data = trained_unigrams(add_dummy_prefix=prefix, remove_extra_whitespaces=extra)
    metadata = unigram_metadata(model, data, add_space_prefix=prefix, remove_extra_whitespaces=extra)
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    theirs = tokenizers.Tokenizer(models.Unigram(pieces, model.unk_id(), False))
    theirs.normalizer = normalizers.Precompiled(bytes(metadata["tokenizer.ggml.precompiled_charsmap"]))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=extra)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces]) if extra else spaces
    ours = Tokenizer.from_metadata(metadata)
    # Only sentencepiece puts a space before a text that begins with one.
    lines = [line if extra else f"x{line}" for line in odd_lines(500)]
    assert_same_ids(lambda line: ours.encode(line, special=False, bos=False), lambda line: theirs.encode(line).ids, lines)


def test_unigrams_equal_llama_cpp(tmp_path):
    metadata = unigram_metadata(*trained_unigrams(add_dummy_prefix=True))
    write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
    oracle, ours = LlamaCpp(tmp_path / "vocabulary.gguf"), Tokenizer.from_metadata(metadata)
    assert_same_ids(lambda line: ours.encode(line, special=False, bos=False), oracle.encode, mixed_lines(2000, seed=8))
    oracle.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precompiled_charsmap": b"xyz"}, r"precompiled_charsmap"),
        ({"scores": [0.0]}, "scores has 1 elements"),
    ],
)
def test_bad_unigrams_are_named(changes, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(unigram_metadata(*trained_unigrams(add_dummy_prefix=True), **changes))
