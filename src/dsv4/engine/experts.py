"""Weights larger than memory: routed experts on disk, some of them in memory.

``Experts`` gives every MoE layer of a network a source of experts in place of its parameters.
``residency`` decides which are in memory; here they are read, and computed as they come:

    a pass begins      the hash layers' experts follow from the token ids alone: they are planned,
                       and their reads stand in line, before the first layer is computed
    a router chose     its layer's experts are planned, and the shared expert is computed meanwhile
    routed             what is in memory is computed while the rest is read, then each as it comes

An expert lies in a slot of one arena, as its bytes lie in the file: two reads for a file in the
published layout, past the page cache (O_DIRECT), so that memory holds what the budget says and no
second copy. Nothing but the arena is allocated for weights.

With the native kernels the result is that of the whole model in memory, bit for bit: an expert's
product does not depend on which others are computed with it, and a row's experts are added up in
the order of their numbers, whenever they came.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, ConfigError
from ..formats import TORCH_DTYPES
from ..kernels import Stored
from ..model import Gate, MoE, Transformer
from .residency import Counts, Residency

PAGE = mmap.PAGESIZE
MATRICES = ("w1", "w2", "w3")
READERS = 2  # one read of megabytes keeps a disk busy; the other follows without a pause
Expert = dict[str, Stored]  # by MATRICES


def is_routed(name: str) -> bool:
    """Whether a tensor belongs to a routed expert."""
    return ".ffn.experts." in name


class ExpertStats(NamedTuple):
    """Since the start: ``counts`` of experts, bytes read from disk, seconds in which a read was
    under way, seconds in which nothing could be computed before one ended; and the bytes of all
    slots."""

    counts: Counts
    bytes_read: int
    seconds_reading: float
    seconds_waiting: float
    memory_bytes: int


class _Load:
    """An expert on its way into a slot, or there."""

    def __init__(self, layer: int, expert: int, slot: int, before: _Load | None) -> None:
        self.layer, self.expert, self.slot = layer, expert, slot
        self.before = before  # what the slot held, while it may still be in use
        self.uses = 0  # planned and not done yet
        self.done = False  # read, or failed
        self.matrices: Expert = {}
        self.error: BaseException | None = None


class _Layer:
    """The source of one layer's experts; see ``model.ExpertSource``."""

    def __init__(self, experts: Experts, layer: int) -> None:
        self._experts, self._layer = experts, layer

    def expect(self, ids: Tensor) -> None:
        self._experts._expect(self._layer, ids)

    def routed(
        self, x: Tensor, ids: Tensor, weights: Tensor, limit: float, round_activations: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """As ``kernels.routed_experts``; raises CheckpointError for what cannot be read."""
        return self._experts._routed(
            self._layer, x, ids, weights, (limit, round_activations, dtype)
        )


class Experts:
    """The ``total`` routed experts of ``net``: some in ``budget_bytes`` of memory, ``slot_bytes``
    each, and all in ``checkpoint``.

    Raises ConfigError when the budget does not hold the experts of a token. One pass at a time
    uses it, others wait. ``trace`` may be set to a list, to which every pass adds a list of
    ``(layer, distinct experts)``: what ``residency.replay`` takes.
    """

    def __init__(self, checkpoint: Checkpoint, net: Transformer, budget_bytes: int) -> None:
        c = net.config
        self._checkpoint = checkpoint
        self.slot_bytes = slot_bytes(checkpoint)
        self.total = sum(is_routed(n) and n.endswith(".w1.weight") for n in checkpoint.specs)
        slots = min(budget_bytes // self.slot_bytes, self.total)
        if slots < c.num_experts_per_tok:
            raise ConfigError(
                "the experts' memory is too small",
                expected=f"at least {c.num_experts_per_tok * self.slot_bytes:,} bytes, for the"
                f" {c.num_experts_per_tok} experts of a token",
                got=f"{budget_bytes:,}",
            )
        self._names: list[str] = []
        self._gates: list[Gate] = []
        for name, module in net.named_modules():
            if isinstance(module, MoE):
                module.source = _Layer(self, len(self._names))
                self._gates.append(module.gate)
                self._names.append(name)
        net.reading = self._pass
        self._residency = Residency(
            slots, len(self._names), c.n_routed_experts, c.num_experts_per_tok
        )
        self._reader = _Reader(checkpoint)
        self._arena = _memory(slots * self.slot_bytes)
        self._loads: list[_Load | None] = [None] * slots
        self._expected: dict[int, list[_Load]] = {}  # of each layer that is planned
        self._passing = threading.RLock()  # held by the pass that uses all this
        self._inside = False  # of such a pass; the MTP block has none
        self._changed = threading.Condition()  # held to change loads
        self._pool = ThreadPoolExecutor(READERS, "dsv4-experts")
        self._used = self._read = self._bytes = self._reading = 0
        self._waited = self._read_for = self._begun = 0.0
        self.trace: list[list[tuple[int, list[int]]]] | None = None

    @property
    def slots(self) -> int:
        """Experts that memory holds at once."""
        return self._residency.slots

    @property
    def bypasses_the_page_cache(self) -> bool:
        """Whether all files can be read so that the system keeps no copy of its own."""
        return self._reader.direct

    def stats(self) -> ExpertStats:
        counts = Counts(self._used, self._read)
        return ExpertStats(
            counts, self._bytes, self._read_for, self._waited, len(self._arena)
        )

    # ------------------------------------------------------------ what the network calls

    @contextmanager
    def _pass(self, ids: Tensor) -> Iterator[None]:
        """A pass over ``ids``; what it planned and did not use is let go at its end."""
        with self._passing:
            self._let_go()
            self._inside = True
            self._residency.next_pass()
            if self.trace is not None:
                self.trace.append([])
            try:
                for layer, gate in enumerate(self._gates):
                    if gate.tid2eid is not None:
                        self._expect(layer, gate.tid2eid[ids.flatten()])
                yield
            finally:
                self._inside = False
                self._let_go()

    def _let_go(self) -> None:
        """Forget what is planned and not used."""
        for loads in self._expected.values():
            self._release(loads)
        self._expected.clear()

    def _expect(self, layer: int, ids: Tensor) -> None:
        with self._passing:
            experts = ids.unique().tolist()
            planned = self._expected.get(layer)
            if planned is not None and sorted(load.expert for load in planned) == experts:
                return
            if not self._inside:  # the MTP block's: of one that failed, or of another thread
                self._let_go()
            self._expected[layer] = self._plan(layer, experts)

    def _plan(self, layer: int, experts: Sequence[int]) -> list[_Load]:
        """The loads of the experts, each with one more use; reads that they need stand in line."""
        if self.trace:
            self.trace[-1].append((layer, list(experts)))
        loads = []
        with self._changed:
            for expert, slot, read in self._residency.plan(layer, experts):
                load = self._loads[slot]
                if read or load is None:
                    load = self._loads[slot] = _Load(layer, expert, slot, load)
                    self._pool.submit(self._bring, load)
                load.uses += 1
                loads.append(load)
                self._used += 1
                self._read += read
        return loads

    def _routed(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor,
        how: tuple[float, bool, torch.dtype],
    ) -> Tensor:  # fmt: skip
        with self._passing:
            self._expect(layer, ids)
            loads = self._expected.pop(layer)
            try:
                ready = self._ready(loads)
                if len(ready) == len(loads):
                    return _all_at_once(x, ids, weights, ready, how)
                parts = _Parts(x, ids, weights, how)
                while True:
                    parts.add(ready)
                    self._release(ready)
                    loads = [load for load in loads if load not in ready]
                    if not loads:
                        return parts.sum()
                    ready = self._ready(loads, wait=True)
            finally:
                self._release(loads)

    def _ready(self, loads: Sequence[_Load], wait: bool = False) -> list[_Load]:
        """Those that are in memory, in the order of experts; ``wait``: until there are any."""
        with self._changed:
            if wait and not any(load.done for load in loads):
                begin = time.perf_counter()
                self._changed.wait_for(lambda: any(load.done for load in loads))
                self._waited += time.perf_counter() - begin
            ready = [load for load in loads if load.done]
        for load in ready:
            if load.error is not None:
                raise load.error
        return sorted(ready, key=lambda load: load.expert)

    def _release(self, loads: Sequence[_Load]) -> None:
        with self._changed:
            for load in loads:
                load.uses -= 1
            self._changed.notify_all()

    # ------------------------------------------------------------ what the reading threads do

    def _bring(self, load: _Load) -> None:
        """Read an expert into its slot, as soon as what was there before is used."""
        with self._changed:
            before, load.before = load.before, None
            if before is not None:
                self._changed.wait_for(lambda: before.done and before.uses == 0)
                before.matrices = {}
            if load.uses == 0:  # the pass that wanted it ended
                self._failed(load, None)
                return
            if self._reading == 0:
                self._begun = time.perf_counter()
            self._reading += 1
        try:
            name = f"{self._names[load.layer]}.experts.{load.expert}"
            matrices, size = self._reader.read(name, self._arena, load.slot * self.slot_bytes)
        except Exception as error:
            with self._changed:
                self._ended()
                self._failed(load, error)
            return
        with self._changed:
            self._ended()
            load.matrices, load.done = matrices, True
            self._bytes += size
            self._changed.notify_all()

    def _ended(self) -> None:
        self._reading -= 1
        if self._reading == 0:
            self._read_for += time.perf_counter() - self._begun

    def _failed(self, load: _Load, error: Exception | None) -> None:
        load.error, load.done = error, True
        if self._loads[load.slot] is load:
            self._residency.forget(load.slot)
            self._loads[load.slot] = None
        self._changed.notify_all()


# ---------------------------------------------------------------- memory, files


def _memory(size: int) -> mmap.mmap:
    """Memory that begins with a page; it is taken page by page, when it is written to."""
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            "the experts' memory cannot be had", expected=f"{size:,} bytes", got=error,
            hint="a smaller --expert-memory",
        ) from error


def _tensors(checkpoint: Checkpoint, expert: str) -> list[str]:
    """Names of all that an expert is stored as."""
    names = (f"{expert}.{matrix}.{part}" for matrix in MATRICES for part in ("weight", "scale"))
    return [name for name in names if name in checkpoint.specs]


def expert_bytes(checkpoint: Checkpoint) -> int:
    """Stored bytes of all routed experts."""
    return sum(spec.bytes for name, spec in checkpoint.specs.items() if is_routed(name))


def expert_budget(checkpoint: Checkpoint, memory: int) -> int | None:
    """Memory for routed experts when there is so much for all weights; None if it holds all."""
    experts = expert_bytes(checkpoint)
    others = checkpoint.bytes - experts
    if checkpoint.bytes <= memory:
        return None
    least = checkpoint.config.num_experts_per_tok * slot_bytes(checkpoint)
    return max(least, memory - others)


def slot_bytes(checkpoint: Checkpoint) -> int:
    """Memory for one expert: its bytes, and what is read before and after them in whole pages."""
    first = next(name for name in checkpoint.specs if is_routed(name))
    names = _tensors(checkpoint, first.rsplit(".", 2)[0])
    return _up(sum(checkpoint.specs[name].bytes + 2 * PAGE for name in names))


def _up(size: int) -> int:
    return -(-size // PAGE) * PAGE


class _Reader:
    """Reads experts from the files of a checkpoint, past the page cache where that is possible."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, BinaryIO] = {}
        self._cached: set[Path] = set()  # files of which the system keeps what is read
        self._checked: set[str] = set()
        for name in filter(is_routed, checkpoint.specs):
            path, _ = checkpoint.place(name)
            if path not in self._files:
                self._files[path] = self._open(name, path)
                weakref.finalize(self, self._files[path].close)

    def _open(self, name: str, path: Path) -> BinaryIO:
        direct = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere the cache keeps what it likes
        try:
            return self._checkpoint.reopen(name, direct | os.O_CLOEXEC)
        except OSError:  # a file system without it
            self._cached.add(path)
            return self._checkpoint.reopen(name, os.O_CLOEXEC)

    @property
    def direct(self) -> bool:
        return hasattr(os, "O_DIRECT") and not self._cached

    def read(self, expert: str, arena: mmap.mmap, at: int) -> tuple[Expert, int]:
        """The expert's matrices, in the arena from ``at`` on, and the bytes that were read."""
        first, size = at, 0
        tensors: dict[str, Tensor] = {}
        for path, begin, end, names in self._extents(expert):
            low = begin - begin % PAGE
            self._fill(path, low, end, memoryview(arena)[at : at + _up(end - low)])
            for name, offset in names:
                tensors[name] = self._tensor(name, arena, at + offset - low)
            at += _up(end - low)
        size = at - first
        if expert not in self._checked:
            for name, tensor in tensors.items():
                self._checkpoint.check(name, tensor)
            self._checked.add(expert)
        return {
            m: Stored(tensors[f"{expert}.{m}.weight"], tensors.get(f"{expert}.{m}.scale"))
            for m in MATRICES
        }, size

    def _extents(self, expert: str) -> list[tuple[Path, int, int, list[tuple[str, int]]]]:
        """Pieces of files that an expert is made of: path, begin, end, and what begins where."""
        places = sorted((*self._checkpoint.place(n), n) for n in _tensors(self._checkpoint, expert))
        out: list[tuple[Path, int, int, list[tuple[str, int]]]] = []
        for path, begin, name in places:
            end = begin + self._checkpoint.specs[name].bytes
            if out and out[-1][0] == path and out[-1][2] == begin:
                names = [*out[-1][3], (name, begin)]
                out[-1] = (path, out[-1][1], end, names)
            else:
                out.append((path, begin, end, [(name, begin)]))
        return out

    def _fill(self, path: Path, low: int, end: int, into: memoryview) -> None:
        """Read from ``low``, a multiple of the page, to ``end`` at least."""
        file, done = self._files[path].fileno(), 0
        while done < end - low:
            try:
                count = os.preadv(file, [into[done:]], low + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}", got=error) from error
            if done + count < end - low and count < PAGE:
                raise CheckpointError(
                    f"{path} ended while it was in use", expected=f"{end:,} bytes",
                    got=f"{low + done + count:,}", hint="restore the file, then start again",
                )  # fmt: skip
            done += count if done + count >= end - low else count - count % PAGE
        if path in self._cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, low, len(into), os.POSIX_FADV_DONTNEED)

    def _tensor(self, name: str, arena: mmap.mmap, at: int) -> Tensor:
        spec = self._checkpoint.specs[name]
        dtype = TORCH_DTYPES[spec.dtype]
        if at % dtype.itemsize:  # legal in the format, but not for every CPU
            data = bytearray(arena[at : at + spec.bytes])
            return torch.frombuffer(data, dtype=dtype).view(spec.shape)
        flat = torch.frombuffer(arena, dtype=dtype, count=spec.elements, offset=at)
        return flat.view(spec.shape)


# ---------------------------------------------------------------- products


def _lists(loads: Sequence[_Load]) -> tuple[list[Stored], list[Stored], list[Stored]]:
    """w1, w2, w3 of the loads."""
    w1, w2, w3 = ([load.matrices[m] for load in loads] for m in MATRICES)
    return w1, w2, w3


def _all_at_once(
    x: Tensor, ids: Tensor, weights: Tensor, loads: Sequence[_Load],
    how: tuple[float, bool, torch.dtype],
) -> Tensor:  # fmt: skip
    """All experts of all rows, numbered anew without those that nobody chose."""
    numbers = torch.tensor([load.expert for load in loads])
    return kernels.routed_experts(
        x, torch.searchsorted(numbers, ids), weights, *_lists(loads), *how
    )


class _Parts:
    """The products of rows ``x [N, d]`` with their experts, a few experts at a time."""

    def __init__(
        self, x: Tensor, ids: Tensor, weights: Tensor, how: tuple[float, bool, torch.dtype]
    ) -> None:
        (rows, self._k), width = ids.shape, x.shape[1]
        self._x, self._weights, self._how = x, weights.flatten(), how
        chosen, self._pairs = ids.flatten().sort(stable=True)  # of a row and an expert
        self._ends = torch.bincount(chosen).cumsum(0).tolist()
        rank = ids.argsort(1).argsort(1)  # among its row's experts
        self._place = (torch.arange(rows)[:, None] * self._k + rank).flatten()
        self._parts = torch.empty(rows * self._k, width, dtype=how[2])

    def add(self, loads: Sequence[_Load]) -> None:
        """The products with these experts."""
        if not loads:
            return
        spans = [(self._ends[e - 1] if e else 0, self._ends[e]) for e in (x.expert for x in loads)]
        pairs = torch.cat([self._pairs[begin:end] for begin, end in spans])
        counts = torch.tensor([end - begin for begin, end in spans])
        numbers = torch.arange(len(loads)).repeat_interleave(counts)
        self._parts[self._place[pairs]] = kernels.routed_experts(
            self._x[pairs // self._k], numbers[:, None], self._weights[pairs][:, None],
            *_lists(loads), *self._how,
        ).to(self._parts.dtype)  # fmt: skip

    def sum(self) -> Tensor:
        """``[N, d]``, float32: of each row the sum in the order of its experts' numbers."""
        first, *others = self._parts.view(-1, self._k, self._parts.shape[1]).unbind(1)
        total = first.float()
        for part in others:
            total = total + part
        return total
