"""Whether the packages that ggpy needs are here, in versions that it runs with."""

import re
from importlib import metadata

#: a line of a package's metadata: name, lowest version and, for what isn't always needed, the extra that it belongs to
_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[[^]]*\])?>=([\d.]+)[^;]*(?:;.*extra == ["'](\w+)["'])?""")


def missing_packages(extra: str = "") -> list[str]:
    """What ggpy's own metadata asks for, always or for an extra, and isn't here: "numba 0.66 or newer (0.61.2 is here)"."""
    try:
        lines = metadata.requires("ggpy") or []
    except metadata.PackageNotFoundError:  # run from its source, without an installation
        return []
    missing = []
    for line in lines:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match is None or (match[3] or "") not in ("", extra):
            continue
        name, lowest = match[1], match[2]
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name} {lowest} or newer")
            continue
        if _numbers(here) < _numbers(lowest):
            missing.append(f"{name} {lowest} or newer ({here} is here)")
    return missing


def _numbers(version: str) -> list[int]:
    """The numbers that a version begins with, without zeros at their end."""
    match = re.match(r"[\d.]*\d", version)
    numbers = [int(n) for n in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
