"""Text as it is generated: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence

from ..errors import Error
from .tokenizer import Tokenizer


class StreamDecoder:
    """Turns token ids into text one at a time.

    What `push` and the final `flush` return, put together, is what `Tokenizer.decode` makes of the same ids.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt : sequence of int
        The ids that come before. Where they hold text, a space in front of the first new token is kept.
    special : bool
        Whether to write the names of control tokens.
    whole : bool
        Whether to keep a space in front anyway.
    shown : collection of int
        Control tokens whose names are written anyway.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        special: bool = False,
        whole: bool = False,
        shown: Collection[int] = (),
    ):
        self._tokenizer = tokenizer
        self._special, self._shown = special, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.space_prefix and not whole and all(map(self._is_left_out, prompt))

    def _is_left_out(self, token: int) -> bool:
        return not self._special and self._tokenizer.is_hidden(token) and token not in self._shown

    def push(self, token: int) -> str:
        """The text that becomes certain with this token: often a word, nothing in the middle of a character.

        Raises
        ------
        TokenizerError
            The id is outside the vocabulary.
        """
        if self._is_left_out(token):
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._at_start:
            self._at_start = False
            if not self._tokenizer.is_hidden(token):
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Ends a text before the first stop string in it, though pieces of that arrive one by one.

    How the text is cut into pieces changes nothing: the stop string that is complete first counts.

    Parameters
    ----------
    stops : iterable of str

    Attributes
    ----------
    found : str or None
        The stop string that was found.

    Raises
    ------
    Error
        A stop string is empty, or none.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(self._stops):
            raise Error("a stop string must not be empty")
        if not all(isinstance(stop, str) for stop in self._stops):
            raise Error("stop must be texts")
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.found is not None

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns
        -------
        emit : str
            Text that is certainly before any stop string.
        stopped : bool
            Whether a stop string was found. Everything from it on is dropped, later pieces too.
        """
        if self.stopped:
            return "", True
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            emit, self._held = self._held[:at], ""
        else:
            keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - keep
            emit, self._held = self._held[:cut], self._held[cut:]
        return emit, self.stopped

    def flush(self) -> str:
        """The text held back, which turned out to be no stop string."""
        emit, self._held = self._held, ""
        return emit


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
