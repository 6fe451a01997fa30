"""Imports point left, and what the package has at its top is there."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import ggpy

ROOT = Path(ggpy.__file__).parent
ORDER = {
    "printable": 0,
    "errors": 0,
    "cpus": 0,
    "installed": 0,
    "quant": 1,
    "simd": 2,
    "kernels": 3,
    "file": 4,
    "graph": 5,
    "quantization": 6,
    "models": 7,
    "pipeline": 8,
    "generate": 9,
    "measure": 10,
    "batching": 10,
    "server": 10,
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
        assert part in ("cli", "hub", "__init__") or "converters" not in packages, f"{path} imports converters"
        assert not {"torch", "transformers"} & packages, f"{path} imports test dependencies"


def test_the_top_has_what_it_lists_and_is_light():
    for name in ggpy.__all__:
        assert getattr(ggpy, name).__doc__ or name in ("Message", "Processor")
    assert set(ggpy.__all__) <= set(dir(ggpy))
    code = "import sys, ggpy; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "llvmlite", "gguf", "jinja2", "tokenizers", "typer", "asyncio"} & set(loaded)


def test_load_says_what_a_model_takes():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(ggpy.load) == parameters(ggpy.Model)
    assert all(f"    {name} : " in ggpy.load.__doc__ for name, _, _ in parameters(ggpy.load))


def test_the_quantize_function_is_no_module():
    import ggpy.quantization

    assert callable(ggpy.quantize) and ggpy.quantize is ggpy.quantization.quantize_model
