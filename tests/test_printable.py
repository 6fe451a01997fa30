"""What reaches a terminal."""

import pickle

import pytest

from ggpy.errors import Error, GGUFError
from ggpy.printable import one_line, printable, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("näive ☃ 漢字 🙂", "näive ☃ 漢字 🙂"),
        ("\x1b[2J\x07\x9b", r"\x1b[2J\x07\x9b"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("\udc80", r"\udc80"),
    ],
)
def test_a_terminal_can_only_show_it(text, shown):
    assert printable(text) == shown and printable(text).isprintable()


def test_the_middle_of_long_texts_is_left_out():
    assert printable("0123456789", 10) == "0123456789"
    assert printable("0123456789a", 10) == "0123456…9a"
    assert len(printable("x" * 10**6, 80)) == 80


def test_visible_text_keeps_its_lines():
    assert visible("a\n\tb\x1b[0m é") == "a\n\tb\\x1b[0m é"
    for text in ("👩\u200d💻 🏴\U000e0067\U000e0062\U000e007f", "東京\u3000", "dit\u202f: «\xa0oui\xa0»", "می\u200cخواهم"):
        assert visible(text) == text
    assert visible("a\x9bb\rc\u202ed\u2028\ud800") == r"a\x9bb\rc\u202ed\u2028\ud800"
    assert one_line(" a \n  b  c\r\n\x1b", 80) == r"a b  c \x1b"


def test_errors_are_one_line_of_bounded_length():
    error = GGUFError("a\nb: " + "\x1b" * 100_000)
    assert str(error).startswith(r"a b: \x1b\x1b") and len(str(error)) <= 1000 and str(error).isprintable()
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and type(error) is GGUFError
    assert str(Error()) == ""
