"""How many threads a kernel gets: torch's number. A pass over one token of a small model has one
thread, because others cannot be told of its steps in less time than these take; but some of its
steps read megabytes when the context is long, and they get more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_given = 1  # threads for long steps where torch has fewer


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for all but long steps, which go on with what torch has now."""
    global _given
    given = torch.get_num_threads()
    torch.set_num_threads(1)
    _given = given
    try:
        yield
    finally:
        _given = 1
        torch.set_num_threads(given)


def most_threads() -> int:
    """For steps that tell each other's threads of the next one without Python."""
    return max(torch.get_num_threads(), _given)


def threads(worth: int) -> int:
    """For a step that is worth as many as ``worth``."""
    return max(torch.get_num_threads(), min(_given, worth))
