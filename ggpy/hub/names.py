"""What people type to name a model of the Hugging Face hub, and which of a repository's GGUF files they mean."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ..errors import Error

#: the type of GGUF file that is taken where none is asked for
USUAL = "Q4_K_M"
#: where a repository's branch isn't named
MAIN = "main"

_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?"
    r"(?:/(?P<file>[^:@]+\.gguf))?(?::(?P<type>[\w.-]+))?",
    re.IGNORECASE,
)
_PAGE = re.compile(
    rf"(?P<repo>{_PART}/{_PART})/(?:blob|resolve|raw|tree)/"
    r"(?P<revision>refs/\w+/[^/]+|[^/]+)(?:/(?P<file>.+\.gguf))?(?P<type>)",
    re.IGNORECASE,
)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


@dataclass(frozen=True)
class Reference:
    """A model of the hub.

    Attributes
    ----------
    repo : str
        owner/name.
    revision : str
        A branch, a tag or a commit.
    file : str
        One of its GGUF files, or "".
    type : str
        What is wanted of it, such as Q4_K_M, or "" for what is usual.
    """

    repo: str
    revision: str = MAIN
    file: str = ""
    type: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        file = f"/{self.file}" if self.file else ""
        return f"{self.repo}{revision}{file}{f':{self.type}' if self.type else ''}"


def parse(text: str) -> Reference | None:
    """The model that a name or an address means; None where it can't be one of the hub.

    owner/name, owner/name:TYPE, owner/name@revision, owner/name/file.gguf; any of these after hf.co/ or hf://; the address
    of a repository's page, or of one of its files.
    """
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        address = urlsplit(text)
        host, path = address.netloc, unquote(address.path).strip("/")
    elif separator:
        host, path = scheme, rest
    else:
        host, _, path = text.partition("/")
        if host.lower() not in _HOSTS:
            host, path = "", text
    if host.lower() not in ("", "hf", *_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc):
        return None
    found = (host and _PAGE.fullmatch(path)) or _NAME.fullmatch(path)
    if found is None or (found["file"] is None and found["repo"].lower().endswith(".gguf")):
        return None
    type = found["type"] or ""
    return Reference(found["repo"], found["revision"] or MAIN, found["file"] or "", "" if type == "latest" else type)


# Types as files' names have them, from few bits a weight to many: where the type that is wanted isn't there, the nearest
# here is taken.
_TYPES = (
    *("IQ1_S", "TQ1_0", "IQ1_M", "IQ2_XXS", "TQ2_0", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "Q2_K_L", "Q2_K_XL"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "Q3_K_S", "IQ3_M", "Q3_K_M", "Q3_K_L", "Q3_K_XL", "IQ4_XS", "MXFP4", "MXFP4_MOE"),
    *("NVFP4", "Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q4_K_L", "Q4_1", "Q4_K_XL", "Q5_0", "Q5_K_S", "Q5_K_M", "Q5_K_L"),
    *("Q5_1", "Q5_K_XL", "Q6_K", "Q6_K_L", "Q6_K_XL", "Q8_0", "Q8_K_XL", "F16", "BF16", "F32"),
)
_SAME = {"FP16": "F16", "FP32": "F32", "Q2": "Q2_K", "Q3": "Q3_K_M", "Q3_K": "Q3_K_M", "Q4": "Q4_K_M", "Q4_K": "Q4_K_M"}
_SAME |= {"Q5": "Q5_K_M", "Q5_K": "Q5_K_M", "Q6": "Q6_K", "Q8": "Q8_0"}
_FLOATS = ("F16", "BF16", "F32")
_TYPE = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-|i1-)?(?P<type>I?Q\d(?:_(?:K|NL|X*[SL]|M|\d)(?![A-Za-z0-9]))*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|B?F16|F32|"
    r"FP16|FP32)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
# Files beside a model: encoders of pictures, importance, and small models that guess tokens.
_BESIDE = re.compile(r"(?:^|[-_.])(?:mmproj|mtp|draft|eagle3?)(?=[-_.]|$)", re.IGNORECASE)
_IMPORTANCE = re.compile(r"(?:^|[-_.])imatrix(?:_\w+)?(?=[-_.]|$)", re.IGNORECASE)
_PREFIXED = re.compile(r"(?:^|[-_.])(?:ud|i1)-[^-]*$", re.IGNORECASE)
_SHOWN = 12  # types or files in a message


@dataclass(frozen=True)
class Choice:
    """A model among the files of a repository or folder.

    Attributes
    ----------
    files : tuple of str
        Its file, or its parts in order.
    type : str
        As the name says, such as Q4_K_M, in capitals; "" where it says none.
    """

    files: tuple[str, ...]
    type: str

    @property
    def stem(self) -> str:
        """The name without .gguf and without the number of a part."""
        return _stem(self.files[0])


def _stem(file: str) -> str:
    stem = file[: -len(".gguf")]
    split = _SPLIT.fullmatch(stem)
    return split["stem"] if split else stem


def type_in(file: str) -> str:
    """The type that a file's name has in it, or that of a folder in which it lies; "" where there is none."""
    for part in reversed(_stem(file).split("/")):
        found = [m["type"].upper() for m in _TYPE.finditer(part)]
        if found:
            return _SAME.get(found[-1], found[-1])
    return ""


def whole_among(files: Iterable[str]) -> list[Choice]:
    """The GGUF files among files, those in parts once, if no part is missing."""
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for file in files:
        if file.lower().endswith(".gguf"):
            split = _SPLIT.fullmatch(file[: -len(".gguf")])
            number, count = (int(split["part"]), int(split["count"])) if split else (1, 1)
            parts.setdefault((_stem(file), count), {})[number] = file
    return [
        Choice(tuple(found[i + 1] for i in range(count)), type_in(found[1]))
        for (_, count), found in sorted(parts.items())
        if set(found) == set(range(1, count + 1))
    ]


def models_among(files: Iterable[str]) -> list[Choice]:
    """The models among files: those that are whole, without what lies beside models."""
    whole = [c for c in whole_among(files) if not _is_importance(c)]
    models = [c for c in whole if not _BESIDE.search(_name(c))]
    return models or [c for c in whole if "mmproj" not in _name(c).lower()]


def _name(choice: Choice) -> str:
    return choice.stem.rpartition("/")[2]


def _is_importance(choice: Choice) -> bool:
    """Whether it is an importance matrix, and not a model that was quantized by one."""
    return _IMPORTANCE.search(_name(choice)) is not None and choice.type in ("", *_FLOATS)


def of_type(models: Iterable[Choice], wanted: str) -> list[Choice]:
    """The models of a type, or whose names end with it, as far as the name leaves several."""
    end = re.compile(rf"(?:^|[-_./]){re.escape(wanted)}$", re.IGNORECASE)
    type = _SAME.get(wanted.upper(), wanted.upper())
    found = [c for c in models if c.type == type or end.search(c.stem)]
    named = [c for c in found if end.search(c.stem)] or found
    return [c for c in named if not _PREFIXED.search(c.stem)] or named


def choose(where: str, models: list[Choice], wanted: str = "", usual: str = USUAL) -> Choice:
    """The model of a type among several.

    Parameters
    ----------
    where : str
        The repository or folder, for messages.
    models : list of Choice
    wanted : str
        A type, with what stands before it in names if need be (UD-Q4_K_XL); or the end of a name; or "".
    usual : str
        The type to take where none is wanted; where it isn't there, the nearest.

    Raises
    ------
    Error
        There is none of the wanted type, or several; lists them.
    """
    found = of_type(models, wanted or usual)
    if not found and wanted:
        raise Error(f"{where}: no GGUF file of type {wanted}; there are {types_of(models)}")
    if not found:
        rank = _rank(usual)
        nearest = min(models, key=lambda c: (abs(_rank(c.type) - rank), -_rank(c.type))).type
        found = of_type((c for c in models if c.type == nearest), nearest)
    if len(found) > 1:
        names = some([c.files[0] for c in found])
        raise Error(f"{where}: several models of type {found[0].type or 'unknown'}: name one as {where}/FILE, of {names}")
    return found[0]


def _rank(type: str) -> int:
    return _TYPES.index(type) if type in _TYPES else len(_TYPES)


def types_of(models: Iterable[Choice]) -> str:
    """The types of models, for a message; files' names where types aren't known."""
    return some(list(dict.fromkeys(c.type or c.files[0] for c in sorted(models, key=lambda c: _rank(c.type)))))


def some(names: list[str]) -> str:
    """The first of some names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
