"""Vector types for numba kernels, and the choice of instruction set. See `target` (light) and `vector` (imports numba)."""
