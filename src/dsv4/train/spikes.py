"""Loss spikes: when a loss is one, and for how long routing is then done ahead of time.

The report (section 4.2.3) says that training goes back a little after a spike and that routing is
anticipatory for some time then: a step's experts are chosen by the parameters of an earlier step.
It gives neither rule nor numbers; those here are ours.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median


class SpikeWatch:
    """Knows the losses of the last ``window`` steps of a stage.

    A loss is a spike when it is not finite, or when the window is full and two losses in a row
    exceed its median by more than ``factor`` times the median absolute deviation (which counts as
    at least 1% of the median): one alone is a batch that is harder than the others, such as one of
    chat among sums. With a window of 0 only a loss that is not finite is a spike.
    """

    def __init__(self, window: int, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """The largest loss that is usual."""
        if not self.losses or len(self.losses) < (self.losses.maxlen or 1):
            return math.inf
        usual = median(self.losses)
        deviation = median(abs(x - usual) for x in self.losses)
        return usual + self.factor * max(deviation, 0.01 * abs(usual))

    def is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        return bool(self.losses) and min(loss, self.losses[-1]) > self.limit()

    def add(self, loss: float) -> None:
        """Remember the loss of a step that was taken."""
        self.losses.append(loss)
