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

    A loss is a spike when it is not finite, or when the window is full and the loss exceeds its
    median by more than ``factor`` times the median absolute deviation (which counts as at least 1%
    of the median). With a window of 0 only a loss that is not finite is one.
    """

    def __init__(self, window: int, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """The largest loss that is no spike."""
        if not self.losses or len(self.losses) < (self.losses.maxlen or 1):
            return math.inf
        usual = median(self.losses)
        deviation = median(abs(x - usual) for x in self.losses)
        return usual + self.factor * max(deviation, 0.01 * abs(usual))

    def is_spike(self, loss: float) -> bool:
        return not math.isfinite(loss) or loss > self.limit()

    def add(self, loss: float) -> None:
        """Remember the loss of a step that was taken."""
        self.losses.append(loss)
