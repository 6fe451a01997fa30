"""What looks wrong or dangerous in a GGUF file, without running it."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Error
from ..file import GGUFFile, StringArray
from ..models import ARCHITECTURES, build_graph, read_architecture
from ..printable import printable
from ..quant import block_type
from .chat import ChatTemplate
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..file import GGUFTensor

_SAMPLE = 1 << 20  # bytes of a tensor that are looked at
_MANY = 100_000  # what no template needs to count to
#: names in templates that lead out of the values which a template is given
_NAMES_OUTSIDE = ("lipsum", "cycler", "self", "config", "request", "url_for", "get_flashed_messages")
#: tokens that end an answer, by their names
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes
    ----------
    level : {"error", "warning", "note"}
        An error keeps the model from running, or from running right.
    place : str
        The key, the tensor or the part of the file.
    text : str
    llama_cpp : str
        What llama.cpp does about it, where that is another thing.
    """

    level: str
    place: str
    text: str
    llama_cpp: str = ""

    def __str__(self) -> str:
        other = f" (llama.cpp {self.llama_cpp})" if self.llama_cpp else ""
        return printable(f"{self.level}: {self.place}: {self.text}{other}", 1000)


def lint(path: str | Path) -> list[Finding]:
    """Looks for what is wrong in a file.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    list of Finding
        Errors first.
    """
    try:
        file = GGUFFile(path)
    except Error as error:
        return [Finding("error", "file", str(error))]
    with file:
        found = [finding for check in _CHECKS for finding in check(file)]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _architecture(file: GGUFFile) -> Iterator[Finding]:
    key = "general.architecture"
    name = file.metadata.get(key)
    if not isinstance(name, str):
        yield Finding("error", key, "is missing, or no text")
        return
    if name not in ARCHITECTURES:
        import gguf

        known = name in gguf.MODEL_ARCH_NAMES.values()
        other = "may have it: the gguf package names it" if known else "hasn't got it either, says the gguf package"
        yield Finding("error", key, f"{name!r} is none that ggpy has", other)
        return
    try:
        build_graph(file, read_architecture(file), 1)
    except Error as error:
        yield Finding("error", "model", _without_path(error, file))


def _without_path(error: Error, file: GGUFFile) -> str:
    return str(error).removeprefix(f"{file.path}: ")


def _keys(file: GGUFFile) -> Iterator[Finding]:
    """Keys that nobody knows change nothing, though whoever wrote them may have meant something."""
    import gguf

    values = [v for group in vars(gguf.Keys).values() if isinstance(group, type) for v in vars(group).values()]
    known = {re.escape(v).replace(r"\{arch\}", "[^.]+").replace(r"\{id\}", r"\d+") for v in values if isinstance(v, str)}
    known |= {r"tokenizer\.chat_template\.\w+", r"general\..*", r"split\..*", r"quantize\..*", r"imatrix\..*"}
    pattern = re.compile("|".join(sorted(known)))
    for key in file.metadata:
        if not pattern.fullmatch(key):
            yield Finding("note", key, "a key that the gguf package doesn't know; it is ignored")


def _places(file: GGUFFile) -> Iterator[Finding]:
    """llama.cpp wants each tensor's data right behind those of the one before."""
    by_part: dict[Path, list[GGUFTensor]] = {}
    for tensor in file.tensors.values():
        by_part.setdefault(tensor.path, []).append(tensor)
    other = "refuses the file"
    for tensors in by_part.values():
        for before, after in pairwise(sorted(tensors, key=lambda t: (t.offset, t.n_bytes))):
            gap = after.offset - before.offset - before.n_bytes
            if gap < 0:
                yield Finding("error", after.name, f"its data overlap those of {before.name}", other)
            elif gap >= file.alignment:
                yield Finding("warning", after.name, f"{gap} bytes in front of its data belong to no tensor", other)


def _vocabulary(file: GGUFFile) -> Iterator[Finding]:
    model = file.metadata.get("tokenizer.ggml.model")
    if model in ("none", "no_vocab"):
        return
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray):
        yield Finding("error", "tokenizer.ggml.tokens", "is missing, or no list of texts")
        return
    texts = tokens.tolist()
    yield from _tokens(file, texts)
    yield from _special(file, texts)
    if model == "gpt2" and "tokenizer.ggml.pre" not in file.metadata:
        yield Finding(
            "warning",
            "tokenizer.ggml.pre",
            "is missing: how a text is cut before it is tokenized is a guess",
            "warns that quality will be degraded, and takes its default",
        )
    try:
        Tokenizer.from_metadata(file.metadata)
    except Error as error:
        yield Finding("error", "tokenizer", _without_path(error, file))


def _tokens(file: GGUFFile, texts: list[str]) -> Iterator[Finding]:
    place = "tokenizer.ggml.tokens"
    twice = [text for text, n in Counter(texts).items() if n > 1 and text]
    if twice:
        yield Finding(
            "error", place, f"{len(twice)} tokens are there twice, such as {twice[0]!r}", "takes the last of them"
        )
    empty = texts.count("")
    if empty:
        yield Finding("warning", place, f"{empty} tokens are empty", "gives them names and warns")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2 and embedding.shape[0] != len(texts):
        level = "error" if embedding.shape[0] < len(texts) else "note"
        yield Finding(level, place, f"{len(texts)} tokens, and {embedding.shape[0]} embeddings", "refuses the file")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        values = file.metadata.get(key)
        if values is not None and (not isinstance(values, np.ndarray) or len(values) != len(texts)):
            yield Finding("error", key, f"isn't a number for each of {len(texts)} tokens")
        elif isinstance(values, np.ndarray) and not np.isfinite(values.astype(np.float64)).all():
            yield Finding("error", key, "has values that aren't finite", "doesn't look")
    types = file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(types, np.ndarray) and len(types) and not np.isin(types, range(1, 7)).all():
        yield Finding(
            "warning", "tokenizer.ggml.token_type", "has kinds of tokens that there aren't", "leaves them undefined"
        )


def _special(file: GGUFFile, texts: list[str]) -> Iterator[Finding]:
    ends = set()
    for key in file.metadata:
        if not re.fullmatch(r"tokenizer\.ggml\.\w+_token_ids?", key):
            continue
        for token in np.atleast_1d(file.metadata[key]).tolist():
            if not isinstance(token, int) or not 0 <= token < len(texts):
                yield Finding("error", key, f"{token!r} is no token; there are {len(texts)}", "warns and takes its default")
            elif re.search(r"\.(eos|eot|eom|eog)_token_ids?$", key):
                ends.add(texts[token])
    if not ends:
        words = "no token ends a text: generation stops at limits alone"
        yield Finding("warning", "tokenizer.ggml.eos_token_id", words, "looks for one by its name")
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and ends:
        known = set(texts)
        marks = [text for text in _ENDS if text in template and text in known]
        if marks and not ends & set(marks):
            words = f"the template ends turns by {marks[0]!r}, and the file doesn't say that this ends an answer"
            yield Finding("warning", "tokenizer.ggml.eot_token_id", words, "knows such tokens by name")


def _templates(file: GGUFFile) -> Iterator[Finding]:
    for key in file.metadata:
        source = file.metadata[key]
        if re.fullmatch(r"tokenizer\.chat_template(\.\w+)?", key) and isinstance(source, str) and source:
            yield from _template(key, source)


def _template(key: str, source: str) -> Iterator[Finding]:
    try:
        template = ChatTemplate(source, "<s>", "</s>")
    except Error as error:
        yield Finding("error", key, str(error))
        return
    for text in sorted(_dangers(source)):
        yield Finding("warning", key, f"{text}: rendered within limits, but nothing that a conversation needs")
    hidden = sorted({c for c in source if not c.isprintable() and c not in "\n\r\t"})
    if hidden:
        yield Finding("warning", key, f"has characters that can't be seen: {''.join(hidden)!r}")
    try:
        template.render([{"role": "user", "content": "Hello"}])
    except Error as error:
        yield Finding("warning", key, f"a message of the user alone can't be rendered: {error}")


def _dangers(source: str) -> set[str]:
    """Parts of a template by which people have tried to get out of it, or to fill memory."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(
        re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", source)
    )
    found = set()
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("_") or node.attr in ("mro", "func_globals", "gi_frame"):
            found.add(f"reaches for .{node.attr}")
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and str(item.arg.value).startswith("__"):
            found.add(f"reaches for [{item.arg.value!r}]")
    for call in tree.find_all(nodes.Filter):
        if call.name == "attr":
            found.add("filter attr")
    for name in tree.find_all(nodes.Name):
        if name.ctx == "load" and name.name in _NAMES_OUTSIDE:
            found.add(f"uses {name.name}")
    for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
        if any(tree.find_all(kind)):
            found.add(f"{kind.__name__.lower()} of other files")
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, int) and not isinstance(const.value, bool) and abs(const.value) >= _MANY:
            found.add(f"a number like {const.value}")
    if any(tree.find_all(nodes.Pow)):
        found.add("a power")
    return found


def _weights(file: GGUFFile) -> Iterator[Finding]:
    whole = looked = 0
    for tensor in file.tensors.values():
        rows, all_of_it = _sample(tensor)
        whole += all_of_it
        looked += rows.nbytes
        part = "" if all_of_it else ", in a sample of its rows"
        with np.errstate(all="ignore"):
            try:
                values = block_type(tensor.type).dequantize(rows)
            except Error as error:
                yield Finding("error", tensor.name, str(error))
                continue
            bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            words = f"{bad} of {values.size} values aren't finite{part}"
            yield Finding("error", tensor.name, words, "loads it, unless --check-tensors is given")
        elif values.size > 1 and not values.any() and tensor.name.endswith("weight"):
            yield Finding("warning", tensor.name, f"all values are zero{part}", "doesn't look")
    total = sum(t.n_bytes for t in file.tensors.values())
    yield Finding(
        "note",
        "weights",
        f"looked at {looked / 1e6:,.1f} of {total / 1e6:,.1f} MB: at {whole} of {len(file.tensors)} tensors whole"
        + (", of the others at rows from all parts" if whole < len(file.tensors) else ""),
    )


def _sample(tensor: "GGUFTensor") -> tuple[np.ndarray, bool]:
    """Rows of a tensor's blocks, uint8 (n_rows, row_bytes), evenly from all of it, and whether they are all."""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    n = max(1, _SAMPLE // max(1, rows.shape[1]))
    if len(rows) <= n:
        return np.ascontiguousarray(rows), True
    return rows[np.linspace(0, len(rows) - 1, n).astype(np.int64)], False


_CHECKS: tuple[Callable[[GGUFFile], Iterator[Finding]], ...] = (
    _architecture,
    _keys,
    _places,
    _vocabulary,
    _templates,
    _weights,
)
