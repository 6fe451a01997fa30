"""The tokenizers of encoders as GGUF metadata: BERT's word pieces, and SentencePiece's unigrams."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import gguf
from gguf import TokenType

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Checkpoint, shown

#: tokenizer.json's `model.type`
ENCODER_MODELS = ("WordPiece", "Unigram")
_SPACE = "▁"


def write_encoder_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> None:
    """Add the ``tokenizer.*`` metadata of a tokenizer.json whose model is one of `ENCODER_MODELS`. Whether it gives the
    same tokens is checked afterwards, on texts.

    Raises
    ------
    ConversionError
        A broken tokenizer.json, or one with more tokens than the model's ``vocab_size``.
    UnsupportedError
        Settings that GGUF can't name.
    """
    where, n_vocab = checkpoint.folder / "tokenizer.json", checkpoint.config.integer("vocab_size")
    model = tokenizer["model"]
    try:
        texts, scores, unknown = (_word_pieces if model["type"] == "WordPiece" else _unigrams)(model)
        added = {int(token["id"]): (token["content"], bool(token.get("special"))) for token in tokenizer["added_tokens"]}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConversionError(f"{where}: its tokens can't be read: {error!r}") from error
    most = max([len(texts) - 1, *added])
    if most >= n_vocab:
        raise ConversionError(f"{where}: a token has id {most}, config.json's vocab_size is {n_vocab}")
    rows = [(text, score, TokenType.NORMAL) for text, score in zip(texts, scores, strict=True)]
    rows += [(f"[PAD{i}]", -10000.0, TokenType.UNUSED) for i in range(len(rows), n_vocab)]
    for i, (text, special) in added.items():
        rows[i] = (text, rows[i][1], TokenType.CONTROL if special else TokenType.USER_DEFINED)
    rows[unknown] = (*rows[unknown][:2], TokenType.UNKNOWN if model["type"] == "Unigram" else TokenType.CONTROL)
    first, last, two = _around(checkpoint, tokenizer)
    if model["type"] == "WordPiece":
        writer.add_tokenizer_model("bert")
        rows = [(text if type_ != TokenType.NORMAL else _spelled(text), score, type_) for text, score, type_ in rows]
        _write_bert_normalizer(writer, checkpoint, tokenizer)
    else:
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([score for _, score, _ in rows])
        _write_unigram_normalizer(writer, checkpoint, tokenizer)
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in rows])
    writer.add_token_types([int(type_) for _, _, type_ in rows])
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(last)
    writer.add_sep_token_id(last)
    writer.add_unk_token_id(unknown)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(two)
    settings = checkpoint.json("tokenizer_config.json", optional=True)
    ids = {text: i for i, (text, _, _) in enumerate(rows)}
    for kind, add in (("pad", writer.add_pad_token_id), ("mask", writer.add_mask_token_id)):
        token = settings.get(f"{kind}_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and name in ids:
            add(ids[name])


def _word_pieces(model: dict[str, Any]) -> tuple[list[str], list[float], int]:
    """Texts and scores by their ids, and the unknown token's id."""
    vocab: dict[str, int] = model["vocab"]
    if model.get("continuing_subword_prefix", "##") != "##":
        raise ValueError(f"continuing_subword_prefix {model['continuing_subword_prefix']!r}")
    texts = [""] * len(vocab)
    for text, i in vocab.items():
        texts[i] = text
    if set(vocab.values()) != set(range(len(vocab))):
        raise ValueError("ids with gaps")
    return texts, [0.0] * len(texts), vocab[model["unk_token"]]


def _unigrams(model: dict[str, Any]) -> tuple[list[str], list[float], int]:
    if model.get("byte_fallback"):
        raise ValueError("unigrams with bytes")
    return [text for text, _ in model["vocab"]], [float(score) for _, score in model["vocab"]], int(model["unk_id"])


def _spelled(text: str) -> str:
    """A word piece as GGUF has it: what begins a word is marked, not what continues one."""
    return text[2:] if text.startswith("##") else _SPACE + text


def _around(checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> tuple[int, int, bool]:
    """The tokens that are put before and behind a text, and whether two of the latter stand between two texts."""
    where, processor = checkpoint.folder / "tokenizer.json", tokenizer.get("post_processor") or {}
    try:
        if processor["type"] == "TemplateProcessing":
            first, middle, last = (part.get("SpecialToken", {}).get("id") for part in processor["single"])
            ids = {name: token["ids"][0] for name, token in processor["special_tokens"].items()}
            pair = [part.get("SpecialToken", {}).get("id") for part in processor["pair"]]
            if middle is None:
                return int(ids[first]), int(ids[last]), pair.count(last) > 2
        elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
            return int(processor["cls"][1]), int(processor["sep"][1]), processor["type"] == "RobertaProcessing"
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        pass
    raise UnsupportedError(f"{where}: post_processor {shown(processor)}; known: one token before a text, one behind it")


def _write_bert_normalizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> None:
    normalizer = tokenizer.get("normalizer") or {}
    lowercase = normalizer.get("lowercase", True)
    strip_accents = normalizer.get("strip_accents")
    if normalizer.get("type") != "BertNormalizer" or not isinstance(lowercase, bool):
        raise UnsupportedError(
            f"{checkpoint.folder / 'tokenizer.json'}: normalizer {shown(normalizer)}; known: BertNormalizer"
        )
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lowercase if strip_accents is None else bool(strip_accents))


def _write_unigram_normalizer(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> None:
    from .vocabulary import _steps

    where = checkpoint.folder / "tokenizer.json"
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    cuts = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prefix = any(s.get("type") == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in cuts)
    single = any(s.get("type") == "WhitespaceSplit" for s in cuts) or any(s.get("type") == "Replace" for s in normalizers)
    for step in normalizers:
        if step.get("type") == "Precompiled":
            try:
                writer.add_precompiled_charsmap(base64.b64decode(step["precompiled_charsmap"], validate=True))
            except (KeyError, TypeError, binascii.Error) as error:
                raise ConversionError(f"{where}: its precompiled_charsmap can't be read: {error!r}") from error
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(single)
