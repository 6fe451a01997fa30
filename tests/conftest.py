"""What all tests share."""

import os

import pytest

from ggpy.errors import UnsupportedError
from ggpy.graph import Team
from ggpy.kernels import build
from ggpy.kernels.table import KERNELS
from ggpy.simd.target import target

_still_run = []  # compiled code: models of a wider scope than a test go on calling it


def _forget():
    if build._loaded.cache_info().currsize:
        _still_run.append(build._loaded())
    for cached in (build._key, build._loaded):
        cached.cache_clear()


#: types that take long to compile, or are made of the same functions as others, in all forms
_SLOW = ("IQ", "MXFP4", "TQ", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K")


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def simd_form(request, monkeypatch):
    """Runs the test in each SIMD form that this machine has.

    Half of the types are tested in the widest form alone, and in all with GGPY_TEST_ALL=1.
    """
    everything = bool(os.environ.get("GGPY_TEST_ALL"))
    given = getattr(request.node, "callspec", None)
    kind = str(given.params.get("kind", given.params.get("name", ""))) if given else ""
    widest = target().form
    if kind.startswith(_SLOW) and request.param != widest and not everything:
        pytest.skip("in the widest form only")
    monkeypatch.setitem(os.environ, "GGPY_SIMD", request.param)
    _forget()
    try:
        target()
    except UnsupportedError as error:
        pytest.skip(str(error))
    if request.session.testscollected > 500:  # all kernels together: processes start once, not for each test
        slow = () if everything or request.param == widest else _SLOW
        left_out = ("encode_", *(f"_{s}" for s in slow))
        build.compile_missing([n for n in KERNELS if not any(part in n for part in left_out)])
    yield request.param
    monkeypatch.undo()
    _forget()


@pytest.fixture
def teams(simd_form):
    """Teams by their number of threads, in the form of the test."""
    made = {}
    yield lambda n: made.setdefault(n, Team(n))
    for team in made.values():
        team.close()
