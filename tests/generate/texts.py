"""Text that tokenizers get wrong: several scripts, emoji, code, numbers, runs of whitespace."""

import random

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
