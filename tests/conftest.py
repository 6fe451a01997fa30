"""What all tests share."""

import os

import pytest

from ggpy.errors import UnsupportedError
from ggpy.kernels import build
from ggpy.simd.target import target


def _forget():
    for cached in (build._key, build._loaded):
        cached.cache_clear()


@pytest.fixture(params=["avx512", "avx2", "portable"])
def simd_form(request, monkeypatch):
    """Runs the test in each SIMD form that this machine has.

    The grid types take long to compile, and are the same functions in all forms: GGPY_TEST_ALL=1 has them in all, else
    they are tested in the widest.
    """
    given = getattr(request.node, "callspec", None)
    kind = str(given.params.get("kind", given.params.get("name", ""))) if given else ""
    is_grid = kind.startswith(("IQ1", "IQ2", "IQ3"))
    if is_grid and request.param != target().form and not os.environ.get("GGPY_TEST_ALL"):
        pytest.skip("grid types: in the widest form only")
    monkeypatch.setitem(os.environ, "GGPY_SIMD", request.param)
    _forget()
    try:
        target()
    except UnsupportedError as error:
        pytest.skip(str(error))
    yield request.param
    monkeypatch.undo()
    _forget()
