"""`ggpy warmup`: compile kernels ahead of their first use."""

from typing import Annotated

import typer

from .common import KVType, kernel_progress, open_model


def warmup(
    model: Annotated[str | None, typer.Argument(help="Only what this model needs; default: all.", metavar="MODEL")] = None,
    kv_type: KVType = "f16",
) -> None:
    """Compile the kernels for this processor ahead, for a model or all of them."""
    if model is not None:
        open_model(model, None, None, kv_type=kv_type).close()
    else:
        from ..kernels.build import compile_missing
        from ..kernels.table import KERNELS

        with kernel_progress() as progress:
            compile_missing(KERNELS, progress)
    print("all kernels are compiled")
