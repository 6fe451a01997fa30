"""Compiles kernels for an ARM processor on another machine, for `.ci/arm`: emulated, it would take hours.

    python -m tests.cross CPU FEATURES KERNEL...

CPU and FEATURES are LLVM's, as ggpy's target says them there; the kernels go to GGPY_CACHE, where ggpy looks for them there
if numba and llvmlite have the same versions. What is there stays.
"""

import os
import platform
import sys

import llvmlite.binding as llvm

TRIPLE = "aarch64-unknown-linux-gnu"


def stand_in(cpu: str, features: str) -> None:
    """Makes Python, LLVM and numba's settings in this process say that this is that processor."""
    here = os.uname()
    os.uname = lambda: os.uname_result((*here[:4], "aarch64"))
    platform.machine = lambda: "aarch64"
    os.environ.update(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = llvm.get_default_triple = lambda: TRIPLE
    llvm.Target.from_default_triple = classmethod(lambda target: target.from_triple(TRIPLE))
    llvm.get_host_cpu_name = lambda: cpu
    llvm.get_host_cpu_features = lambda: {feature[1:]: feature[0] == "+" for feature in features.split(",")}
    from ggpy.simd import target

    target._arm_has_dot_products = lambda: "+dotprod" in features.split(",")


def main(cpu: str, features: str, *names: str) -> None:
    stand_in(cpu, features)
    from ggpy.kernels import build
    from ggpy.kernels.source import compile_kernel

    for name in names:
        if build._read_object(name) is None:
            build._write_object(name, *compile_kernel(name))
            print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
