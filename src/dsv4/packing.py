"""Samples of different lengths in one row, each seen alone by whatever looks across tokens.

Linear maps, norms, experts and mHC work token by token and take the row as it lies. Attention
takes the row apart into batches of whole samples, padded on the right to one of a few lengths,
and its result is put together again. Nothing has to be masked: attention is causal, so no token
sees the padding after it, and an entry compressed from padding is visible to padding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .errors import TrainingError

SHORTEST = 16  # the least padded length


class Packing:
    """How samples of ``lengths`` lie in one row of ``sum(lengths)`` tokens, in order.

    ``positions [N]`` is the place of each token in its own sample, ``samples [N]`` the number of
    that sample, ``starts`` where each sample begins; ``shapes`` are those of the padded batches,
    ``(samples, tokens)``, ``members`` the samples in each. Raises TrainingError for an empty sample
    or none.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | None = None) -> None:
        self.lengths = tuple(int(n) for n in lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise TrainingError(
                "a packed row is made of samples", expected="lengths of at least 1", got=lengths
            )
        self.tokens = sum(self.lengths)
        ends = list(accumulate(self.lengths))
        starts = self.starts = [0, *ends[:-1]]
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device)
        counts = torch.tensor(self.lengths)
        self.samples = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        padded = [padded_length(n) for n in self.lengths]
        self.longest = max(padded)
        self.shapes: list[tuple[int, int]] = []
        self.members: list[list[int]] = []
        places = []
        for width in sorted(set(padded)):
            members = [i for i, w in enumerate(padded) if w == width]
            begin = torch.tensor([starts[i] for i in members])[:, None]
            end = torch.tensor([ends[i] for i in members])[:, None]
            at = begin + torch.arange(width)
            places.append(at.masked_fill_(at >= end, -1).flatten())
            self.shapes.append((len(members), width))
            self.members.append(members)
        source = torch.cat(places).to(device)  # the token at each place of all batches; or -1
        self._padding = (source < 0).nonzero().squeeze(1)
        self._source = source.clamp_min(0)
        self._place = torch.empty_like(self.positions)  # the place of each token
        self._place[source[source >= 0]] = (source >= 0).nonzero().squeeze(1)

    def split(self, row: Tensor) -> list[Tensor]:
        """``[1, N, ...]`` -> for each batch of samples ``[B, T, ...]``; after a sample come copies
        of any token."""
        flat: Tensor = _Spread.apply(row.flatten(0, 1), self._source, self._place)  # type: ignore[no-untyped-call]
        if len(self.shapes) == 1:
            return [flat.unflatten(0, self.shapes[0])]
        sizes = [b * t for b, t in self.shapes]
        parts = zip(flat.split(sizes), self.shapes, strict=True)
        return [part.unflatten(0, shape) for part, shape in parts]

    def join(self, batches: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``; what stands in the padding is dropped."""
        rows = [batch.flatten(0, 1) for batch in batches]
        flat = rows[0] if len(rows) == 1 else torch.cat(rows)
        places = self._source, self._place, self._padding
        row: Tensor = _Collect.apply(flat, *places)  # type: ignore[no-untyped-call]
        return row.unsqueeze(0)

    def followed(self) -> Tensor:
        """Places ``[M]`` of the row's tokens that have a successor in their sample."""
        return (self.positions.roll(-1) > 0).nonzero().squeeze(1)


def padded_length(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that holds ``length``: few shapes, and beyond 16
    less than a third is padding."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    between = power * 3 // 4
    return between if SHORTEST < between >= length else power


class _Spread(torch.autograd.Function):
    """Tokens to their places in all batches. Each has one, so its gradient is moved, not summed."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return row.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Collect(torch.autograd.Function):
    """Tokens from their places in all batches; what is in the padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, source: Tensor, place: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(source, padding)
        return flat.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, padding = ctx.saved_tensors
        return grad.index_select(0, source).index_fill_(0, padding, 0), None, None, None
