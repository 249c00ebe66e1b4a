"""Notices a step that does not return.

What is too long depends on the model and the machine, so it is measured: ``patience`` seconds and
FACTOR times the slowest step so far, which a long prompt slows down little by little.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FACTOR = 10


class Watchdog:
    """Calls ``alarm(seconds)`` once, in a thread of its own, for a step that takes too long.

    ``late`` is true from then until that step returns after all. The thread sleeps while steps
    come and go: it looks when one that it saw would be late, and not at all while there is none.
    """

    def __init__(
        self, patience: float, alarm: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience, self._alarm, self._clock = patience, alarm, clock
        self.late = False
        self._slowest = 0.0
        self._began: float | None = None
        self._asleep = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="dsv4-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        began = self._clock()
        with self._changed:
            self._began = began
            if self._asleep:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._began, self.late = None, False
                self._slowest = max(self._slowest, self._clock() - began)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                while self._began is None or self.late:
                    if self._closing:
                        return
                    self._asleep = True
                    self._changed.wait()
                    self._asleep = False
                took = self._clock() - self._began
                left = self._patience + FACTOR * self._slowest - took
                if left > 0 and not self._closing:
                    self._changed.wait(left)
                    continue
                if self._closing:
                    return
                self.late = True
            self._alarm(took)
