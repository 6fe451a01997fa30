"""From text to token ids and back, as a GGUF file's metadata describes it.

The merging itself is done by the `tokenizers` package. `tokenizer.ggml.model` says which kind: byte-level byte pairs
("gpt2", or "gemma4" for its UTF-8 sister), SentencePiece's pairs ("llama") or unigrams ("t5"), BERT's word pieces ("bert").
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import TokenizerError, UnsupportedError, refusing
from .pretokenizers import PRETOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

T = TypeVar("T")
_log = logging.getLogger("ggpy")

# `tokenizer.ggml.token_type`
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # how SentencePiece spells a space

_MODELS = ("gpt2", "llama", "gemma4", "bert", "t5")
# Beginning, end and unknown token where a file doesn't say, as in llama.cpp.
_SPECIAL = {"llama": (1, 2, 0), "bert": (101, 102, 100), "t5": (None, 1, 2)}

#: Tokens that end a turn, by their names: files often name just one of them in `eos_token_id`.
END_NAMES = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    # Padding and repository marks of fill-in-the-middle models: what follows is another document.
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
#: Tokens around the parts of a text to be filled in, by their names: control tokens, though files often say otherwise.
_FIM_NAMES = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>"),
    *("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", "<|prefix|>", "<|suffix|>", "<|middle|>"),
)
# In Phi-3's texts white space behind control tokens isn't there. Files know it by their model's name alone.
_STRIPPING_MODELS = ("phi-3", "phi3")
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
# gpt-oss and solar-open, known by these, end their messages with `<|end|>` but not their turns.
_MESSAGES_END = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class _Fields:
    """The `tokenizer.ggml.` part of the metadata, with checks."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata

    def _value(self, name: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def string(self, name: str, default: str | None = None) -> str:
        value = self._value(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise _wrong(name, "a string", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name)
        if value is None:
            return default
        if not isinstance(value, (Integral, np.bool_)):
            raise _wrong(name, "a boolean", value)
        return bool(value)

    def array(self, name: str, kind: type[T], length: int | None = None) -> list[T]:
        """The array as a list; `length`: how many elements it must have."""
        value = self._value(name)
        if value is None or isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
            raise _wrong(name, f"an array of {kind.__name__}", value)
        items = value.tolist() if hasattr(value, "tolist") else list(value)
        wanted = (int, float) if kind is float else kind
        # Types first: arrays have half a million elements, and few types.
        for found in set(map(type, items)):
            if not issubclass(found, wanted):
                raise _wrong(name, f"an array of {kind.__name__}", next(item for item in items if type(item) is found))
        if length is not None and len(items) != length:
            raise TokenizerError(f"tokenizer.ggml.{name} has {len(items)} elements, tokenizer.ggml.tokens has {length}")
        return items

    def data(self, name: str) -> bytes:
        """An array of bytes; empty where there is none."""
        value = self._value(name)
        if value is None or isinstance(value, bytes):
            return value or b""
        return bytes(x & 255 for x in self.array(name, int))

    def token_id(self, name: str, n_vocab: int, default: int | None = None) -> int | None:
        value = self._value(name)
        if value is None:
            return default if default is None or default < n_vocab else None
        if not isinstance(value, Integral):
            raise _wrong(name, "a token id", value)
        token = int(value)
        if not 0 <= token < n_vocab:  # 4294967295 in files from before there was a way to say none
            _log.warning("tokenizer.ggml.%s is %d, but the vocabulary has %d tokens: left aside", name, token, n_vocab)
            return default if default is None or default < n_vocab else None
        return token


def _wrong(name: str, wanted: str, value: Any) -> TokenizerError:
    found = "is missing" if value is None else f"should be {wanted}, found {type(value).__name__}"
    return TokenizerError(f"tokenizer.ggml.{name} {found}")


class Tokenizer:
    """The tokenizer that a GGUF file describes.

    Made by `from_metadata`.

    Attributes
    ----------
    n_vocab : int
        Number of token ids.
    bos, eos : int or None
        Ids of the tokens that begin and end a text.
    end_tokens : frozenset of int
        Ids at which generation stops: end of text, of turn, of message.
    add_bos, add_eos : bool
        Whether `encode` puts `bos` in front and `eos` behind unless told otherwise.
    space_prefix : bool
        Whether texts are encoded with a space in front, which `decode` takes away again.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        fields = _Fields(metadata)
        kind = fields.string("model")
        if kind not in _MODELS:
            raise UnsupportedError(f"tokenizer.ggml.model '{kind}' is not supported; known: {', '.join(_MODELS)}")
        self._tokens = fields.array("tokens", str)
        n_vocab = self.n_vocab = len(self._tokens)
        typed = metadata.get("tokenizer.ggml.token_type") is not None
        self._types = fields.array("token_type", int, n_vocab) if typed else [NORMAL] * n_vocab

        for text, type_ in zip(self._tokens, self._types, strict=True):
            if type_ == BYTE and not _BYTE_TOKEN.fullmatch(text):
                raise TokenizerError(f"tokenizer.ggml.tokens has {text!r}, whose type says that it is a byte like <0x0A>")

        self._kind, pre = kind, None
        if kind in ("gpt2", "gemma4"):
            pre = _pretokenizer("gemma4" if kind == "gemma4" else fields.string("pre", "default"))
        self._byte_level = pre is not None and pre.byte_level
        vocab = self._vocabulary()
        ends = self._mark_ends(vocab, typed)
        name = metadata.get("general.name")
        self._strips = isinstance(name, str) and any(part in name.lower() for part in _STRIPPING_MODELS)

        first, last, unknown = _SPECIAL.get(kind, (None, None, None))
        self.bos = fields.token_id("bos_token_id", n_vocab, first)
        # BERT's texts end with the token that separates two; so it is spelled in GGUF.
        self.eos = fields.token_id("seperator_token_id" if kind == "bert" else "eos_token_id", n_vocab, last)
        unknown = fields.token_id("unknown_token_id", n_vocab, unknown)
        named = [fields.token_id(f"{name}_token_id", n_vocab) for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")]
        self.end_tokens = frozenset(ends) | {i for i in (self.eos, *named) if i is not None}
        # Whatever the flags say, BERT's texts stand between two tokens.
        add_bos, add_eos = pre.add_bos if pre else kind != "t5", kind == "t5"
        self.add_bos = (kind == "bert" or fields.flag("add_bos_token", add_bos)) and self.bos is not None
        self.add_eos = (kind == "bert" or fields.flag("add_eos_token", add_eos)) and self.eos is not None
        # What is put between two texts beside the token that ends one: RoBERTa and its kin have two there.
        separator = fields.token_id("seperator_token_id", n_vocab, self.eos)
        two = kind != "bert" and fields.flag("add_sep_token", True)
        self._between = [separator] if two and separator is not None else []
        self.space_prefix = pre is None and (kind == "bert" or fields.flag("add_space_prefix", True))
        self._build(vocab, unknown, pre, fields)

    @cached_property
    def _used_tokens(self) -> tuple[int, int]:
        """How many tokens there are without those at the end that only fill the vocabulary up, and a hash of these."""
        n = self.n_vocab
        while n and self._types[n - 1] == UNUSED:
            n -= 1
        return n, hash(tuple(self._tokens[:n]))

    def difference(self, other: Tokenizer) -> str:
        """In what this vocabulary differs from another: words for a message, none if all used tokens are the same."""
        if self._used_tokens == other._used_tokens:
            return ""
        for i, (own, others) in enumerate(zip(self._tokens, other._tokens, strict=False)):
            if own != others:
                return f"token {i} is {own!r}, not {others!r}"
        return f"{self._used_tokens[0]} tokens, not {other._used_tokens[0]}"

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer from `tokenizer.ggml.*`.

        Parameters
        ----------
        metadata : mapping
            A GGUF file's metadata; arrays may be lists, numpy arrays or sequences with `tolist`.

        Raises
        ------
        TokenizerError
            A key is missing, has the wrong type or length, or holds an id outside the vocabulary.
        UnsupportedError
            A kind of tokenizer or pre-tokenizer that ggpy doesn't know; the message lists those it does.
        """
        return cls(metadata)

    def _spelling(self, token: int) -> str:
        """A token as it is matched against text. User-defined ones are matched before spaces are respelled."""
        text = self._tokens[token]
        if self._kind == "bert":
            return _word_piece(text, self._types[token])
        return text.replace(SPACE, " ") if self._types[token] == USER_DEFINED and not self._byte_level else text

    def _vocabulary(self) -> dict[str, int]:
        # Empty tokens, of which there may be several, get names that no text has.
        vocab = {text or f"\ufffe{i}": i for i, text in enumerate(self._tokens)}
        if len(vocab) != self.n_vocab:
            twice = next(text for i, text in enumerate(self._tokens) if text and vocab[text] != i)
            raise TokenizerError(f"tokenizer.ggml.tokens has {twice!r} more than once")
        if self._kind == "bert":
            vocab = {self._spelling(i): i for i in range(self.n_vocab)}
            if len(vocab) != self.n_vocab:
                raise TokenizerError("tokenizer.ggml.tokens has a word that is spelled like a control token")
            return vocab
        if not self._byte_level:
            for i, type_ in enumerate(self._types):
                if type_ == USER_DEFINED and SPACE in self._tokens[i]:
                    del vocab[self._tokens[i]]
                    vocab[self._spelling(i)] = i
        return vocab

    def _mark_ends(self, vocab: dict[str, int], typed: bool) -> set[int]:
        """Ids of `END_NAMES`, made control tokens like those of `_FIM_NAMES`: some files take them for user-defined ones.

        A normal token of such a name (`</s>` in qwen2) is text, unless the file has no types at all.
        """
        ends = {name: vocab[name] for name in END_NAMES if name in vocab}
        ends = {name: i for name, i in ends.items() if not typed or self._types[i] != NORMAL}
        if any(names <= ends.keys() for names in _MESSAGES_END):
            ends.pop("<|end|>", None)
        marks = {vocab[name] for name in _FIM_NAMES if name in vocab and self._types[vocab[name]] == USER_DEFINED}
        for i in {*ends.values(), *marks}:
            self._types[i] = CONTROL
        return set(ends.values())

    def _build(self, vocab: dict[str, int], unknown: int | None, pre: PreTokenizer | None, fields: _Fields) -> None:
        from tokenizers import AddedToken, Tokenizer

        model = self._model(vocab, unknown, pre, fields)

        def made(
            types: Iterable[int], model: models.Model = model, space_prefix: bool = self.space_prefix
        ) -> tokenizers.Tokenizer:
            tokenizer = Tokenizer(model)
            normalizer, pre_tokenizer = self._cuts(pre, fields, space_prefix)
            if normalizer is not None:
                tokenizer.normalizer = normalizer
            if pre_tokenizer is not None:
                tokenizer.pre_tokenizer = pre_tokenizer
            tokenizer.add_tokens(
                [
                    AddedToken(
                        self._spelling(i), normalized=False, rstrip=self._strips and self._tokens[i] not in _NOT_STRIPPING
                    )
                    for i, type_ in enumerate(self._types)
                    if type_ in types and self._tokens[i]
                ]
            )
            return tokenizer

        # They share their model and differ in what they take out of a text before it is cut, and what they put in front.
        # Unigrams would find control tokens in what is left: there, texts that hide them need a model without these.
        hidden = {CONTROL, UNKNOWN, UNUSED}
        plain = self._unigrams(unknown, fields, hidden) if self._kind == "t5" else model
        self._plain = made({USER_DEFINED}, plain)
        self._with_control = made({USER_DEFINED, CONTROL, UNKNOWN})
        self._inside = made({USER_DEFINED}, plain, space_prefix=False) if self.space_prefix else self._plain

    def _model(self, vocab: dict[str, int], unknown: int | None, pre: PreTokenizer | None, fields: _Fields) -> models.Model:
        """What turns a piece of text into tokens."""
        from tokenizers import models

        if self._kind in ("t5", "bert"):
            if unknown is None:
                raise TokenizerError("tokenizer.ggml.unknown_token_id is missing")
            if self._kind == "t5":
                return self._unigrams(unknown, fields)
            return models.WordPiece(vocab, unk_token=self._spelling(unknown), max_input_chars_per_word=100)
        if pre is None:
            merges = _merges_by_score(vocab, fields.array("scores", float, self.n_vocab), self._types)
        else:
            merges = _split_merges(fields.array("merges", str))
        with refusing(TokenizerError, "tokenizer.ggml.merges don't fit tokenizer.ggml.tokens"):
            return models.BPE(
                vocab,
                merges,
                unk_token=None if unknown is None or self._byte_level else self._spelling(unknown),
                fuse_unk=not self._byte_level,
                byte_fallback=not self._byte_level,
                ignore_merges=pre is not None and pre.ignore_merges,
            )

    def _cuts(
        self, pre: PreTokenizer | None, fields: _Fields, space_prefix: bool
    ) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer | None]:
        """What changes a text before it becomes tokens, and what cuts it into pieces."""
        from tokenizers import Regex, normalizers, pre_tokenizers

        if self._kind == "bert":
            lowercase = fields.flag("normalizer.lowercase", True)
            strip_accents = fields.flag("normalizer.strip_accents", lowercase)
            return (
                normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents),
                pre_tokenizers.BertPreTokenizer(),
            )
        spaces: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if space_prefix else []
        spaces.append(normalizers.Replace(" ", SPACE))
        if self._kind == "t5":
            if fields.flag("remove_extra_whitespaces", False):
                spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), *spaces]
            charsmap = fields.data("precompiled_charsmap")
            with refusing(TokenizerError, "tokenizer.ggml.precompiled_charsmap"):
                first = [normalizers.Precompiled(charsmap)] if charsmap else []
            return normalizers.Sequence([*first, *spaces]), None
        escaped = normalizers.Sequence(spaces)
        if pre is None:
            return escaped, None
        return pre.normalizer() if pre.byte_level else escaped, pre.splitter()

    def _unigrams(self, unknown: int | None, fields: _Fields, hidden: Collection[int] = ()) -> models.Model:
        """SentencePiece's model of unigrams; tokens of the hidden types aren't found in a text."""
        from tokenizers import models

        scores = fields.array("scores", float, self.n_vocab)
        # The unknown token's score lies below the lowest one: let that be one of a text's own tokens.
        lowest = min((x for x, type_ in zip(scores, self._types, strict=True) if type_ == NORMAL), default=0.0)
        pieces = [
            (f"\0{text}" if type_ in hidden else text, max(score, lowest))
            for text, score, type_ in zip(self._tokens, scores, self._types, strict=True)
        ]
        with refusing(TokenizerError, "tokenizer.ggml.scores"):
            return models.Unigram(pieces, unknown, False)

    def encode(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Parameters
        ----------
        text : str
        special : bool
            Whether the names of control tokens in the text, such as `<|im_end|>`, become those tokens. False for text
            from strangers.
        bos : bool, optional
            Whether to put the BOS token in front. Left out, the file decides, and a text that begins with it already
            (a rendered chat template) gets no second one; so does `add_eos`, which True and False leave out.

        Raises
        ------
        TokenizerError
            `bos` is true but the model has no such token, or the text isn't valid Unicode (lone surrogates).
        """
        if bos and self.bos is None:
            raise TokenizerError("this model has no BOS token (tokenizer.ggml.bos_token_id)")
        tokenizer = self._with_control if special else self._plain
        with refusing(TokenizerError, "the vocabulary is damaged"):
            try:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
            except (TypeError, UnicodeEncodeError):
                words = f"{type(text).__name__} {text!r:.60}: not a string of Unicode text"
                raise TokenizerError(f"can't encode {words}") from None
        first, last = self.bos, self.eos
        if first is not None and (bos or (bos is None and self.add_bos and ids[:1] != [first])):
            ids.insert(0, first)
        if last is not None and bos is None and self.add_eos:
            ids.append(last)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued: as `encode` gives them, but never with an EOS at the end."""
        ids = self.encode(text, bos=False)
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts that belong together, with the tokens that the model has before, between and behind
        them: those up to the second text, and the rest. Names of control tokens are text."""
        last = [self.eos] if self.add_eos and self.eos is not None else []
        before, between = ([self.bos] if self.add_bos and self.bos is not None else []), [*last, *self._between]
        one, other = (self.encode(text, special=False, bos=False) for text in (first, second))
        return [*before, *one, *between], [*other, *last]

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that goes on with another: nothing is put in front, names of control tokens are text."""
        with refusing(TokenizerError, "the vocabulary is damaged"):
            return self._inside.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; for control tokens, the UTF-8 of their names.

        Raises
        ------
        TokenizerError
            The id is outside the vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.n_vocab} tokens")
        text, type_ = self._tokens[token], self._types[token]
        if type_ in (CONTROL, UNKNOWN) or (type_ == USER_DEFINED and self._byte_level):
            return text.encode()
        if type_ == BYTE:
            return bytes.fromhex(text[3:5])  # <0x0A>
        if not self._byte_level:
            return text.replace(SPACE, " ").encode()
        try:
            return bytes([_BYTES[char] for char in text])
        except KeyError:  # a token that nothing encodes to
            return text.encode()

    def is_hidden(self, token: int) -> bool:
        """Whether a token is left out of decoded text: control tokens and the unknown token."""
        return 0 <= token < self.n_vocab and self._types[token] in (CONTROL, UNKNOWN)

    def is_unused(self, token: int) -> bool:
        """Whether a token only fills the vocabulary up, so that no text has it."""
        return 0 <= token < self.n_vocab and (self._types[token] == UNUSED or not self._tokens[token])

    def decode_bytes(self, ids: Iterable[int], special: bool = False) -> bytes:
        """The bytes of a sequence of tokens; see `decode`."""
        shown = [i for i in ids if special or not self.is_hidden(i)]
        data = b"".join(map(self.token_bytes, shown))
        if self.space_prefix and shown and not self.is_hidden(shown[0]):
            data = data.removeprefix(b" ")
        return data

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of a sequence of tokens.

        Bytes that are no UTF-8 become U+FFFD. A space that `encode` put in front of the text is taken away.

        Parameters
        ----------
        ids : sequence of int
        special : bool
            Whether to write the names of control tokens.

        Raises
        ------
        TokenizerError
            An id is outside the vocabulary.
        """
        return self.decode_bytes(ids, special).decode("utf-8", "replace")


def _word_piece(text: str, type_: int) -> str:
    """BERT's own spelling of a token: GGUF marks the beginnings of words, BERT what continues them."""
    if type_ in (CONTROL, UNKNOWN):
        return text
    return text.removeprefix(SPACE) if text.startswith(SPACE) else f"##{text}"


def _pretokenizer(name: str) -> PreTokenizer:
    if name not in PRETOKENIZERS:
        raise UnsupportedError(f"tokenizer.ggml.pre '{name}' is not supported; known: {', '.join(PRETOKENIZERS)}")
    return PRETOKENIZERS[name]


def _split_merges(merges: list[str]) -> list[tuple[str, str]]:
    pairs = [(left, right) for left, _, right in map(str.partition, merges, repeat(" "))]
    for i, (left, right) in enumerate(pairs):
        if not (left and right):
            # The left part may begin with a space.
            left, _, right = merges[i][1:].partition(" ")
            if not right:
                raise TokenizerError(f"tokenizer.ggml.merges has {merges[i]!r}, which is no pair")
            pairs[i] = (merges[i][0] + left, right)
    return pairs


def _merges_by_score(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours that make the token of the highest score: the pairs, in that order.

    Control and byte tokens come from no pair: text can't spell them.
    """
    pieces = {text: i for text, i in vocab.items() if types[i] == NORMAL}
    ranked = sorted(pieces.items(), key=lambda piece: -scores[piece[1]])
    return [
        (left, right)
        for text, _ in ranked
        for cut in range(1, len(text))
        if (left := text[:cut]) in pieces and (right := text[cut:]) in pieces
    ]
