"""llama.cpp's own choice of types: a dry run of its quantizer, read from its log.

`python -m tests.quantization.llama_cpp_types` writes expected_types.json anew.
"""

import ctypes
import hashlib
import json
import re
import tempfile
from functools import lru_cache
from pathlib import Path

EXPECTED = Path(__file__).with_name("expected_types.json")
_LINE = re.compile(r"\]\s+(\S+)\s+- \[[^]]*\], type = +(\w+), (?:size = +)[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")

_log = []


@lru_cache
def _keep_log():
    """Makes llama.cpp log into _log, for good: it keeps the callback."""
    from llama_cpp import llama_cpp as api

    callback = api.llama_log_callback(lambda level, text, data: _log.append(text))
    api.llama_log_set(callback, None)
    return callback


def llama_cpp_types(path, file_type, has_importance):
    """Tensor's name -> type by llama.cpp."""
    from llama_cpp import llama_cpp as api

    _log.clear()
    _keep_log()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = file_type, 1, True
    one = (ctypes.c_float * 1)(1.0)
    entries = (api.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].size = b"unused", 1
    entries[0].data = ctypes.cast(one, ctypes.POINTER(ctypes.c_float))
    if has_importance:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(api.llama_model_imatrix_data))
    result = api.llama_model_quantize(str(path).encode(), b"none.gguf", ctypes.byref(params))
    text = b"".join(_log).decode()
    assert result == 0, text[-500:]
    return {name: (new or old).upper() for name, old, new in _LINE.findall(text)}


def digest(types):
    return hashlib.sha256("\n".join(f"{n} {t}" for n, t in sorted(types.items())).encode()).hexdigest()[:16]


def cases():
    """(shape, file type, has_importance) for all."""
    from ggpy.quantization import FILE_TYPES

    from .shapes import SHAPES

    return [(s, t, importance) for s in SHAPES for t in FILE_TYPES for importance in (False, True)]


if __name__ == "__main__":
    import llama_cpp

    from ggpy.quantization import FILE_TYPES

    from .shapes import SHAPES, write_gguf

    found = {"source": f"llama_model_quantize of llama-cpp-python {llama_cpp.__version__}, dry runs"}
    with tempfile.TemporaryDirectory() as folder:
        for shape, name, importance in cases():
            path = Path(folder) / f"{shape}.gguf"
            if not path.exists():
                write_gguf(path, *SHAPES[shape])
            key = f"{shape} {name}" + " importance" * importance
            found[key] = digest(llama_cpp_types(path, FILE_TYPES[name].id, importance))
    EXPECTED.write_text(json.dumps(found, indent=0) + "\n")
