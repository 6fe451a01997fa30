"""Every error that ggpy raises on purpose.

::

    Error                      whatever ggpy refuses; its text is one line, fit to show to a user
    ├── GGUFError              a file that breaks the GGUF format, or that ends too early
    ├── UnsupportedError       a sound file or request that ggpy has no code for; lists what it has
    ├── ConversionError        a checkpoint that can't be converted
    ├── TokenizerError         a vocabulary or a text that can't be tokenized, a chat template that fails
    ├── GraphError             shapes or types that an operation can't take
    └── ContextFullError       more tokens than the context holds
"""

from collections.abc import Iterator
from contextlib import contextmanager

from .printable import one_line

_MOST = 1000  # characters of a message, whatever names and values it quotes


class Error(Exception):
    """Base class of all errors that ggpy raises on purpose. Its text is one line, fit for a terminal."""

    def __init__(self, *words: object):
        super().__init__(*(one_line(str(word), _MOST) for word in words))


class GGUFError(Error):
    """A file is not a sound GGUF file. The message names the file and the key, tensor or byte offset."""


class UnsupportedError(Error):
    """The file or the request is sound, but ggpy has no code for this architecture, type or option."""


class ConversionError(Error):
    """A checkpoint can't be converted. The message names the file or the tensor."""


class TokenizerError(Error):
    """A vocabulary, a text or a chat template can't be used."""


class GraphError(Error):
    """An operation was given shapes or types that it can't take."""


class ContextFullError(Error):
    """A request needs more positions than the context holds."""


@contextmanager
def refusing(kind: type[Error], what: str) -> Iterator[None]:
    """Makes one of ours of any error of packages in other languages: bare Exceptions, messages that aren't UTF-8, and
    panics of Rust, which are no Exceptions.

    Raises
    ------
    Error
        Of this kind; the message begins with `what`.
    """
    try:
        yield
    except (Error, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise kind(f"{what}: {error}") from error
