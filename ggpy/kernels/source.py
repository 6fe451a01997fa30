"""How a kernel's Python source becomes an object file. Imported by the compiling process alone."""

import importlib
import inspect

import llvmlite.binding as llvm
from numba import njit, types

from ..simd.vector import unpack_params
from .table import KERNELS

llvm.initialize_native_asmparser()  # kernels have lines of assembly

#: kernel name -> its Python function, filled by `kernel` as the source modules are imported
SOURCES: dict = {}

#: for the functions that kernels are made of: no Python exceptions, C's division
function = njit(error_model="numpy", nogil=True)
#: the same for those in the innermost loops, which must not be calls, whatever their length; compiling takes longer
inlined = njit(error_model="numpy", nogil=True, forceinline=True)


def kernel(name: str):
    """Registers a function of (ith, nth, *params) as the source of the kernel `name` of the table."""

    def register(body):
        names = tuple(inspect.signature(body).parameters)
        expected = ("ith", "nth", *KERNELS[name].params)
        if names != expected:
            raise TypeError(f"kernel {name}: parameters {names}, the table says {expected}")
        SOURCES[name] = body
        return body

    return register


def compile_kernel(name: str) -> tuple[str, bytes]:
    """Compiles one kernel.

    Returns
    -------
    symbol : str
        The name of the kernel in the object file.
    code : bytes
        An object file for this machine.
    """
    importlib.import_module(f".{KERNELS[name].module}", __package__)
    body = function(SOURCES[name])
    n = len(KERNELS[name].params)

    # Without numba's wrappers, which would need CPython's and numba's own symbols. What is left has numba's calling
    # convention: int32 f(void **result, void **exception, int64 ith, int64 nth, int64 params).
    @njit(error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    def entry(ith, nth, params):
        body(ith, nth, *unpack_params(params, n))

    entry.compile((types.int64, types.int64, types.int64))
    compiled = entry.overloads[entry.signatures[0]]
    return compiled.fndesc.llvm_func_name, compiled.library._get_compiled_object()
