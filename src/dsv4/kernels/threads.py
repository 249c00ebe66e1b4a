"""How many threads a kernel gets: as many as torch was given (``torch.set_num_threads``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

FEW = 16  # tokens of a pass that is hundreds of steps of microseconds, at most
SMALL = 100_000_000  # parameters touched per token, of a model for which torch has one thread

stay_awake: Callable[[int], None] | None = None  # of the native kernels' threads
_mine = threading.local()  # threads of the pass that this thread is in


@contextmanager
def pass_of(tokens: int, parameters: int) -> Iterator[None]:
    """A pass over ``tokens``, each of which touches so many ``parameters``.

    Torch's threads cannot be told of the steps of a pass over few tokens in less time than these
    take, so there torch has one, for what little it does; the native kernels' threads stay awake
    from the first step to the last. Without these kernels, one or two tokens of a small model are
    computed in one thread.
    """
    given = threads()
    few = tokens <= FEW if stay_awake else tokens <= 2 and parameters < SMALL
    if given == 1 or not few:
        yield
        return
    before = getattr(_mine, "threads", 0)
    torch.set_num_threads(1)
    if stay_awake:
        _mine.threads = given
        stay_awake(1)
    try:
        yield
    finally:
        if stay_awake:
            stay_awake(-1)
        _mine.threads = before
        torch.set_num_threads(given)


def threads() -> int:
    """For a native kernel."""
    return getattr(_mine, "threads", 0) or torch.get_num_threads()
