"""Standard streams and signals, as a command needs them."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def prepared() -> Iterator[None]:
    """UTF-8 in and out, whatever the locale says, unless PYTHONIOENCODING says otherwise; "?" for what an encoding lacks.
    A signal to end ends the block, so that what it was about to write is removed."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None and name != "stdin":  # closed, as in services
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            kept = stream.isatty() or os.environ.get("PYTHONIOENCODING")
            stream.reconfigure(encoding=None if kept else "utf-8", errors="strict" if name == "stdin" else "replace")
    before = {}
    if threading.current_thread() is threading.main_thread():
        for kind in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, kind, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)  # the next one ends at once
    sys.exit(128 + number)
