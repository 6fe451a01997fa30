"""Which quantization of a model should I run? Compares levels of several models, one after the other.

    python benchmarks/quant_levels.py MODEL… [--types q8_0,q4_k_m,…] [--text FILE] [--imatrix FILE] [--out FOLDER] …

For each model, a GGUF file of 16 or 32 bits or a checkpoint: the table in the terminal, and NAME-levels.json, .csv, .md,
.png, .html in the folder. It is `ggpy compare` for many models; stopped, it goes on where it was.
"""

import argparse
from pathlib import Path

from ggpy.cli.common import find_model
from ggpy.cli.compare import print_table
from ggpy.measure.levels import TYPES, compare_levels
from ggpy.measure.report import write_reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "text.txt")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix to quantize with; of the one model then given")
    parser.add_argument("--out", type=Path, default=Path("levels"))
    parser.add_argument("-c", "--ctx", type=int, default=512)
    parser.add_argument("-n", "--chunks", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int)
    a = parser.parse_args()
    for model in a.models:
        comparison = compare_levels(
            find_model(model, "f16"),
            Path(model).name.removesuffix(".gguf"),
            a.types.split(","),
            a.text,
            a.out,
            imatrix=a.imatrix,
            n_ctx=a.ctx,
            n_chunks=a.chunks,
            n_threads=a.threads,
            progress=lambda level, state: print(f"\r\x1b[K{level}: {state}", end="", flush=True),
        )
        print("\r\x1b[K", end="")
        print_table(comparison)
        write_reports(comparison, a.out)


if __name__ == "__main__":
    main()
