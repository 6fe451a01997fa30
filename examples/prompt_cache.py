"""A prompt's keys and values in a file: computed once, also over restarts.

python examples/prompt_cache.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import ggpy

LAW = "And these are the judgments which thou shalt set before them. " * 20


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "law.cache"
        with ggpy.load(path, n_ctx=1024) as model:
            first = model.generate(LAW + "If a man", max_tokens=20, temperature=0).run()
            model.save_cache(cache, LAW)
        print(f"{cache.stat().st_size / 1e6:.1f} MB for {len(first.prompt_ids)} tokens")

        with ggpy.load(path, n_ctx=1024) as model:  # another day
            model.load_cache(cache)
            again = model.generate(LAW + "If a man", max_tokens=20, temperature=0).run()
        assert again.ids == first.ids  # the same bits
        print(f"{again.n_reused} of {len(again.prompt_ids)} tokens were there:", again.text.strip())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
