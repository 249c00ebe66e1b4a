"""The prefix cache: what earlier requests left behind, found by its tokens.

A tree of blocks of 128 tokens. A node holds its block's rows, shared with every timeline that goes
through it, and where there is one the ``Cut`` with which a timeline can go on from its end. Cuts at
other positions hang beside the tree's next level. A dictionary finds a node by its tokens
themselves: a hash leads to it, and equality decides.

Rows are small beside cuts, so cuts are thinned first. Each has a value that grows with what it
saves and shrinks with what it takes,

    value = age at last use + likely * (tokens to compute again without it) / (bytes it frees)

and the least valuable goes when memory is short; "age" is the value of the last one that went
(Cherkasova, "Greedy-Dual-Size-Frequency", 1998). A cut whose neighbours went saves more, so cuts
grow sparse evenly, and the sparser the longer they were not used: dense near the tails of recent
timelines, thinned further back. Ends of messages are likely to be gone on from. Rows go with the
last cut behind them.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import DSV4Error

GRAIN = 128  # tokens of a block
LIKELY_END = 16.0  # times as likely to be gone on from as another place
GHOSTS = 1 << 16  # dropped blocks that are remembered, so that a miss can say so
_TOKEN = array("i").itemsize


class Rows(Protocol):
    """The rows of 128 tokens; ``kvstate.Block``."""

    def checksum(self) -> int: ...


class Resumable(Protocol):
    """What else it takes to go on at ``position``; ``kvstate.Cut``."""

    @property
    def position(self) -> int: ...

    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Reuse:
    """What became of a prompt's tokens, by number.

    ``hit``      were computed before and are not computed again
    ``between``  were computed before and their rows are here, but no cut: the last one is earlier
    ``dropped``  were computed before and dropped for want of memory
    ``new``      are not known to follow what is before them (the last token always counts here)

    ``disk``: of the hit, how many were read from disk.
    """

    hit: int = 0
    between: int = 0
    dropped: int = 0
    new: int = 0
    disk: int = 0

    def more(self, hit: int) -> Reuse:
        """The same prompt after so many more of its tokens were found computed."""
        counts, left = [self.new, self.dropped, self.between], hit
        for i, count in enumerate(counts):
            counts[i] -= min(count, left)
            left -= count - counts[i]
        return Reuse(self.hit + hit, counts[2], counts[1], counts[0], self.disk)


class _Node:
    """Up to 128 tokens after ``parent``; only a whole block has something after it."""

    __slots__ = (
        "age", "block", "checksum", "children", "cut", "end", "key", "likely", "parent", "pins",
        "tails", "tokens",
    )  # fmt: skip

    def __init__(self, parent: _Node | None, tokens: bytes, block: Rows | None) -> None:
        self.parent, self.tokens, self.block = parent, tokens, block
        self.end: int = (0 if parent is None else parent.end) + len(tokens) // _TOKEN
        self.key: int = 0 if parent is None else hash((parent.key, tokens))
        self.children: dict[bytes, _Node] = {}
        self.tails: dict[bytes, _Node] = {}
        self.cut: Resumable | None = None
        self.age, self.likely, self.pins = 0.0, 1.0, 0
        self.checksum: int | None = None

    @property
    def needed(self) -> bool:
        return bool(self.cut or self.pins or self.children or self.tails) or self.parent is None


class Lease:
    """A running timeline's place in the tree: the last whole block of it that is there."""

    def __init__(self, node: _Node) -> None:
        self._node = node
        node.pins += 1

    def _move(self, node: _Node) -> None:
        node.pins += 1
        self._node.pins -= 1
        self._node = node

    @property
    def position(self) -> int:
        return self._node.end


class PrefixCache:
    """Blocks and cuts of past timelines in at most ``budget`` bytes; used by one thread.

    ``block_bytes``: of a whole block's rows. Blocks that running timelines share are counted too.
    """

    def __init__(self, budget: int, block_bytes: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.cuts = 0
        self._block_bytes = block_bytes
        self._root = _Node(None, b"", None)
        self._age = 0.0
        self._heap: list[tuple[float, int, _Node]] = []  # one entry for each cut, maybe out of date
        self._numbers = itertools.count()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._audit: Iterator[_Node] = iter(())

    # ------------------------------------------------------------------ finding

    def find(self, prompt: Sequence[int]) -> tuple[Lease, list[Rows], Resumable | None, Reuse]:
        """The furthest place in ``prompt`` from which to go on, with its blocks and cut.

        At least the last token is left to compute, because its logits are wanted. The lease is to
        be given back.
        """
        wanted, limit = array("i", prompt).tobytes(), len(prompt) - 1
        node: _Node | None = self._root
        path, best, last = list[_Node](), self._root, self._root
        while node is not None:
            last = node
            if node.parent is not None:
                path.append(node)
            for other in (node, *node.tails.values()):
                fits = other is node or wanted.startswith(other.tokens, node.end * _TOKEN)
                if other.cut is not None and fits and best.end < other.end <= limit:
                    best = other
            rest = wanted[node.end * _TOKEN : (node.end + GRAIN) * _TOKEN]
            node = node.children.get(rest)
        known, dropped = self._known(last, wanted, len(prompt))
        whole = best if best.block is not None or best.parent is None else best.parent
        assert whole is not None
        if best.cut is not None:
            self._touch(best)
        blocks = [n.block for n in path[: best.end // GRAIN] if n.block is not None]
        between = max(0, min(known, limit) - best.end)
        reuse = Reuse(best.end, between, dropped, len(prompt) - best.end - between - dropped)
        return Lease(whole), blocks, best.cut, reuse

    def _known(self, node: _Node, wanted: bytes, length: int) -> tuple[int, int]:
        """How many of the first tokens of ``wanted``, which agrees up to ``node``, are in the tree,
        and how many after them are known to have been dropped."""
        rest = wanted[node.end * _TOKEN :]
        common = max(
            (_common(rest, other) for other in (*node.children, *node.tails)), default=0
        )
        at, key = node.end, node.key
        while at + GRAIN <= length:
            key = hash((key, wanted[at * _TOKEN : (at + GRAIN) * _TOKEN]))
            if key not in self._ghosts:
                break
            at += GRAIN
        known = node.end + common
        return known, max(0, min(at, length - 1) - known)

    def _touch(self, node: _Node) -> None:
        node.age = self._age

    # ------------------------------------------------------------------ keeping

    def keep(
        self, lease: Lease, tokens: Sequence[int], blocks: Sequence[Rows],
        cuts: Sequence[Resumable], ends: Collection[int] = (),
    ) -> None:
        """Keep the blocks and cuts of a timeline that went on from ``lease``, which moves on.

        ``tokens`` and ``blocks`` are the whole timeline's, ``cuts`` are in the order of positions
        and behind the lease. ``ends``: positions where messages end. What is there already stays.
        """  # fmt: skip
        for cut in cuts:
            node = lease._node
            while node.end + GRAIN <= cut.position:
                part = array("i", tokens[node.end : node.end + GRAIN]).tobytes()
                after = node.children.get(part)
                if after is None:
                    after = _Node(node, part, blocks[node.end // GRAIN])
                    node.children[part] = after
                    self.bytes += self._block_bytes
                node = after
                lease._move(node)
            if node.end < cut.position:
                part = array("i", tokens[node.end : cut.position]).tobytes()
                node = node.tails.setdefault(part, _Node(node, part, None))
            if node.end != cut.position:
                raise DSV4Error(
                    "a cut before its lease", expected=f"from {node.end}", got=cut.position
                )
            node.likely = max(node.likely, LIKELY_END if cut.position in ends else 1.0)
            self._touch(node)
            if node.cut is None:
                node.cut = cut
                self.bytes += cut.bytes
                self.cuts += 1
                self._push(node)
        self.shrink()

    def release(self, lease: Lease) -> None:
        """Give a lease back; once."""
        lease._node.pins -= 1
        self._prune(lease._node)
        self.shrink()

    # ------------------------------------------------------------------ dropping

    def shrink(self, budget: int | None = None) -> None:
        """Drop the least valuable until all fits in ``budget`` (from now on), but for rows of
        blocks that are leased."""
        self.budget = self.budget if budget is None else budget
        while self.bytes > self.budget and self._heap:
            value, _, node = heapq.heappop(self._heap)
            if node.cut is None:
                continue
            if self._value(node) > value:
                self._push(node)
            else:
                self._age = value
                self._drop(node)

    def clear(self) -> None:
        """Drop all that no running timeline leases."""
        budget = self.budget
        self.shrink(0)
        self.budget = budget

    def _push(self, node: _Node) -> None:
        heapq.heappush(self._heap, (self._value(node), next(self._numbers), node))

    def _value(self, node: _Node) -> float:
        assert node.cut is not None
        saved, freed = len(node.tokens) // _TOKEN, node.cut.bytes
        alone = not (node.children or node.tails)
        freed += self._block_bytes * (alone and node.block is not None)
        before = node.parent
        while before is not None and before.parent is not None and before.cut is None:
            saved += GRAIN
            alone = alone and len(before.children) + len(before.tails) == 1
            freed += self._block_bytes * alone
            before = before.parent
        return node.age + node.likely * saved / max(1, freed)

    def _drop(self, node: _Node) -> None:
        assert node.cut is not None
        self.bytes -= node.cut.bytes
        self.cuts -= 1
        node.cut, node.likely = None, 1.0
        self._prune(node)

    def _prune(self, node: _Node) -> None:
        while not node.needed:
            parent = node.parent
            assert parent is not None
            if node.block is None:
                del parent.tails[node.tokens]
            else:
                del parent.children[node.tokens]
                self.bytes -= self._block_bytes
                self._ghosts[node.key] = None
                self._ghosts.move_to_end(node.key)
                if len(self._ghosts) > GHOSTS:
                    self._ghosts.popitem(last=False)
            node = parent

    # ------------------------------------------------------------------ looking after it

    def audit(self, blocks: int = 16) -> None:
        """Check the next few blocks: when idle, call it again and again.

        DSV4Error when a block's bytes changed after it was first looked at: a row was overwritten.
        """
        again = False
        while blocks > 0:
            node = next(self._audit, None)
            if node is None:
                if again:
                    return
                self._audit, again = iter(list(self._nodes())), True
            elif node.block is not None and node.needed:
                blocks -= 1
                now = node.block.checksum()
                node.checksum = now if node.checksum is None else node.checksum
                if node.checksum != now:
                    raise DSV4Error(
                        f"cached rows up to token {node.end} changed",
                        expected=node.checksum, got=now,
                    )  # fmt: skip

    def check(self) -> None:
        """DSV4Error when the books do not balance: bytes, cuts, links, leaves without a use."""
        size = count = 0
        for node in self._nodes():
            size += self._block_bytes * (node.block is not None)
            if node.cut is not None:
                size, count = size + node.cut.bytes, count + 1
                if node.cut.position != node.end:
                    raise DSV4Error("cut", expected=node.end, got=node.cut.position)
            if not node.needed:
                raise DSV4Error("a block that nothing needs", got=node.end)
            if node.block is None and (node.children or node.tails):
                raise DSV4Error("a part of a block with something after it", got=node.end)
        if (size, count) != (self.bytes, self.cuts):
            raise DSV4Error("bytes and cuts", expected=(size, count), got=(self.bytes, self.cuts))

    def _nodes(self) -> Iterator[_Node]:
        stack = [self._root]
        while stack:
            node = stack.pop()
            stack += [*node.children.values(), *node.tails.values()]
            if node is not self._root:
                yield node


def _common(a: bytes, b: bytes) -> int:
    """How many tokens at the beginning are equal."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n // _TOKEN
    return next(i for i in range(n) if a[i] != b[i]) // _TOKEN
