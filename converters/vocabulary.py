"""A checkpoint's tokenizer as GGUF metadata, and the check that both give the same tokens."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from ggpy.errors import ConversionError, Error, UnsupportedError

from .checkpoint import Checkpoint

WORDS_WITH_SIGN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS_BY_CASE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# DeepSeek V2's tokenizer lists all letters that have case, in hundreds of ranges; this stands for the list.
CASED_LETTERS = "\\s?[letters with case]+"
CASED_LETTERS_LISTED = re.compile(r"\\s\?\[A-Za-zµÀ-ÖØ-öø-[^\]]*\]\+")
DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How a tokenizer.json splits text before merging (see `_splitting`) -> GGUF's name for it, tokenizer.ggml.pre.
SPLITTINGS: dict[tuple[tuple[Any, ...], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", WORDS_WITH_SIGN % r"\p{N}{1,3}", "Isolated"), ("ByteLevel", False)): "smaug-bpe",
    (("Split", WORDS_WITH_SIGN % r"\p{N}{1,3}", "Isolated"), ("ByteLevel", False), ("ignore_merges",)): "llama-bpe",
    (("Split", WORDS_WITH_SIGN % r"\p{N}", "Isolated"), ("ByteLevel", False)): "deepseek-r1-qwen",
    (("NFC",), ("Split", WORDS_WITH_SIGN % r"\p{N}", "Isolated"), ("ByteLevel", False)): "qwen2",
    (("Split", WORDS_BY_CASE, "Isolated"), ("ByteLevel", False), ("ignore_merges",)): "tekken",
    (("NFC",), ("ByteLevel", True)): "olmo",
    (
        ("Split", r"[\r\n]", "Isolated"),
        ("Split", CASED_LETTERS, "Isolated"),
        ("Split", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", "Isolated"),
        ("Split", r"\s+$", "Isolated"),
        ("Split", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", "Isolated"),
        ("Digits", True),
        ("ByteLevel", False),
    ): "deepseek-llm",
    (
        ("Split", r"\p{N}{1,3}", "Isolated"),
        ("Split", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "Isolated"),
        ("Split", DEEPSEEK3_WORDS, "Isolated"),
        ("ByteLevel", False),
    ): "deepseek-v3",
}

# It warns of templates for pairs of texts, which no conversion needs.
logging.getLogger("gguf.vocab").setLevel(logging.ERROR)

# Added tokens that take part in a model's format although tokenizer.json doesn't call them special.
FORMAT_TOKENS = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)

# A text of many scripts, kinds of space, digits and signs, on which both tokenizers must agree, piece by piece.
CHECK_TEXTS = (
    "Hello, world! It's 7 o'clock; they'LL say \"we've won\" & I'D agree.",
    " one leading space,  two  inside,   three at the end   ",
    "lines\nand\n\nmore\r\nlines\t\ttabs \t mixed\n   \n  indented\n",
    "1 22 333 4444 55555 1234567890 3.14159 -2e10 0x1F ½ ² ٣٤٥ 10:30 1,000,000",
    "def f(x, *args):\n    if x != 0:\n        return {'a': [x ** 2, x // 3]}  # why?\n\n\nclass A_b2: pass",
    '<div class="x">a &lt; b</div> http://example.org/path?q=1&r=%20#top user@example.org C:\\dir\\file.txt',
    "café naïve Straße ÅNGSTRÖM İstanbul e\u0301 ﬁ № ™ … “quoted” ‘so’ – — •",
    "Съешь ещё этих мягких булок. Ξεσκεπάζω. שלום עולם مرحبا بالعالم हिन्दी में ไทย 한국어",
    "我想在苹果公司工作。日本語のテキスト、カタカナ。「引用」！",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇨🇭 ✅ ♥ \u200b zero\u00a0width ideographic\u3000space",
    "!!!???... ---===+++ ((())) [[]] {{}} <<>> ``` $$$ @#%^&*~ |\\/ __init__ a/b/c",
    "CamelCaseWordsHTTPServer snake_case_words kebab-case aaaaaaaaaaaaaaaaaaaaaaaa",
)


@dataclass(frozen=True)
class Piece:
    """A piece of a SentencePiece vocabulary; its types are numbered as GGUF's."""

    text: str
    score: float
    type: int


def write_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the ``tokenizer.*`` metadata.

    Parameters
    ----------
    writer : gguf.GGUFWriter
    checkpoint : Checkpoint
        With a tokenizer.model (SentencePiece) or a tokenizer.json.

    Raises
    ------
    ConversionError
        No tokenizer, a broken one, or one with more tokens than the model's ``vocab_size``.
    UnsupportedError
        A kind of tokenizer that GGUF can't name, or that ggpy doesn't know.
    """
    n_vocab = checkpoint.config.integer("vocab_size")
    settings = checkpoint.json("tokenizer_config.json", optional=True)
    tokenizer = checkpoint.json("tokenizer.json", optional=True)
    model = checkpoint.folder / "tokenizer.model"
    add_space_prefix = settings.get("add_prefix_space")
    if model.is_file():
        kind = "llama"
        pieces, adds_prefix = read_sentencepiece(model)
        tokens = [(piece.text, piece.score, piece.type) for piece in pieces]
        rows = dict(enumerate(tokens)) | _added_tokens(checkpoint, settings)
    elif tokenizer:
        kind, adds_prefix = _kind(checkpoint, tokenizer)
        rows = _tokens_of_json(checkpoint, tokenizer, kind)
    else:
        raise ConversionError(f"{checkpoint.folder}: neither tokenizer.json nor tokenizer.model here")
    if kind == "llama" and add_space_prefix is None and not adds_prefix:
        add_space_prefix = False

    if rows and max(rows) >= n_vocab:
        text = rows[max(rows)][0]
        raise ConversionError(
            f"{checkpoint.folder}: token {text!r} has id {max(rows)}, config.json's vocab_size is {n_vocab}"
        )
    filled = [rows.get(i, (f"[PAD{i}]", -10000.0, TokenType.UNUSED)) for i in range(n_vocab)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default" if kind == "llama" else _pre(checkpoint, tokenizer))
    writer.add_token_list([text for text, _, _ in filled])
    if kind == "llama":
        writer.add_token_scores([float(score) for _, score, _ in filled])
    writer.add_token_types([int(type_) for _, _, type_ in filled])
    if isinstance(add_space_prefix, bool):
        writer.add_add_space_prefix(add_space_prefix)
    _write_special(writer, checkpoint, tokenizer, [text for text, _, _ in filled], load_merges=kind == "gpt2")


def _kind(checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> tuple[str, bool]:
    """GGUF's tokenizer.ggml.model for a tokenizer.json, and whether a space is put before the text."""
    model = tokenizer.get("model") or {}
    where = checkpoint.folder / "tokenizer.json"
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files don't say
    if kind != "BPE":
        raise UnsupportedError(f"{where}: model type {kind!r}; known: BPE")
    if model.get("byte_fallback"):
        steps = _steps(tokenizer.get("normalizer"), "normalizers") + _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
        adds_prefix = any(
            step.get("type") == "Prepend"
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        return "llama", adds_prefix
    if not any(step.get("type") == "ByteLevel" for step in _steps(tokenizer.get("decoder"), "decoders")):
        raise UnsupportedError(f"{where}: a BPE of characters; known: BPE of bytes, and with byte fallback")
    return "gpt2", False


def _steps(part: Any, parts: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as a flat list of steps."""
    if not part:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part.get(parts, []) for step in _steps(inner, parts)]
    return [part]


def _splitting(tokenizer: dict[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """The steps that a text takes before its pieces are merged, each as its type and what in it changes the pieces."""
    splitting: list[tuple[Any, ...]] = [(step.get("type"),) for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        match step.get("type"):
            case "Split":
                pattern = (step.get("pattern") or {}).get("Regex") or ""
                # Some files have the line breaks themselves.
                pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
                if CASED_LETTERS_LISTED.fullmatch(pattern):
                    pattern = CASED_LETTERS
                splitting.append(("Split", pattern, step.get("behavior")))
            case "Digits":
                splitting.append(("Digits", step.get("individual_digits", False)))
            case "ByteLevel" if not step.get("add_prefix_space"):
                splitting.append(("ByteLevel", step.get("use_regex", True)))
            case other:
                splitting.append((other, json.dumps(step)))
    if tokenizer["model"].get("ignore_merges"):
        splitting.append(("ignore_merges",))
    return tuple(splitting)


def _pre(checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> str:
    splitting = _splitting(tokenizer)
    if splitting not in SPLITTINGS:
        known = ", ".join(SPLITTINGS.values())
        where = checkpoint.folder / "tokenizer.json"
        raise UnsupportedError(f"{where}: splits text by {list(splitting)}, which none of {known} does")
    return SPLITTINGS[splitting]


def _tokens_of_json(checkpoint: Checkpoint, tokenizer: dict[str, Any], kind: str) -> dict[int, tuple[str, float, int]]:
    """Id -> text, score, type of every token."""
    model = tokenizer["model"]
    where = checkpoint.folder / "tokenizer.json"
    # A vocabulary of pieces merges by scores. tokenizer.json has the order of merges instead, which is the order of
    # falling scores: the first merge that makes a piece ranks it.
    scores: dict[str, float] = {}
    if kind == "llama":
        for rank, merge in enumerate(model["merges"]):
            scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    lowest = -float(len(model["merges"]))
    rows: dict[int, tuple[str, float, int]] = {}
    for text, i in model["vocab"].items():
        type_ = TokenType.NORMAL
        if kind == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            type_ = TokenType.BYTE
        elif kind == "llama" and text == model.get("unk_token"):
            type_ = TokenType.UNKNOWN
        if not isinstance(i, int) or i < 0 or i in rows:
            raise ConversionError(f"{where}: token {text!r} has no id of its own")
        rows[i] = (text, scores.get(text, lowest), type_)
    for token in tokenizer.get("added_tokens") or []:
        i, text = token["id"], token["content"]
        if rows.get(i, (text,))[0] != text:
            raise ConversionError(f"{where}: tokens {rows[i][0]!r} and {text!r} both have id {i}")
        if i not in rows or rows[i][2] != TokenType.UNKNOWN:
            rows[i] = _added(text, bool(token.get("special")))
    return rows


def _added(text: str, special: bool) -> tuple[str, float, int]:
    if special or FORMAT_TOKENS.fullmatch(text):
        return text, -1000.0, TokenType.CONTROL
    # These are looked for in the text as the user wrote it, with spaces.
    return text.replace("▁", " "), -1000.0, TokenType.USER_DEFINED


def _added_tokens(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[int, tuple[str, float, int]]:
    """Tokens that files beside a tokenizer.model add to it, or whose type they change."""
    rows: dict[int, tuple[str, float, int]] = {}
    try:
        for text, i in checkpoint.json("added_tokens.json", optional=True).items():
            rows[int(i)] = (text, -1000.0, TokenType.USER_DEFINED)
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            rows[int(i)] = _added(token["content"], bool(token.get("special")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{checkpoint.folder}: its added tokens can't be read: {error}") from error
    return rows


def _write_special(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokenizer: dict[str, Any], tokens: list[str], load_merges: bool
) -> None:
    """Merges, ids of special tokens, whether to add them, and the chat template."""
    try:
        special = gguf.SpecialVocab(checkpoint.folder, load_merges=load_merges, n_vocab=len(tokens))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ConversionError(f"{checkpoint.folder}: its special tokens can't be read: {error}") from error
    if load_merges and not special.merges:
        raise ConversionError(f"{checkpoint.folder / 'tokenizer.json'}: has no merges")
    if special.chat_template is None:
        special.chat_template = checkpoint.text("chat_template.jinja")
    if load_merges:  # llama.cpp would add a token of its own accord for some vocabularies: say what this one does
        special.add_special_token.setdefault("bos", _adds_first(tokenizer))

    # Chat models end their turns with one of several tokens, which generation_config.json lists.
    ends = checkpoint.json("generation_config.json", optional=True).get("eos_token_id")
    for i in ends if isinstance(ends, list) else [ends]:
        if not isinstance(i, int) or not 0 <= i < len(tokens):
            continue
        unset = [kind for kind in ("eos", "eot", "eom") if kind not in special.special_token_ids]
        if i not in (special.special_token_ids.get(kind) for kind in ("eos", "eot", "eom")) and unset:
            kind = "eom" if "eom" in tokens[i] and "eom" in unset else unset[0]
            special.special_token_ids[kind] = i
    special.add_to_gguf(writer, quiet=True)


def _adds_first(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a special token before the text."""
    processors = _steps(tokenizer.get("post_processor"), "processors")
    templates = [step.get("single") or [{}] for step in processors if step.get("type") == "TemplateProcessing"]
    return any("SpecialToken" in template[0] for template in templates)


def read_sentencepiece(path: Path) -> tuple[list[Piece], bool]:
    """The pieces of a tokenizer.model, and whether it puts a space before the text.

    A protocol buffer, ``ModelProto`` in https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto:
    field 1 the pieces (1 text, 2 score, 3 type), 2 the trainer's settings (3 the model's type), 3 the normalizer's
    (3 add_dummy_prefix).

    Raises
    ------
    ConversionError
        Not such a file.
    UnsupportedError
        Not a byte-pair model.
    """
    pieces: list[Piece] = []
    model_type, adds_prefix = 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number not in (1, 2, 3) or not isinstance(value, bytes):
                continue
            message = dict(_fields(value))
            if number == 1:
                text, score = message[1], message.get(2, b"\0\0\0\0")
                if not isinstance(text, bytes) or not isinstance(score, bytes):
                    raise ValueError("a piece without text")
                type_ = message.get(3, 1)
                # As in _added: looked for in the text as the user wrote it.
                shown = text.decode().replace("▁", " ") if type_ == TokenType.USER_DEFINED else text.decode()
                pieces.append(Piece(shown, struct.unpack("<f", score)[0], int(type_)))
            elif number == 2:
                model_type = int(message.get(3, 1))
            else:
                adds_prefix = bool(message.get(3, 1))
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise ConversionError(f"{path}: not a SentencePiece model: {error}") from error
    if not pieces:
        raise ConversionError(f"{path}: not a SentencePiece model: no pieces")
    if model_type != 2:
        raise UnsupportedError(f"{path}: a SentencePiece model of type {model_type}; known: 2 (BPE)")
    return pieces, adds_prefix


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A protocol buffer's fields: number and value, the bytes of strings, messages and fixed-size numbers."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        match key & 7:
            case 0:
                yield key >> 3, varint()
                continue
            case 1:
                size = 8
            case 2:
                size = varint()
            case 5:
                size = 4
            case wire_type:
                raise ValueError(f"wire type {wire_type} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"ends inside a field at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


@dataclass(frozen=True)
class Encoder:
    """A checkpoint's own tokenizer: the file that it was read from, and text -> token ids without special ones."""

    file: Path
    encode: Callable[[str], list[int]]


def read_encoder(checkpoint: Checkpoint) -> Encoder | None:
    """The checkpoint's tokenizer.json, else its tokenizer.model; None for the latter without the sentencepiece package.

    Raises
    ------
    ConversionError
        A broken tokenizer.json.
    """
    file = checkpoint.folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain Exceptions
            raise ConversionError(f"{file}: not a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return Encoder(file, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    file = checkpoint.folder / "tokenizer.model"
    if file.is_file() and importlib.util.find_spec("sentencepiece") is not None:
        from sentencepiece import SentencePieceProcessor

        try:
            return Encoder(file, SentencePieceProcessor(model_file=str(file)).encode)
        except (RuntimeError, OSError) as error:
            raise ConversionError(f"{file}: not a SentencePiece model: {error}") from error
    return None


def check_vocabulary(metadata: Mapping[str, Any], own: Encoder) -> list[str]:
    """Compare the tokenizer that GGUF metadata makes with the checkpoint's own, on `CHECK_TEXTS`.

    Raises
    ------
    ConversionError
        They differ; says at which token of which text.
    """
    # Only here: what reads GGUF's tokenizers stands to the right of what converts.
    from ggpy.generate.tokenizer import Tokenizer

    tokens = metadata["tokenizer.ggml.tokens"]
    try:
        written = Tokenizer.from_metadata(metadata)
    except Error as error:
        raise ConversionError(f"{own.file}: as GGUF it would be refused: {error}") from error
    for text in CHECK_TEXTS:
        if metadata["tokenizer.ggml.model"] == "llama":
            # Before a text that begins with a space, some tokenizer.json put no second one; GGUF's readers always do.
            text = text.lstrip(" ")
        theirs, ours = own.encode(text), written.encode(text, special=True, bos=False)
        if theirs != ours:
            at = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
            )
            a, b = (" ".join(repr(tokens[i]) for i in ids[at : at + 3]) or "nothing" for ids in (theirs, ours))
            raise ConversionError(
                f"{own.file}: as GGUF it would give other tokens: for {text!r}, {b} instead of {a} at {at}"
            )
    return []
