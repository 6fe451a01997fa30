"""Text that tokenizers get wrong: several scripts, emoji, code, numbers, runs of whitespace."""

import random
import unicodedata

_TEXT = """the quick brown fox jumps don't I'LL we've SHE'S naïve café Straße über größer résumé ﬁle hELLO camelCase ABCdef
Привет мир это тест Ελληνικά γλώσσα 漢字 仮名 ひらがな カタカナ 中文字符 你好世界 한국어 텍스트
עברית שלום العربية مرحبا हिन्दी नमस्ते
ไทย สวัสดี தமிழ் ქართული Հայերեն ò ó ù def foo(self): return x[i]+=1; #include <stdio.h> printf("%d\\n",42); x->y **kwargs
<div class='a'> <b> && || != => :: ... -- __init__ 1 12 123 1234 12345 3.14159 1,000,000 0xFF 1e-9 ²³ ½ ٣٤ ३ Ⅷ
😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ ™ € ∑ ≤ ← “quoted” ‘x’ — – … ¿ ¡ § ¶ •"""
WORDS = _TEXT.split()
GAPS = [" "] * 12 + ["  ", "   ", "    ", "\n", "\n\n", "\t", " \n", "\r\n", "", "", "\u00a0", "\u3000", "\t\t ", "\n \n"]
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x4E00, 0x4F00), (0x1F600, 0x1F64F)]


def mixed_lines(n, seed=0):
    """`n` texts: mostly words and gaps, some of random characters, some of nearly nothing but whitespace."""
    draw = random.Random(seed)
    for _ in range(n):
        kind = draw.random()
        if kind < 0.8:
            yield "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(draw.randint(1, 12)))
        elif kind < 0.9:
            yield "".join(chr(draw.randint(*draw.choice(RANGES))) for _ in range(draw.randint(1, 30)))
        else:
            yield "".join(draw.choice(" \n\t\r ab") for _ in range(draw.randint(1, 30)))


_ODD_SPACES = ["\u00a0", "\u2003", "\u2009", "\u200b", "\u202f", "\u2028", "\u3000", "\ufeff", "\v", "\f", "\x1c", "\x85"]
_MARKS = [
    "\u0301",
    "\u0327",
    "\u0323\u0302",
    "\u093c",
    "\u064b",
    "\u05b7",
    "\u0e31",
    "\u20e3",
    "\ufe0f",
    "\u200d",
    "\u3099",
]
_NUMBERS = [
    "0",
    "7",
    "42",
    "365",
    "1984",
    "65536",
    "1234567890",
    "3.14",
    "1e-9",
    "0xdeadbeef",
    "\u0661\u0662",
    "\uff11\uff12",
    "\u216b",
]
_CODE = [
    "for(int i=0;i<n;++i){",
    "x->y[3]",
    "def f(a, *b):",
    "\t\treturn None",
    "}}\r\n\r\n",
    "/* c */",
    "a_b.c::D",
    "$HOME/$(ls)",
    "<?php",
]


def odd_lines(n, seed=0):
    """`n` texts of anything that a tokenizer may meet: characters of all scripts, words of some, numbers, code, emoji,
    combining marks in and out of place, odd spaces, controls."""
    draw = random.Random(seed)

    def anything():
        while True:
            point = draw.choice(
                (draw.randrange(0x250), draw.randrange(0x3000), draw.randrange(0x10000), draw.randrange(0x20000))
            )
            if unicodedata.category(chr(point)) not in ("Cn", "Co", "Cs"):
                return chr(point)

    kinds = [
        (6, lambda: draw.choice(WORDS)),
        (6, lambda: draw.choice(GAPS)),
        (2, lambda: draw.choice(_NUMBERS)),
        (2, lambda: draw.choice(_CODE)),
        (2, lambda: draw.choice(_MARKS)),
        (2, lambda: draw.choice(_ODD_SPACES)),
        (1, lambda: chr(draw.randrange(32))),
        (3, anything),
        (1, lambda: draw.choice(WORDS) + draw.choice(("'s", "'LL", "'Re", "\u2019t", "'d")) + draw.choice(GAPS)),
        (1, lambda: draw.choice(" \n\t\r") * draw.randrange(1, 9)),
        (1, lambda: draw.choice("=-*#_.!?") * draw.randrange(1, 40)),
    ]
    parts = [part for weight, part in kinds for _ in range(weight)]
    for _ in range(n):
        yield "".join(draw.choice(parts)() for _ in range(draw.randrange(1, 25)))
