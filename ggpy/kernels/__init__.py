"""The compiled part: every kernel has the C signature `kernel(ith, nth, params)`.

`table` names the kernels and their parameters, `build` compiles them into object files and loads those. The other
modules are the sources; they import numba, so only the compiling processes import them.
"""
