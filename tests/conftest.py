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
    """Runs the test in each SIMD form that this machine has."""
    monkeypatch.setitem(os.environ, "GGPY_SIMD", request.param)
    _forget()
    try:
        target()
    except UnsupportedError as error:
        pytest.skip(str(error))
    yield request.param
    monkeypatch.undo()
    _forget()
