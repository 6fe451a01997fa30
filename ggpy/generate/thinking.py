"""Telling what a model thinks from what it answers, in text as it comes."""

from .streaming import overlap

#: How models mark their thoughts: the beginning and the end.
MARKERS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen 3, GLM, SmolLM3, LFM2.5 and most others
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
)


class ThinkingSplitter:
    """Splits a text that arrives in pieces into thoughts and answer.

    How the text is cut into pieces changes nothing. The white space around thoughts belongs to neither.

    Parameters
    ----------
    prompt : str
        What comes before. Many templates begin the model's thoughts themselves.
    """

    def __init__(self, prompt: str = ""):
        begun = [end for begin, end in MARKERS if prompt.rstrip().endswith(begin)]
        self._end = begun[0] if begun else ""  # what ends the thoughts that are under way
        self._may_begin = not begun  # only the beginning of an answer can be a thought
        self._held = ""
        self._strip = bool(begun)  # white space comes that belongs to neither

    def push(self, text: str) -> list[tuple[bool, str]]:
        """Takes the next piece.

        Returns
        -------
        list of (bool, str)
            What is certain now, in order: whether it is a thought, and its text.
        """
        self._held += text
        return self._split(False)

    def flush(self) -> list[tuple[bool, str]]:
        """What was held back, at the end."""
        return self._split(True)

    def _split(self, at_end: bool) -> list[tuple[bool, str]]:
        parts: list[tuple[bool, str]] = []
        while True:
            if self._strip:
                self._held = self._held.lstrip()
                self._strip = not self._held
            if self._end:
                before, found, after = self._held.partition(self._end)
                if not found:
                    # The end may have begun, and white space before it is dropped.
                    certain = len(self._held) if at_end else len(self._held) - overlap(self._held, self._end)
                    certain = len(self._held[:certain].rstrip())
                    parts.append((True, self._held[:certain]))
                    self._held = "" if at_end else self._held[certain:]
                    break
                parts.append((True, before.rstrip()))
                self._held, self._end, self._strip = after, "", True
                continue
            if self._may_begin:
                start = self._held.lstrip()
                begun = [(begin, end) for begin, end in MARKERS if start.startswith(begin)]
                if begun:
                    self._held, self._end = start.removeprefix(begun[0][0]), begun[0][1]
                    self._may_begin, self._strip = False, True
                    continue
                if not at_end and (not start or any(begin.startswith(start) for begin, _ in MARKERS)):
                    break
                self._may_begin = False
            parts.append((False, self._held))
            self._held = ""
            break
        return [part for part in parts if part[1]]


def split_thinking(text: str, prompt: str = "") -> tuple[str, str]:
    """The thoughts and the answer of a whole text; see `ThinkingSplitter`."""
    splitter = ThinkingSplitter(prompt)
    parts = [*splitter.push(text), *splitter.flush()]
    return tuple("".join(part for is_thought, part in parts if is_thought is which) for which in (True, False))  # type: ignore[return-value]
