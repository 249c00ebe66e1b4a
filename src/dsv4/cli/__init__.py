"""The ``dsv4`` command. Each function parses, calls and prints; the work is done elsewhere.

Heavy imports live inside the functions, so that ``dsv4 --help`` answers at once. Whatever dsv4
refuses (DSV4Error) is printed in red on stderr, with exit code 2 and no traceback; Ctrl-C exits
with 130.
"""

from __future__ import annotations

import os
import sys

from ..errors import DSV4Error
from . import (  # each adds its commands
    accounts,
    connect,
    data,
    files,
    measure,
    plan,
    talk,
    training,
)
from .app import app

__all__ = [
    "accounts",
    "app",
    "connect",
    "data",
    "files",
    "main",
    "measure",
    "plan",
    "talk",
    "training",
]


def main() -> None:
    """Entry point of the ``dsv4`` command."""
    # Before torch comes: its threads then wait for each other some microseconds awake, else asleep.
    # Awake for milliseconds, as by default, they take the cores from those they are waiting for.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except DSV4Error as e:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(str(e), style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
