"""Tables of rows that lie in pieces, as a cache holds them, and how one row is stored.

Attention entries and indexer keys after official rounding have few distinct values, so they are
packed without loss: an entry into FP8 channels, BF16 rotated channels and a scale for every 64 of
the first (584 bytes for 512 channels), a key into FP4 pairs and a scale for every 32 (68 bytes for
128 channels). Source: report section 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..quant import E4M3, E8M0, FP4_BLOCK, FP8_MAX, ceil_pow2, dequantize, quantize_fp4

ENTRY_BLOCK = 64  # FP8 channels of an entry that share a scale


@dataclass(frozen=True)
class RowFormat:
    """How a row of ``width`` numbers is stored.

    ``packed``: "entry" (the last ``kept`` channels stay BF16), "key", or None: as ``dtype``.
    """

    width: int
    dtype: torch.dtype
    packed: Literal["entry", "key"] | None = None
    kept: int = 0

    @property
    def bytes(self) -> int:
        """Of one row; entries are filled up to a multiple of 8."""
        if self.packed == "key":
            return self.width // 2 + self.width // FP4_BLOCK
        if self.packed is None:
            return self.width * self.dtype.itemsize
        plain = self.width - self.kept
        return -(-(plain + 2 * self.kept + plain // ENTRY_BLOCK) // 8) * 8

    def pack(self, rows: Tensor) -> Tensor:
        """``[n, width]``, rounded to what the format holds -> bytes ``[n, bytes]`` (uint8)."""
        if self.packed is None:
            return rows.to(self.dtype).contiguous().view(torch.uint8)
        if self.packed == "key":
            pairs, scale = quantize_fp4(rows)
            return torch.cat((pairs.view(torch.uint8), scale.view(torch.uint8)), -1)
        plain = rows[:, : self.width - self.kept].float().unflatten(-1, (-1, ENTRY_BLOCK))
        most = plain.abs().amax(-1, keepdim=True).clamp_min(1e-4)
        scale = ceil_pow2(most / FP8_MAX)
        codes = (plain / scale).to(E4M3).flatten(-2).view(torch.uint8)
        exponents = (scale.view(torch.int32) >> 23).to(torch.uint8).flatten(-2)
        tail = rows[:, self.width - self.kept :].to(torch.bfloat16).contiguous().view(torch.uint8)
        used = codes.shape[1] + tail.shape[1] + exponents.shape[1]
        fill = codes.new_zeros(len(rows), self.bytes - used)
        return torch.cat((codes, tail, exponents, fill), -1)

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of ``pack``."""
        if self.packed is None:
            return stored.contiguous().view(self.dtype)
        if self.packed == "key":
            pairs, scale = stored.split((self.width // 2, self.width // FP4_BLOCK), -1)
            return dequantize(
                pairs.contiguous().view(torch.int8), scale.contiguous().view(E8M0)
            ).to(self.dtype)
        plain = self.width - self.kept
        ends = plain, plain + 2 * self.kept, plain + 2 * self.kept + plain // ENTRY_BLOCK
        codes, tail, exponents, _ = stored.tensor_split(ends, -1)
        scale = (exponents.to(torch.int32) << 23).view(torch.float32).unsqueeze(-1)
        values = codes.contiguous().view(E4M3).float().unflatten(-1, (-1, ENTRY_BLOCK)) * scale
        return torch.cat(
            (values.flatten(-2).to(self.dtype), tail.contiguous().view(torch.bfloat16)), -1
        )


@dataclass(frozen=True)
class PagedRows:
    """A table ``[1, count, width]`` of which row i is number ``i % each`` of piece ``i // each``.

    ``blocks`` are byte tensors, in each of which a piece begins at ``offset``; ``addresses`` holds
    where they are (int64, as many or more).
    """

    blocks: Sequence[Tensor]
    addresses: Tensor
    offset: int
    each: int
    count: int
    format: RowFormat

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.count, self.format.width

    def dense(self) -> Tensor:
        """All rows in one tensor ``[1, count, width]``."""
        size, form = self.each * self.format.bytes, self.format
        used = self.blocks[: -(-self.count // self.each)]
        if not used:
            return torch.empty(self.shape, dtype=form.dtype)
        stored = torch.cat([b[self.offset : self.offset + size] for b in used])
        return form.unpack(stored.view(-1, form.bytes)[: self.count]).unsqueeze(0)


Rows = Tensor | PagedRows  # what attention and the indexer read


def dense(rows: Rows) -> Tensor:
    """``rows`` as one tensor."""
    return rows.dense() if isinstance(rows, PagedRows) else rows
