"""``python -m dsv4.cli``: the same as ``dsv4``."""

from . import main

main()
