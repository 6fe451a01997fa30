"""`python -m ggpy`."""

from .cli import main

main()
