"""Files of strangers by the thousand: sound ones, changed by structure, are opened, loaded and run.

    python -m tests.fuzz --runs 20000 gguf config

Processes with a limit of time do the work, file after file; which changes a file has follows from its number alone, so that
`--first 1234 --runs 1` repeats one. A file may be refused by an `Error`, or it runs; anything else is a failure: another
exception, a signal, more than SECONDS, more memory than twice the file and a constant. `changes` says what is changed,
`seeds` makes the sound files, `kinds` says what is done with each.
"""

from .seeds import make_seeds
from .work import Campaign

__all__ = ["Campaign", "make_seeds"]
