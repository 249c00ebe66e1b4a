"""Which routed experts are in memory: the bookkeeping alone, without a tensor or a file.

Memory is a number of slots, an expert in each. A pass asks layer by layer for the experts its
tokens chose; those that are not there take the slots of others, and whose is decided here. The
expert to go is the one whose next use is expected last:

    next use = passes until its layer's turn comes + 1 / (how often a pass uses it) - 1

"How often" counts the passes that used the expert, each half as much after HALF_LIFE later ones,
so it is both frequency and recency, and it is remembered of experts that are no longer there. While
single tokens are decoded it decides alone. In a long prompt every pass uses nearly every expert of
every layer in turn; then all are equally frequent, the turn decides, and the experts that stay are
those that come next, where least recently used would drop each just before its use.

Decisions depend on the sequence of calls and on nothing else: ``replay`` makes the same ones again
from a trace of choices, and says what had to be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

HALF_LIFE = 16  # passes
AHEAD = 16  # slots: so much may be read before it is used, by less than the whole memory


class Step(NamedTuple):
    """An expert of a layer in its slot; ``read``: it must be brought there first."""

    expert: int
    slot: int
    read: bool


class Counts(NamedTuple):
    """Uses of experts by passes, and those for which one had to be read."""

    used: int
    read: int

    @property
    def hit_rate(self) -> float:
        """The part of the uses that found the expert in memory; 0 before the first."""
        return 1 - self.read / self.used if self.used else 0.0


class Residency:
    """Experts in ``slots`` places of memory. ``layers`` have ``experts`` each, of which a token
    uses ``chosen``."""

    def __init__(self, slots: int, layers: int, experts: int, chosen: int) -> None:
        self.slots = slots
        self._layers, self._experts = layers, experts
        self._prior = chosen / experts
        self._ahead = min(AHEAD, slots // 4)
        self._held = np.full(slots, -1, np.int64)  # layer * experts + expert
        self._planned = np.full(slots, -(1 << 40), np.int64)  # when, in steps
        self._slot_of: dict[int, int] = {}
        self._steps = self._pass = 0
        self._count = np.zeros(layers * experts)  # uses, faded since `_last`
        self._last = np.zeros(layers * experts, np.int64)
        self._passes = 0.0  # faded in the same way

    def next_pass(self) -> None:
        """Another pass begins."""
        self._pass += 1
        self._passes = self._passes * 2 ** (-1 / HALF_LIFE) + 1

    def plan(self, layer: int, experts: Iterable[int]) -> list[Step]:
        """Where the distinct ``experts`` of a layer are, or are to be brought, in the order of use.

        Those that are there come first. A step may take the slot of one before it, of this plan
        or an earlier one, which must have been used by then; it is never one of the last few.
        """
        keys = [layer * self._experts + expert for expert in sorted(experts)]
        missing = [key for key in keys if key not in self._slot_of]
        there = [key for key in keys if key in self._slot_of]
        steps = [self._step(key, self._slot_of[key], read=False) for key in there]
        for key in missing:
            slot = self._expendable(layer)
            self.forget(slot)
            self._held[slot], self._slot_of[key] = key, slot
            steps.append(self._step(key, slot, read=True))
        return steps

    def forget(self, slot: int) -> None:
        """What was to be in the slot is not."""
        self._slot_of.pop(int(self._held[slot]), None)
        self._held[slot] = -1

    def holds(self, layer: int, expert: int) -> bool:
        return layer * self._experts + expert in self._slot_of

    def _step(self, key: int, slot: int, read: bool) -> Step:
        self._steps += 1
        self._planned[slot] = self._steps
        self._count[key] = self._count[key] * self._faded(self._last[key]) + 1
        self._last[key] = self._pass
        return Step(key % self._experts, slot, read)

    def _faded(self, since: np.int64) -> float:
        return float(2.0 ** ((since - self._pass) / HALF_LIFE))

    def _expendable(self, layer: int) -> int:
        """The slot whose expert is expected to be used last, when ``layer`` is being used."""
        held = self._held
        turn = ((held // self._experts - layer - 1) % self._layers + 1) / self._layers
        count = self._count[held] * 2.0 ** ((self._last[held] - self._pass) / HALF_LIFE)
        often = np.minimum(1, (count + self._prior) / (self._passes + 1))
        wait = np.where(held < 0, np.inf, turn + 1 / often)
        wait[self._planned > self._steps - self._ahead] = -1
        return int(wait.argmax())


def replay(
    trace: Iterable[Sequence[tuple[int, Sequence[int]]]],
    slots: int, layers: int, experts: int, chosen: int,
) -> Counts:  # fmt: skip
    """What the policy makes of ``trace``: of each pass, layers and the distinct experts used."""
    residency = Residency(slots, layers, experts, chosen)
    used = read = 0
    for one_pass in trace:
        residency.next_pass()
        for layer, distinct in one_pass:
            steps = residency.plan(layer, distinct)
            used += len(steps)
            read += sum(step.read for step in steps)
    return Counts(used, read)
