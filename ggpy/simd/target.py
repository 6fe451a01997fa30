"""Which instruction set the kernels are compiled for.

Four forms exist. `avx512` needs AVX-512 with VNNI, `amx` also AMX's tiles of int8, for which the system must give leave;
`avx2` needs AVX2, FMA and F16C (and uses AVX-VNNI where the CPU has it), `portable` is plain LLVM vectors of 128 bits and
runs on any CPU that LLVM knows; on ARM with the dot-product extension it uses `sdot`. `GGPY_SIMD` forces a form, so that
all of them can be tested on one machine.

This module imports llvmlite only: the running process never needs numba.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

from ..errors import UnsupportedError

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
_NEEDS = {
    "amx": (*_AVX512, "amx-tile", "amx-int8"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}


@dataclass(frozen=True)
class Target:
    """A form and the LLVM names of the processor that it is compiled for."""

    form: str
    cpu: str
    features: str

    @property
    def lanes(self) -> int:
        """float32 values in a vector; also the number of weight rows that a matrix kernel works on at once."""
        return {"amx": 16, "avx512": 16, "avx2": 8, "portable": 4}[self.form]

    @property
    def tokens(self) -> int:
        """Tokens that a matrix kernel multiplies at once: as many as registers are left for accumulators."""
        return 8 if self.lanes == 16 else 4

    def has(self, feature: str) -> bool:
        """Whether LLVM may use `feature` (an LLVM feature name) in this form."""
        return f"+{feature}" in self.features.split(",")


@lru_cache
def _host() -> tuple[str, dict[str, bool]]:
    import llvmlite.binding as llvm

    try:
        features = dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM can't tell on this platform
        features = {}
    if features.get("amx-tile") and not _may_use_tiles():
        features = {f: on and not f.startswith("amx") for f, on in features.items()}
    if _arm_has_dot_products():
        features["dotprod"] = True
    return llvm.get_host_cpu_name(), features


def _may_use_tiles() -> bool:
    """Whether Linux lets this process use AMX's tiles, for which it must be asked (arch_prctl(2), ARCH_REQ_XCOMP_PERM)."""
    import ctypes
    import sys

    if sys.platform != "linux":
        return False
    arch_prctl, ask_for_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, ask_for_permission, tile_data) == 0


def _arm_has_dot_products() -> bool:
    """Whether this is an ARM processor with `sdot`: LLVM's list leaves that out on Linux and macOS."""
    import ctypes
    import sys

    if not cpu_is_arm():
        return False
    if sys.platform == "linux":
        hardware, dot_products = 16, 1 << 20  # AT_HWCAP, HWCAP_ASIMDDP of the kernel's headers
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
        return bool(getauxval(hardware) & dot_products)
    return sys.platform == "darwin"  # all of Apple's own


def target() -> Target:
    """The widest form that this CPU runs, or the one that GGPY_SIMD names.

    Raises
    ------
    UnsupportedError
        GGPY_SIMD names an unknown form, or one that this CPU can't run.
    """
    cpu, features = _host()
    runs = [form for form, needs in _NEEDS.items() if all(features.get(f, False) for f in needs)]
    form = os.environ.get("GGPY_SIMD") or runs[0]
    if form not in runs:
        raise UnsupportedError(f"GGPY_SIMD={form}: this CPU runs {', '.join(runs)}")
    if form == "avx512":
        features = {f: on and not f.startswith("amx") for f, on in features.items()}
    elif form == "avx2":
        # A forced avx2 stands for a CPU without AVX-512: LLVM must not use it either.
        features = {f: on and not f.startswith(("avx512", "avx10", "amx")) for f, on in features.items()}
        cpu = "x86-64-v3" if any(_host()[1].get(f) for f in ("avx512f",)) else cpu
    elif form == "portable" and cpu_is_x86():
        return Target(form, "x86-64", "")
    # What is off is said, too: a system may keep what the processor's name stands for from its programs.
    return Target(form, cpu, ",".join(f"{'+' if on else '-'}{f}" for f, on in sorted(features.items())))


def cpu_is_x86() -> bool:
    """Whether the host is a 64-bit x86."""
    import platform

    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_is_arm() -> bool:
    """Whether the host is a 64-bit ARM."""
    import platform

    return platform.machine().lower() in ("aarch64", "arm64")


def cpu_is_amd() -> bool:
    """Whether the host is one of AMD's processors."""
    return _host()[0].startswith("znver")
