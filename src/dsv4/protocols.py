"""What the model leaves to others: what attention remembers, and experts that are not in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .kernels import RowFormat, Rows, Span
from .kernels.looking import Place


class WindowState(Protocol):
    """What a layer that attends to its window alone remembers of one timeline.

    ``engine.speculate`` implements it for the MTP block."""

    def window(self, kv: Tensor) -> Span:
        """The last ``sliding_window - 1`` entries and, behind them, room for ``kv [B, T, D]``."""

    @property
    def begun(self) -> bool:
        """Whether there has been a token, so that ``places`` can be asked."""

    def places(self, count: int) -> list[Place]:
        """In place of all the others, for ``count`` tokens that native kernels take care of."""


class AttentionState(WindowState, Protocol):
    """What any attention layer remembers of one timeline; ``engine.kvstate`` implements it."""

    def raw(self, which: str, kv: Tensor, ratio: int, overlap: bool) -> Span:
        """Room for ``kernels.raw_rows`` of ``kv [B, T, W]``; ``which`` is "kv" or "index"."""

    def blocks(self, which: str, ratio: int) -> Tensor | None:
        """The raw rows of the blocks that became whole with the last ones; with ``overlap`` those
        of the block before come first."""

    def rows(self, which: str, new: Tensor | None) -> Rows:
        """Append compressed rows, if there are any; return all of them."""

    def table(self, which: str) -> tuple[int, int, RowFormat]:
        """Where rows begin in a block of 128 tokens, how many it has, and how they are stored."""


class Continued(NamedTuple):
    """New tokens of a timeline, the position of the first, and what its layers remember."""

    ids: Sequence[int]
    start: int
    states: Sequence[WindowState]


class ExpertSource(Protocol):
    """A layer's routed experts when they are no parameters; ``engine.experts`` implements it."""

    def expect(self, ids: Tensor) -> None:
        """Begin to read the experts ``ids [N, K]``."""

    def routed(
        self, x: Tensor, ids: Tensor, weights: Tensor, limit: float, round_activations: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """As ``kernels.routed_experts``."""
