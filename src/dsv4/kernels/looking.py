"""What looks across tokens, for few of them, in one call.

``model.Attention.look`` is the definition, and what runs where there are no native kernels: raw
rows are kept and pooled, an indexer chooses, attention looks. Here it is told by numbers where a
timeline's memory lies, so that a pass can be done again for another place in it (``Tapes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .rows import RowFormat
from .threads import threads

if TYPE_CHECKING:
    pass

PER_LAYER = 5  # numbers of a layer's place
PACKED = {None: 0, "entry": 1, "key": 2}


class Place(NamedTuple):
    """Where a token finds and leaves things of one layer.

    ``window``: the address of the first entry that it sees, ``entries`` how many with its own;
    ``blocks``: the address of the addresses of its blocks; ``kv`` and ``keys``: addresses of the
    raw rows that are written, attention's and the indexer's (0: none).
    """

    window: int
    entries: int
    blocks: int = 0
    kv: int = 0
    keys: int = 0


class Pooled(NamedTuple):
    """How a compressor's raw rows become rows of a table.

    Of each token: ``kv [1, N, W]``, ``gate [1, N, W]`` and the rotation of the block that it is in,
    ``turn [N, rope / 2, 2]``. ``bias [ratio, W]``; ``dim``: a row's width, W or half of it where
    blocks overlap; ``norm`` and ``eps`` of the entry's norm. In a block of the timeline the table
    begins at ``offset`` and has ``each`` rows.
    """

    kv: Tensor
    gate: Tensor
    bias: Tensor
    dim: int
    overlap: bool
    norm: Tensor
    eps: float
    turn: Tensor
    offset: int
    each: int
    format: RowFormat


def takes(
    dtype: torch.dtype, head: int, rope: int, index: int, others: Sequence[Tensor]
) -> bool:
    """Whether ``look_each`` works on a model of these widths in ``dtype``; ``others``: parameters
    that it reads."""
    from . import NATIVE

    plain = all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in others)
    widths = head % 32 == rope % 32 == 0 and (head - rope) % 64 == 0 and index in (0, 128)
    return NATIVE is not None and plain and widths and dtype in (torch.bfloat16, torch.float32)


def look_each(
    q: Tensor, kv: Tensor, places: Tensor, layer: int, pooled: Sequence[Pooled],
    query: tuple[Tensor, Tensor, int] | None, sink: Tensor, *, ratio: int, width: int,
    scale: float,
) -> Tensor:
    """Attention's outputs ``[1, N, H, D]`` of N tokens of any timelines, of each in its order.

    ``q [1, N, H, D]``, entries ``kv [1, N, D]``; ``places [N, 1 + 5 * layers]`` (int64): of each
    token the position and the ``Place`` in every layer. ``pooled``: of attention, of the
    indexer. ``query``: the indexer's queries and weights, and how many rows are chosen of more.
    """
    from . import _native

    heads, dim = q.shape[2:]
    out = torch.empty_like(q)
    choice, chosen = (0, 0, 0, 0, 0, 0), None
    if query is not None:
        index_q, weights, k = query
        chosen = torch.empty(len(places), k, dtype=torch.int64)
        choice = (index_q.data_ptr(), *index_q.shape[2:], weights.data_ptr(), k, chosen.data_ptr())
    how = [
        (p.kv.data_ptr(), p.gate.data_ptr(), p.bias.data_ptr(), p.dim, p.overlap, p.norm.data_ptr(),
         p.norm.dtype == torch.bfloat16, p.eps, p.turn.data_ptr(), 2 * p.turn.shape[-2],
         PACKED[p.format.packed], p.format.kept, p.format.bytes, p.offset, p.each)
        for p in pooled
    ]  # fmt: skip
    _native.look_each(
        q.data_ptr(), q.dtype == torch.bfloat16, len(places), heads, dim, kv.data_ptr(),
        places.data_ptr(), places.shape[1], 1 + PER_LAYER * layer, how, choice, width,
        sink.data_ptr(), ratio, scale, out.data_ptr(), threads(),
    )  # fmt: skip
    return out
