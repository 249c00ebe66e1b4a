"""KVState: everything one timeline of tokens leaves behind in the attention layers.

It alone knows the parts: the window ring, raw compressor rows not yet pooled, CSA and HCA rows,
indexer keys. Everyone else speaks of positions: ``snapshot(p)`` and ``restore(p)``.

At a multiple of 128 tokens nothing is half-pooled but the last four raw rows of a CSA layer, so a
snapshot is the window and those rows; compressed rows are append-only and are only cut short.
Snapshots are kept dense near the tail and thinned further back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import V4Config
from ..model import no_block_before

GRAIN = 128  # tokens between snapshots: the least common multiple of the ratios


class _Rows:
    """An append-only table ``[B, n, D]`` that grows by half when full."""

    def __init__(self, first: Tensor | None = None) -> None:
        self.data: Tensor | None = None
        self.used = 0
        if first is not None:
            self.append(first)

    def append(self, new: Tensor) -> Tensor:
        total = self.used + new.shape[1]
        if self.data is None or total > self.data.shape[1]:
            room = max(64, total + total // 2)
            data = new.new_empty(new.shape[0], room, new.shape[2])
            if self.data is not None:
                data[:, : self.used] = self.data[:, : self.used]
            self.data = data
        self.data[:, self.used : total] = new
        self.used = total
        return self.data[:, :total]

    def present(self) -> Tensor:
        """What was appended, and is not cut off; a view."""
        assert self.data is not None
        return self.data[:, : self.used]

    def copy(self) -> _Rows:
        return _Rows(self.present())

    def bytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes


class LayerState:
    """One attention layer's part; implements ``model.AttentionState``."""

    def __init__(self, width: int) -> None:
        self._keep = width - 1
        self._window: Tensor | None = None
        self._raw: dict[str, _Rows] = {}
        self._rows: dict[str, _Rows] = {}

    def window(self, kv: Tensor) -> Tensor:
        both = kv if self._window is None else torch.cat((self._window, kv), 1)
        self._window = both[:, -self._keep :]
        if both.shape[1] > 4 * self._keep:
            self._window = self._window.clone()  # do not keep a long prefill alive
        return both

    def pending(self, which: str, raw: Tensor, ratio: int, overlap: bool) -> Tensor:
        kept = self._raw.get(which)
        if kept is None:
            kept = self._raw[which] = _Rows(no_block_before(raw, ratio) if overlap else None)
        present = kept.append(raw)
        whole = present.shape[1] // ratio * ratio
        done = whole - ratio if overlap else whole
        if done:
            self._raw[which] = _Rows(present[:, done:])
        return present[:, :whole]

    def rows(self, which: str, new: Tensor) -> Tensor:
        return self._rows.setdefault(which, _Rows()).append(new)

    def cut(self) -> dict[str, Tensor | None]:
        """Copies of the parts that later tokens overwrite."""
        parts: dict[str, Tensor | None] = {
            k: v.present().clone() for k, v in self._raw.items()
        }
        parts["window"] = None if self._window is None else self._window.clone()
        return parts

    def put_back(self, parts: dict[str, Tensor | None], position: int, ratio: int) -> None:
        self._window = parts["window"]
        self._raw = {k: _Rows(v) for k, v in parts.items() if k != "window" and v is not None}
        for rows in self._rows.values():
            rows.used = position // ratio

    def copy(self) -> LayerState:
        other = LayerState(self._keep + 1)
        other._window = self._window
        other._raw = {k: v.copy() for k, v in self._raw.items()}
        other._rows = {k: v.copy() for k, v in self._rows.items()}
        return other

    def bytes(self) -> int:
        tables = [*self._raw.values(), *self._rows.values()]
        window = 0 if self._window is None else self._window.nbytes
        return window + sum(table.bytes() for table in tables)


class KVState:
    """The attention memory of one timeline, ``length`` tokens long.

    Promise: after ``restore(p)`` the state equals the one that held when the timeline was ``p``
    tokens long, bit for bit.
    """

    def __init__(self, config: V4Config) -> None:
        self._ratios = config.compress_ratios[: config.num_hidden_layers]
        self._width = config.sliding_window
        self.length = 0
        self.layers = [LayerState(self._width) for _ in self._ratios]
        self._snapshots: dict[int, list[dict[str, Tensor | None]]] = {}

    def snapshot(self) -> None:
        """Remember the state at the present length, which must be a multiple of 128."""
        if self.length % GRAIN == 0 and self.length not in self._snapshots and self.length:
            self._snapshots[self.length] = [layer.cut() for layer in self.layers]
            self._thin()

    def restore(self, position: int) -> int:
        """Go back to the last snapshot at or before ``position``; returns its position."""
        at = max((p for p in self._snapshots if p <= position), default=0)
        self._snapshots = {p: s for p, s in self._snapshots.items() if p <= at}
        if at == 0:
            self.layers = [LayerState(self._width) for _ in self._ratios]
        else:
            for layer, parts, ratio in zip(
                self.layers, self._snapshots[at], self._ratios, strict=True
            ):
                layer.put_back(parts, at, ratio or 1)
        self.length = at
        return at

    def _thin(self) -> None:
        """Keep the newest 16 snapshots, then ever fewer: every 2nd, 4th, ... further back."""
        for p in list(self._snapshots):
            age = (self.length - p) // GRAIN
            stride = 1 << max(0, (age // 16).bit_length())
            if (p // GRAIN) % stride:
                del self._snapshots[p]

    def fork(self) -> KVState:
        """An independent copy; snapshots are shared (they are never changed)."""
        other = KVState.__new__(KVState)
        other._ratios, other._width, other.length = self._ratios, self._width, self.length
        other.layers = [layer.copy() for layer in self.layers]
        other._snapshots = dict(self._snapshots)
        return other

    def bytes(self) -> int:
        """Memory held, snapshots included."""
        kept = sum(
            t.nbytes
            for snap in self._snapshots.values()
            for parts in snap
            for t in parts.values()
            if t is not None
        )
        return kept + sum(layer.bytes() for layer in self.layers)
