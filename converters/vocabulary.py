"""A checkpoint's tokenizer as GGUF metadata, and the check that both give the same tokens."""

from __future__ import annotations

import importlib.util
import logging
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from ggpy.errors import ConversionError, Error, UnsupportedError, refusing

from .checkpoint import Checkpoint, read_bytes, shown
from .encoder_vocabulary import ENCODER_MODELS, write_encoder_vocabulary

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
    "two  12, three   345;it'sabc we'llx I'Mx 12  34",
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

    Of a tokenizer.json and a tokenizer.model the former decides, as for transformers; the latter gives its scores where
    both have the same tokens.

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
    if (tokenizer.get("model") or {}).get("type") in ENCODER_MODELS:
        write_encoder_vocabulary(writer, checkpoint, tokenizer)
        return
    add_space_prefix = settings.get("add_prefix_space")
    pieces = _pieces(checkpoint, tokenizer)
    if pieces is not None:
        kind, (tokens, adds_prefix) = "llama", pieces
        rows = {i: (piece.text, piece.score, piece.type) for i, piece in enumerate(tokens)}
        for i, row in (_added_tokens(checkpoint, settings) | _added_of_json(checkpoint, tokenizer, kind)).items():
            if i not in rows or rows[i][2] != TokenType.UNKNOWN:
                rows[i] = row
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
    _write_special(writer, checkpoint, tokenizer, settings, [text for text, _, _ in filled], load_merges=kind == "gpt2")


def _pieces(checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> tuple[list[Piece], bool] | None:
    """The pieces of tokenizer.model, and whether it puts a space before the text; None where there is no such file or
    tokenizer.json has another vocabulary."""
    path = checkpoint.folder / "tokenizer.model"
    if not path.exists():
        return None
    if not tokenizer:
        return read_sentencepiece(path)
    try:
        pieces, adds_prefix = read_sentencepiece(path)
    except Error as error:  # Llama 3 and others have a tokenizer of another form under this name
        checkpoint.notes.append(f"{error}; tokenizer.json is taken instead")
        return None
    kind, adds_prefix = _kind(checkpoint, tokenizer)
    texts = {i: text for text, i in tokenizer["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    for i, piece in enumerate(pieces):
        theirs = texts.get(i, piece.text)
        if kind != "llama" or theirs.replace("▁", " ") != piece.text.replace("▁", " "):
            checkpoint.notes.append(
                f"{path}: left aside, its token {i} is {piece.text!r}; tokenizer.json is taken, whose is {theirs!r}"
            )
            return None
    return pieces, adds_prefix


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


def _pre(checkpoint: Checkpoint, tokenizer: dict[str, Any]) -> str:
    """GGUF's name for how a tokenizer.json cuts texts: the first row of ggpy's table that cuts `CHECK_TEXTS` alike, one
    that begins texts alike if there is such."""
    # Only here: what reads GGUF's tokenizers stands to the right of what converts.
    from ggpy.generate.pretokenizers import ROWS

    where, model = checkpoint.folder / "tokenizer.json", tokenizer["model"]
    own = _opened(where, tokenizer)
    ignore_merges = bool(model.get("ignore_merges"))
    # Whether merges are ignored matters for tokens that no merge makes.
    made = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]}
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    matters = any(len(text) > 1 and text not in made and text not in added for text in model["vocab"])
    with refusing(ConversionError, f"{where}: not a tokenizer"):
        wanted = [_cut(own.normalizer, own.pre_tokenizer, text) for text in CHECK_TEXTS]
    adds_bos = _adds_first(tokenizer)
    differs = {names: (row.ignore_merges != ignore_merges, row.add_bos != adds_bos) for names, row in ROWS.items()}
    for names, row in sorted(ROWS.items(), key=lambda item: differs[item[0]]):
        if not row.byte_level or (matters and row.ignore_merges != ignore_merges):
            continue
        normalizer, splitter = row.normalizer(), row.splitter()
        if all(_cut(normalizer, splitter, text) == cut for text, cut in zip(CHECK_TEXTS, wanted, strict=True)):
            return names.split()[0]
    known = ", ".join(names.split()[0] for names in ROWS)
    steps = {key: tokenizer[key] for key in ("normalizer", "pre_tokenizer") if tokenizer.get(key)}
    described = shown(steps | ({"ignore_merges": True} if ignore_merges else {}))
    raise UnsupportedError(f"{where}: splits text by {described}, which none of {known} does")


def _cut(normalizer: Any, splitter: Any, text: str) -> list[str]:
    """A text's pieces, in the spelling that they are merged in."""
    normal = text if normalizer is None else normalizer.normalize_str(text)
    return [normal] if splitter is None else [piece for piece, _ in splitter.pre_tokenize_str(normal)]


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
    for i, row in _added_of_json(checkpoint, tokenizer, kind).items():
        if rows.get(i, (row[0],))[0].replace("▁", " ") != row[0].replace("▁", " "):
            raise ConversionError(f"{where}: tokens {rows[i][0]!r} and {row[0]!r} both have id {i}")
        if i not in rows or rows[i][2] != TokenType.UNKNOWN:
            rows[i] = row
    return rows


def _added_of_json(checkpoint: Checkpoint, tokenizer: dict[str, Any], kind: str) -> dict[int, tuple[str, float, int]]:
    """The tokens that a tokenizer.json adds to its vocabulary, or takes out of texts beforehand."""
    rows: dict[int, tuple[str, float, int]] = {}
    try:
        for token in tokenizer.get("added_tokens") or []:
            rows[int(token["id"])] = _added(token["content"], bool(token.get("special")), kind)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{checkpoint.folder / 'tokenizer.json'}: its added tokens can't be read: {error}") from error
    return rows


def _added(text: str, special: bool, kind: str) -> tuple[str, float, int]:
    if special or FORMAT_TOKENS.fullmatch(text):
        return text, -1000.0, TokenType.CONTROL
    # Pieces are looked for in the text as the user wrote it, with spaces; a BPE of bytes has nothing that stands for them.
    return text.replace("▁", " ") if kind == "llama" else text, -1000.0, TokenType.USER_DEFINED


def _added_tokens(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[int, tuple[str, float, int]]:
    """Tokens that files beside a tokenizer.model add to it, or whose type they change."""
    rows: dict[int, tuple[str, float, int]] = {}
    try:
        for text, i in checkpoint.json("added_tokens.json", optional=True).items():
            rows[int(i)] = (text, -1000.0, TokenType.USER_DEFINED)
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            rows[int(i)] = _added(token["content"], bool(token.get("special")), "llama")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{checkpoint.folder}: its added tokens can't be read: {error}") from error
    return rows


class _SpecialVocab(gguf.SpecialVocab):
    """Ids below zero or beyond the vocabulary count as none."""

    def _set_special_token(self, typ: str, tid: Any) -> None:
        if isinstance(tid, int) and not isinstance(tid, bool) and 0 <= tid < (self.n_vocab or 0):
            super()._set_special_token(typ, tid)


def _write_special(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    tokenizer: dict[str, Any],
    settings: dict[str, Any],
    tokens: list[str],
    load_merges: bool,
) -> None:
    """Merges, ids of special tokens, whether to add them, and the chat template."""
    template = _chat_template(checkpoint, settings)
    checkpoint.text("merges.txt")  # so that it is a file
    try:
        special = _SpecialVocab(checkpoint.folder, load_merges=load_merges, n_vocab=len(tokens))
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, OSError) as error:
        raise ConversionError(f"{checkpoint.folder}: its special tokens can't be read: {error}") from error
    if load_merges and not special.merges:
        raise ConversionError(f"{checkpoint.folder / 'tokenizer.json'}: has no merges")
    special.chat_template = template
    if load_merges:  # llama.cpp would add a token of its own accord for some vocabularies: say what this one does
        special.add_special_token.setdefault("bos", _adds_first(tokenizer))

    # Chat models end their turns with one of several tokens, which generation_config.json lists, or config.json.
    ends = checkpoint.json("generation_config.json", optional=True).get("eos_token_id")
    if ends is None:
        ends = checkpoint.config.get("eos_token_id")
    for i in ends if isinstance(ends, list) else [ends]:
        if type(i) is not int or not 0 <= i < len(tokens):
            continue
        unset = [kind for kind in ("eos", "eot", "eom") if kind not in special.special_token_ids]
        if i in (special.special_token_ids.get(kind) for kind in ("eos", "eot", "eom")):
            continue
        if not unset:
            checkpoint.notes.append(f"{checkpoint.folder}: {tokens[i]!r} is a fourth token that ends texts; GGUF has three")
            continue
        kind = "eom" if "eom" in tokens[i] and "eom" in unset else unset[0]
        special.special_token_ids[kind] = i
    special.add_to_gguf(writer, quiet=True)


def _chat_template(checkpoint: Checkpoint, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or several with their names. As for transformers, chat_template.jinja counts before what
    tokenizer_config.json says."""
    found: Any = checkpoint.text("chat_template.jinja")
    more = sorted((checkpoint.folder / "additional_chat_templates").glob("*.jinja"))
    if more:
        found = {"default": found} if isinstance(found, str) else {}
        found |= {path.stem: checkpoint.text(str(path.relative_to(checkpoint.folder))) for path in more}
    if found is None:
        found = settings.get("chat_template")
    if found is None:
        found = checkpoint.json("chat_template.json", optional=True).get("chat_template")
    if isinstance(found, dict):
        found = [{"name": name, "template": template} for name, template in found.items()]
    several = found if isinstance(found, list) else [{"name": "default", "template": found}]
    for template in several:
        text = template.get("template") if isinstance(template, dict) and isinstance(template.get("name"), str) else None
        if found is not None and (not isinstance(text, str) or re.search("[\ud800-\udfff]", text)):
            checkpoint.notes.append(
                f"{checkpoint.folder}: its chat template is left aside: neither text nor texts with names"
            )
            return None
    return found


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
        for number, value in _fields(read_bytes(path)):
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
            if shift > 70:
                raise ValueError(f"a number without end at byte {at}")
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
    """A checkpoint's own tokenizer: the file that it was read from, text -> token ids without special ones, and the tokens
    that are looked for in a text before it is cut, by their ids."""

    file: Path
    encode: Callable[[str], list[int]]
    added: Mapping[int, str] = field(default_factory=dict)


def read_encoder(checkpoint: Checkpoint) -> Encoder | None:
    """The checkpoint's tokenizer.json, else its tokenizer.model; None for the latter without the sentencepiece package.

    Raises
    ------
    ConversionError
        A broken tokenizer.json.
    UnsupportedError
        Byte pairs with marks inside or at the end of words, which GGUF has no place for, or some left out at random.
    """
    file = checkpoint.folder / "tokenizer.json"
    if file.is_file():
        settings = checkpoint.json("tokenizer.json")
        model = settings.get("model")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if isinstance(model, dict) and model.get("type", "BPE") == "BPE" and model.get(key):
                raise UnsupportedError(f"{file}: its {key} {shown(model[key])} has no place in GGUF")
        tokenizer = _opened(file, settings)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        return Encoder(file, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, added)
    file = checkpoint.folder / "tokenizer.model"
    if file.is_file() and importlib.util.find_spec("sentencepiece") is not None:
        from sentencepiece import SentencePieceProcessor

        with refusing(ConversionError, f"{file}: not a tokenizer"):
            return Encoder(file, SentencePieceProcessor(model_file=str(file)).encode)
    return None


#: how many times longer a step of tokenizer.json makes a text, where it isn't what it puts there
_GROWTH = {"ByteLevel": 2, "NFC": 2, "NFD": 4, "NFKC": 4, "NFKD": 4, "Precompiled": 64}
_MOST_GROWTH, _MOST_STEPS = 4096, 64


def _opened(file: Path, settings: dict[str, Any]) -> Any:
    """The tokenizer of the tokenizers package that a tokenizer.json describes.

    Raises
    ------
    ConversionError
        It can't be read, or its steps could make a text so long that it takes all memory.
    """
    from tokenizers import Tokenizer

    with refusing(ConversionError, f"{file}: not a tokenizer"):
        opened = Tokenizer.from_file(str(file))
        steps = _steps(settings.get("normalizer"), "normalizers") + _steps(settings.get("pre_tokenizer"), "pretokenizers")
        growth = 1
        for step in steps:
            growth *= _GROWTH.get(step["type"], 1 + len(step.get("content", step.get("prepend", ""))))
            if growth >= _MOST_GROWTH or len(steps) > _MOST_STEPS:
                raise ConversionError(f"{file}: its {len(steps)} steps of normalizing and splitting make texts too long")
    return opened


def check_vocabulary(metadata: Mapping[str, Any], own: Encoder) -> list[str]:
    """Compare the tokenizer that GGUF metadata makes with the checkpoint's own, on `CHECK_TEXTS` and around added tokens.

    Returns
    -------
    list of str
        Notes: what added tokens do to the text around them, which GGUF can't say.

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

    def difference(text: str) -> str | None:
        with refusing(ConversionError, f"{own.file}: not a tokenizer"):
            theirs = own.encode(text)
        ours = written.encode(text, special=True, bos=False)
        if theirs == ours:
            return None
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
        named = [[repr(tokens[i]) if i < len(tokens) else f"token {i}" for i in ids[at : at + 3]] for ids in (theirs, ours)]
        a, b = (" ".join(names) or "nothing" for names in named)
        return f"for {text!r}, {b} instead of {a} at {at}"

    for text in CHECK_TEXTS:
        if metadata["tokenizer.ggml.model"] == "llama":
            # Before a text that begins with a space, some tokenizer.json put no second one; GGUF's readers always do.
            text = text.lstrip(" ")
        found = difference(text)
        if found is not None:
            raise ConversionError(f"{own.file}: as GGUF it would give other tokens: {found}")
    others = []
    for i in own.added:
        name = own.added[i]
        for text in (f"x{name}y", f"x {name} y"):
            found = difference(text)
            if found is None:
                continue
            if i in own.encode(text) and i not in written.encode(text, special=True, bos=False):
                raise ConversionError(f"{own.file}: as GGUF it would give other tokens: {found}")
            others.append(found)
    if not others:
        return []
    return [
        f"{own.file}: around added tokens GGUF's readers cut texts otherwise, {others[0]}"
        + (f" (and in {len(others) - 1} more tries)" if len(others) > 1 else "")
        + ": GGUF can't say what lstrip, rstrip, single_word, normalized and prepend_scheme say"
    ]
