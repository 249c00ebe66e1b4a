"""How many threads a pass is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..kernels.threads import one_thread

SMALL = 100_000_000  # parameters touched per token


@contextmanager
def suitable_threads(parameters: int, rows: int) -> Iterator[None]:
    """Run a pass of ``rows`` tokens through a model that touches ``parameters`` per token.

    One or two tokens (a guess is checked beside the one before it) of a model of less than SMALL,
    such as v4-nano, are computed in one thread: what another would do it can hardly be told in
    less time. All else, and what reads megabytes of a long context, has the threads that torch was
    given (``torch.set_num_threads``, ``--threads``; by default one per core).
    """
    if rows > 2 or parameters >= SMALL or torch.get_num_threads() == 1:
        yield
        return
    with one_thread():
        yield
