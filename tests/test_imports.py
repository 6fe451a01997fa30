"""Imports point left: errors, quant, simd, kernels, file, graph, models, generate, cli."""

import ast
from pathlib import Path

import ggpy

ROOT = Path(ggpy.__file__).parent
ORDER = {
    "errors": 0,
    "cpus": 0,
    "quant": 1,
    "simd": 2,
    "kernels": 3,
    "file": 4,
    "graph": 5,
    "quantize": 6,
    "models": 7,
    "generate": 8,
    "measure": 9,
}


def imports(path):
    """The parts of ggpy that a module imports, and the names of other packages."""
    parts, packages = set(), set()
    package = path.relative_to(ROOT.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            parts.add(target[1] if len(target) > 1 and target[1] else "")
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {a.name.split(".")[0] for a in node.names}
    return parts - {""}, packages


def test_a_module_imports_only_from_its_left():
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        parts, packages = imports(path)
        if part in ORDER:
            wrong = {p for p in parts if p != part and ORDER.get(p, 99) > ORDER[part]}
            assert not wrong, f"{path} imports {wrong}"
        assert part == "cli" or "converters" not in packages, f"{path} imports converters"
        assert not {"torch", "transformers"} & packages, f"{path} imports test dependencies"
