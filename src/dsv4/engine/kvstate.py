"""KVState: everything one timeline of tokens leaves behind in the attention layers.

It alone knows the parts: the window, raw compressor rows not yet pooled, CSA and HCA rows, indexer
keys. Everyone else speaks of positions.

    rows      append-only, in blocks of 128 tokens that hold those of all layers in the published
              storage formats; timelines share blocks, and who writes into one that another has
              gone on in copies that one block first
    the rest  the last 127 window entries and the raw rows of blocks being pooled: a ``Cut`` of a
              timeline at some position is these, and with the rows before it all there is

A pass may be cut at every position that it went over, so that cuts can be as dense as wanted
whatever the passes' lengths are; ``settle`` ends that and frees what it took.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..config import V4Config
from ..errors import DSV4Error
from ..kernels import PagedRows, RowFormat, Span
from ..kernels.looking import Place
from ..numerics import Numerics
from ..quant import wide

GRAIN = 128  # tokens of a block: the least common multiple of the ratios
CLAIMING = threading.Lock()  # while it is decided whose the places behind shared rows are


class _Table(NamedTuple):
    """Where a layer's rows of one kind lie in a block."""

    offset: int
    each: int  # rows in a block
    format: RowFormat


class Layout:
    """How the rows of 128 tokens lie in a block of ``bytes`` bytes, under given numerics.

    Official numerics pack rows as published; then ``bytes`` / 128 is the published formula.
    """

    def __init__(self, config: V4Config, nx: Numerics) -> None:
        kept = config.qk_rope_head_dim
        self.ratios = config.compress_ratios[: config.num_hidden_layers]
        self.window = config.sliding_window
        self.entry = RowFormat(config.head_dim, nx.dtype)
        key = RowFormat(config.index_head_dim, nx.dtype)
        if nx.official:
            self.entry = RowFormat(config.head_dim, nx.dtype, "entry", kept)
            key = RowFormat(config.index_head_dim, nx.dtype, "key")
        self.tables: dict[tuple[int, str], _Table] = {}
        self.bytes = 0
        for layer, ratio in enumerate(self.ratios):
            for which in ("kv", "index")[: 0 if not ratio else 2 if ratio == 4 else 1]:
                table = _Table(self.bytes, GRAIN // ratio, self.entry if which == "kv" else key)
                self.tables[layer, which] = table
                self.bytes += table.each * table.format.bytes

    def most_beside_rows(self) -> int:
        """Bytes of a timeline's window and raw rows at most."""

        def most(rows: int) -> int:
            return rows + 1 + spare(rows)

        entry = self.entry
        size = len(self.ratios) * most(self.window - 1) * entry.width * entry.dtype.itemsize
        for (layer, _), table in self.tables.items():
            ratio = self.ratios[layer]
            size += 2 * 4 * table.format.width * (most(ratio - 1) if ratio != 4 else 2 * most(7))
        return size


class Block:
    """The rows of 128 successive tokens; those that are written never change.

    ``claimed``: how many tokens' rows have been written, or will be by the timeline that asked.
    """

    __slots__ = ("claimed", "data")

    def __init__(self, size: int) -> None:
        self.data = torch.empty(size, dtype=torch.uint8)
        self.claimed = 0

    @classmethod
    def of(cls, data: Tensor, tokens: int) -> Block:
        """A block of rows that are there, of which so many tokens' count."""
        block = cls.__new__(cls)
        block.data, block.claimed = data, tokens
        return block

    def copy(self, tokens: int) -> Block:
        """Another block with the same rows, of which so many tokens' count."""
        return Block.of(self.data.clone(), tokens)

    def checksum(self) -> int:
        return kernels.checksum(self.data)


@dataclass(frozen=True, eq=False)
class Cut:
    """A timeline's state at ``position``, but for the rows of whole blocks before it.

    ``layers``: the window as it is stored and the raw rows, by name. ``partial``: the block with
    the rows after the last multiple of 128. Immutable.
    """

    position: int
    layers: Sequence[Mapping[str, Tensor]]
    partial: Block | None

    @property
    def bytes(self) -> int:
        """Memory it takes, a partial block included."""
        own = sum(t.nbytes for layer in self.layers for t in layer.values())
        return own + (0 if self.partial is None else self.partial.data.nbytes)


class Tail:
    """The newest rows ``[1, n, width]`` of one kind.

    What is there never changes; a timeline adds behind its end in place unless another one, that
    has the same rows, went on there first.
    """

    __slots__ = ("_address", "_bytes", "_most", "_room", "_taken", "begin", "end", "seen")

    def __init__(self, rows: Tensor) -> None:
        self._hold(rows, rows.shape[1])

    def _hold(self, room: Tensor, count: int) -> None:
        self._room, self._taken = room, [count]  # how many rows someone has: shared with forks
        self._most, self._bytes = room.shape[1], room.shape[2] * room.itemsize
        self._address = room.data_ptr()
        self.begin = self.seen = 0  # the first row that is kept; the first that the last pass saw
        self.end = count

    def fork(self) -> Tail:
        """The same rows for another timeline."""
        return copy.copy(self)

    def rows(self, begin: int, end: int) -> Tensor:
        return self._room[:, begin:end]

    def address(self, row: int) -> int:
        return self._address + row * self._bytes

    def grow(self, count: int) -> Span:
        """Where the next ``count`` rows are to be written; a pass begins."""
        with CLAIMING:
            if self._taken[0] != self.end or self.end + count > self._most:
                kept = self.rows(self.begin, self.end)
                n = kept.shape[1]
                self._hold(kept.new_empty(1, n + count + spare(n), kept.shape[2]), n)
                self._room[:, :n] = kept
            self.seen, begin, self.end = self.begin, self.end, self.end + count
            self._taken[0] = self.end
        return Span(self._room, begin, count)

    def window(self, count: int, keep: int) -> Span:
        """The window of the next ``count`` entries, with room for them; ``keep`` are kept then."""
        self.grow(count)
        self.begin = max(self.begin, self.end - keep)
        return Span(self._room, self.seen, self.end - self.seen)

    def windows(self, count: int, keep: int) -> list[tuple[int, int]]:
        """The same by numbers: for each of the entries the address of the window and its size."""
        size = self.window(count, keep).length
        return [(self.address(self.seen), size + i) for i in range(1 - count, 1)]

    def take_back(self, count: int) -> None:
        self.end -= count
        self._taken[0] = self.end  # nobody has these

    def settle(self, most: int) -> None:
        """What the last pass saw is not needed, nor room for more than ``most`` rows."""
        if self._most > most:
            self._hold(self.rows(self.begin, self.end).clone(), self.end - self.begin)
        self.seen = self.begin

    @property
    def bytes(self) -> int:
        return self._room.nbytes


def spare(rows: int) -> int:
    """More rows than so many for which there is room at most."""
    return 8 + rows // 4


def no_block_before(kv: Tensor, ratio: int) -> Tensor:
    """The raw rows of the block before the first one: values 0, logits -inf. ``kv [B, T, W]``."""
    zero = wide(kv.new_zeros(kv.shape[0], ratio, kv.shape[2]))
    return torch.cat((zero, torch.full_like(zero, -torch.inf)), -1)


class LayerState:
    """One attention layer's part; implements ``protocols.AttentionState``."""

    def __init__(self, owner: KVState, layer: int) -> None:
        self._owner: KVState = weakref.proxy(owner)  # no cycle: what is dropped is free at once
        self._layer = layer
        ratio = owner.layout.ratios[layer]
        self._before = ratio if ratio == 4 else 0  # raw rows kept of the block that was pooled last
        self._keep = owner.layout.window - 1
        self._tails: dict[str, Tail] = {}  # the window and raw rows

    def window(self, kv: Tensor) -> Span:
        tail = self._tails.get("window")
        if tail is None:
            tail = self._tails["window"] = Tail(kv[:, :0])
        return tail.window(kv.shape[1], self._keep)

    def raw(self, which: str, kv: Tensor, ratio: int, overlap: bool) -> Span:
        tail = self._tails.get(which)
        if tail is None:
            none = no_block_before(kv, ratio)
            tail = self._tails[which] = Tail(none if overlap else none[:, :0])
        return self._grow(tail, kv.shape[1], ratio)

    def _grow(self, tail: Tail, count: int, ratio: int) -> Span:
        """Room for so many raw rows."""
        span, whole = tail.grow(count), tail.end - (tail.end - tail.seen) % ratio
        tail.begin = max(tail.seen, whole - self._before)
        return span

    @property
    def begun(self) -> bool:
        return bool(self._tails)

    def places(self, count: int) -> list[Place]:
        window, raw, ratio = self._tails["window"], [], self._owner.layout.ratios[self._layer]
        for which in ("kv", "index"):
            tail = self._tails.get(which)
            if tail is not None:
                self._grow(tail, count, ratio)
                raw.append(tail)
        blocks = self._owner.addresses.data_ptr()
        return [
            Place(*where, blocks, *(tail.address(tail.end + i) for tail in raw))
            for i, where in zip(range(-count, 0), window.windows(count, self._keep), strict=True)
        ]

    def table(self, which: str) -> tuple[int, int, RowFormat]:
        return self._owner.layout.tables[self._layer, which]

    def blocks(self, which: str, ratio: int) -> Tensor | None:
        tail = self._tails[which]
        whole = (tail.end - tail.seen) // ratio * ratio
        return tail.rows(tail.seen, tail.seen + whole) if whole > self._before else None

    def rows(self, which: str, new: Tensor | None) -> PagedRows:
        owner, (offset, each, form) = self._owner, self._owner.layout.tables[self._layer, which]
        first = end = owner.length * each // GRAIN
        if new is not None:
            end += new.shape[1]
        table = PagedRows(owner.block_data(), owner.addresses, offset, each, end, form)
        if new is not None:
            kernels.store(new[0], table, first)
        return table

    def _kept(self, which: str, position: int) -> int:
        """Rows kept of a timeline so long: raw ones from the block that is being filled on, or
        the one before."""
        ratio = self._owner.layout.ratios[self._layer]
        return self._keep if which == "window" else position % ratio + self._before

    def cut(self, position: int) -> dict[str, Tensor]:
        """What later tokens overwrite, as it was at ``position`` in the last pass."""
        back, entry = self._owner.length - position, self._owner.layout.entry
        parts = {}
        for which, tail in self._tails.items():
            end = tail.end - back
            rows = tail.rows(max(tail.seen, end - self._kept(which, position)), end)
            if which == "window":
                stored = entry.pack(rows[0])
                parts[which] = stored if entry.packed else stored.clone()
            else:
                parts[which] = rows.clone()
        return parts

    def take_back(self, tokens: int) -> None:
        """As if the last pass had been so many tokens shorter; ``length`` is that of then."""
        for which, tail in self._tails.items():
            tail.take_back(tokens)
            tail.begin = max(tail.seen, tail.end - self._kept(which, self._owner.length))

    def put_back(self, parts: Mapping[str, Tensor]) -> None:
        form = self._owner.layout.entry
        self._tails = {
            which: Tail(form.unpack(t)[None] if which == "window" else t)
            for which, t in parts.items()
        }

    def settle(self) -> None:
        for tail in self._tails.values():
            tail.settle(2 * GRAIN)

    def adopt(self, other: LayerState) -> None:
        self._tails = {which: tail.fork() for which, tail in other._tails.items()}

    def counts(self) -> dict[str, int]:
        """Rows kept of each kind."""
        return {which: tail.end - tail.begin for which, tail in self._tails.items()}

    def bytes(self) -> int:
        return sum(tail.bytes for tail in self._tails.values())


class KVState:
    """The attention memory of one timeline, ``length`` tokens long.

        state.reserve(n)        before a pass over n more tokens, for which ``layers`` are the past
        state.advance(n)        after it
        state.take_back(n)      if the last n of them were only guessed at, and wrong
        state.cut(position)     at any position of that pass
        state.settle()          when no more cuts are wanted
        KVState.resume(layout, blocks, cut)

    Promise: a state resumed from a cut at p equals the one that held when the timeline was p tokens
    long, bit for bit.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.length = 0
        self.blocks: list[Block] = []
        self.addresses = torch.empty(8, dtype=torch.int64)
        self._data: list[Tensor] = []
        self.layers = [LayerState(self, i) for i in range(len(layout.ratios))]

    @classmethod
    def resume(cls, layout: Layout, blocks: Sequence[Block], cut: Cut | None) -> KVState:
        """The state at ``cut``; ``blocks`` holds at least the whole blocks before it. None: empty.

        Nothing is copied but the window.
        """
        state = cls(layout)
        if cut is None:
            return state
        state._append(blocks[: cut.position // GRAIN])
        if cut.partial is not None:
            state._append([cut.partial])
        for layer, parts in zip(state.layers, cut.layers, strict=True):
            layer.put_back(parts)
        state.length = cut.position
        return state

    def block_data(self) -> list[Tensor]:
        return self._data

    def _append(self, blocks: Sequence[Block]) -> None:
        data = [block.data for block in blocks]
        first, end = len(self.blocks), len(self.blocks) + len(blocks)
        if end > len(self.addresses):
            # not in place: a pass may be reading the old one
            more = self.addresses.new_empty(max(end, 2 * first) - first)
            self.addresses = torch.cat((self.addresses[:first], more))
        self.addresses[first:end] = torch.tensor([t.data_ptr() for t in data], dtype=torch.int64)
        self.blocks += blocks
        self._data += data

    def reserve(self, tokens: int) -> None:
        """Make room for the rows of so many more tokens, in blocks that this timeline may write."""
        with CLAIMING:
            inside = self.length % GRAIN
            if inside:
                last = self.blocks[-1]
                if last.claimed != inside:  # another timeline has gone on in it
                    last = self.blocks[-1] = last.copy(inside)
                    self._data[-1] = last.data
                    self.addresses = self.addresses.clone()
                    self.addresses[len(self.blocks) - 1] = last.data.data_ptr()
            end = self.length + tokens
            wanted = -(-end // GRAIN) - len(self.blocks)
            if wanted > 0:
                self._append([Block(self.layout.bytes) for _ in range(wanted)])
            for i in range(self.length // GRAIN, len(self.blocks)):
                self.blocks[i].claimed = min(GRAIN, end - i * GRAIN)

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def take_back(self, tokens: int) -> None:
        """Undo the last so many tokens of the pass that was just advanced over, before anything
        is cut from it. Nothing is copied: rows behind the end are written again by later passes."""
        if not tokens:
            return
        self.length -= tokens
        count = -(-self.length // GRAIN)
        del self.blocks[count:], self._data[count:]
        if self.length % GRAIN:
            self.blocks[-1].claimed = self.length % GRAIN
        for layer in self.layers:
            layer.take_back(tokens)

    def cut(self, position: int) -> Cut:
        """The state as it was at ``position``, which the last pass went over or which is now."""
        partial = self.blocks[position // GRAIN] if position % GRAIN else None
        return Cut(position, [layer.cut(position) for layer in self.layers], partial)

    def settle(self) -> None:
        """Free what only cuts of the last pass need."""
        for layer in self.layers:
            layer.settle()

    def fork(self) -> KVState:
        """Another timeline at the same point; no row is copied. Only after ``settle``."""
        other = KVState(self.layout)
        other.length, other.blocks, other._data = self.length, list(self.blocks), list(self._data)
        other.addresses = self.addresses.clone()
        for mine, theirs in zip(other.layers, self.layers, strict=True):
            mine.adopt(theirs)
        return other

    def bytes(self) -> int:
        """Memory held: whole blocks (also those that are shared) and the rest."""
        return len(self.blocks) * self.layout.bytes + sum(layer.bytes() for layer in self.layers)

    def check(self) -> None:
        """DSV4Error when the parts contradict each other: blocks for every token, addresses that
        are theirs, windows and raw rows of the right lengths."""
        have = len(self.blocks), [b.data.data_ptr() for b in self.blocks]
        count = -(-self.length // GRAIN)
        wanted = count, self.addresses[:count].tolist()
        if have != wanted:
            raise DSV4Error("attention state: blocks", expected=wanted, got=have)
        for layer, ratio in zip(self.layers, self.layout.ratios, strict=True):
            rows = layer.counts()
            if rows.pop("window", 0) != min(self.length, self.layout.window - 1):
                raise DSV4Error("attention state: window", expected=self.length, got=layer.counts())
            for count in rows.values():
                if count != self.length % ratio + layer._before:
                    raise DSV4Error("attention state: raw rows", expected=ratio, got=count)
