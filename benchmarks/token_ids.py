"""Token ids beside those of others, on many odd texts: each `tokenizer.ggml.pre` beside Hugging Face's tokenizers with the
patterns that transformers and llama.cpp's source state, and vocabularies beside llama.cpp itself.

    python -m benchmarks.token_ids --llama-cpp SOURCE --vocabularies FOLDER

SOURCE is llama.cpp's source, FOLDER holds GGUF files with vocabularies (llama.cpp's models/ggml-vocab-*.gguf).
"""

import argparse
import json
import re
import tempfile
import unicodedata
from pathlib import Path

from ggpy.file import GGUFFile
from ggpy.generate.pretokenizers import PRETOKENIZERS
from ggpy.generate.tokenizer import Tokenizer
from tests.generate.test_stated_patterns import beside, cutter, of_transformers
from tests.generate.test_tokenizer import LlamaCpp, write_vocabulary
from tests.generate.texts import odd_lines

_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"')


def stated_patterns(source: Path) -> dict[str, list[str]]:
    """The patterns that llama.cpp's source states for each name: those of the model's own tokenizer.json where it quotes
    them, else its own."""
    text = (source / "src/llama-vocab.cpp").read_text()
    kinds: dict[str, str] = {}
    names: list[str] = []
    for name, kind in re.findall(r'tokenizer_pre == ("[^"]+")|pre_type = (\w+);', text):
        if name:
            names.append(json.loads(name))
        else:
            kinds |= dict.fromkeys(names, kind)
            names = []
    patterns: dict[str, list[str]] = {}
    for cases, body in re.findall(r"((?:case LLAMA_VOCAB_PRE_TYPE_\w+:\s*)+)(.*?)break;", text, re.DOTALL):
        found: list[str] = []
        original = ""
        for line in map(str.strip, body.splitlines()):
            literal = _LITERAL.search(line)
            if literal and line.startswith("//"):
                original = literal[0]
            elif literal:
                found.append(json.loads(original or literal[0]))
                original = ""
        patterns |= dict.fromkeys(re.findall(r"LLAMA_VOCAB_PRE_TYPE_\w+", cases), found)
    stated = {name: patterns[kind] for name, kind in kinds.items() if kind in patterns}
    stated["kimi-k2"] = re.findall(r"^// (\[\\p\{Han\}\]\+\|.*)$", (source / "src/unicode.cpp").read_text(), re.MULTILINE)
    return {name: found for name, found in stated.items() if found and not any("AFMoE" in one for one in found)}


def report(name: str, beside_what: str, n: int, different: list[str]) -> None:
    first = f", first {different[0]!r:.120}" if different else ""
    print(f"{name:28} {beside_what:14} {n - len(different):6} of {n} lines equal{first}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10000)
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source")
    parser.add_argument("--vocabularies", type=Path, help="a folder of GGUF files")
    args = parser.parse_args()
    lines = list(odd_lines(args.lines))
    stated = {"transformers": of_transformers()}
    if args.llama_cpp:
        patterns = stated_patterns(args.llama_cpp)
        stated["as llama.cpp states"] = {name: cutter(found) for name, found in patterns.items()}
    for what, cutters in stated.items():
        for pre, cut in cutters.items():
            if pre in PRETOKENIZERS and PRETOKENIZERS[pre].byte_level:
                report(pre, what, len(lines), beside(pre, cut, lines))
    for path in sorted(args.vocabularies.glob("*.gguf")) if args.vocabularies else ():
        vocabulary(path, lines)


def vocabulary(path: Path, lines: list[str]) -> None:
    with GGUFFile(path) as file:
        try:
            ours = Tokenizer.from_metadata(file.metadata)
        except Exception as error:
            print(f"{path.name}: {error}")
            return
        nfc = (row := PRETOKENIZERS.get(file.get("tokenizer.ggml.pre", str, default=""))) is not None and row.nfc
    with tempfile.TemporaryDirectory() as folder:
        with GGUFFile(path) as file:
            write_vocabulary(Path(folder) / "model.gguf", file.metadata)
        theirs = LlamaCpp(Path(folder) / "model.gguf")
        # llama.cpp doesn't normalize.
        texts = [unicodedata.normalize("NFC", line) if nfc else line for line in lines]
        different = [t for t in texts if ours.encode(t, special=False, bos=False) != theirs.encode(t)]
    report(path.stem, "llama.cpp", len(lines), different)
    texts, ids = (path.with_name(path.name + end) for end in (".inp", ".out"))
    if texts.exists():  # what transformers gave for the model's own tokenizer
        examples = texts.read_bytes().decode().split("\n__ggml_vocab_test__\n")
        expected = [[int(i) for i in line.split()] for line in ids.read_text().splitlines()]
        pairs = list(zip(examples, expected, strict=False))
        different = [text for text, own in pairs if ours.encode(text, special=False, bos=False) != own]
        report(path.stem, "transformers", len(pairs), different)


if __name__ == "__main__":
    main()
