"""The command line."""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from . import __doc__ as about
from . import make_seeds
from .kinds import KINDS
from .work import Campaign, work


def main():
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=Path, help="sound files that were made before, or where to make them")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        seeds = options.seeds or Path(folder)
        seeds.mkdir(exist_ok=True)
        if not any(seeds.iterdir()):
            make_seeds(seeds, every=True)
        failed = 0
        for kind in options.kinds:
            started = time.time()
            numbers = range(options.first, options.first + options.runs)
            campaign = Campaign(kind, numbers, seeds, partial(print, flush=True), options.keep)
            failed += len(campaign.failures)
            print(f"{kind}: {campaign} in {time.time() - started:.0f} s", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
