"""Reading files is light."""

import subprocess
import sys


def test_reading_imports_neither_gguf_nor_compilers():
    code = "import sys, ggpy.file, ggpy.quant; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ggpy.file" in loaded
    assert not {"gguf", "numba", "llvmlite", "torch", "transformers", "tokenizers"} & set(loaded)
