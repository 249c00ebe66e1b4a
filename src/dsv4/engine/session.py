"""Passes over timelines, and Session: one timeline of tokens. What can be reused is decided inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ContextLengthError, RequestError
from ..kernels.threads import pass_of
from ..model import Transformer
from ..numerics import Numerics
from ..protocols import Continued
from . import memory
from .disk import DiskTier
from .kvstate import GRAIN, Block, Cut, KVState, Layout
from .speculate import Trail

PREFILL_CHUNK = 512  # tokens in one pass
READING_CHUNK = 2048  # where each pass reads experts from disk
DENSE_BYTES, DENSE_LEAST = 128 << 20, 16  # of the newest cuts, all of which are kept


class Part(NamedTuple):
    """A timeline's share of a pass: its new tokens, and of how many of the last logits are wanted
    (None: of all). ``trail``: takes note of the pass, for guesses."""

    state: KVState
    ids: Sequence[int]
    wanted: int | None
    trail: Trail | None = None


class Runner:
    """A network with its numerics, as timelines run on it.

    ``block_bytes``: of the rows of 128 tokens; ``overhead_bytes``: what a timeline takes beside its
    blocks at most.
    """

    def __init__(self, net: Transformer, nx: Numerics) -> None:
        memory.reuse()
        self.config = net.config
        self.chunk = PREFILL_CHUNK if net.reading is None else READING_CHUNK
        self.layout = layout = Layout(net.config, nx)
        self.block_bytes = layout.bytes
        self.overhead_bytes = layout.most_beside_rows()
        self._net, self._nx = net, nx
        counts = net.config.parameter_counts()
        self._size, self._draft_size = counts.active, counts.mtp  # the block's: at most

    def trail(self) -> Trail | None:
        """What guessing for one timeline needs; None for a network without an MTP block."""
        return Trail(self.config.sliding_window) if self.config.mtp_layers else None

    def resume(self, blocks: Sequence[Block], cut: Cut | None) -> KVState:
        """A timeline that goes on from ``cut`` (None: an empty one); see ``KVState.resume``."""
        return KVState.resume(self.layout, blocks, cut)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> list[Tensor]:
        """One pass; the wanted logits of each part, float32 ``[n, vocab]``.

        Every timeline is at least one token longer then, and can be cut at its new positions until
        it is told to ``settle``. A part's logits do not depend on the other parts: bit for bit
        with the native kernels, to rounding with torch's.
        """
        for part in parts:
            part.state.reserve(len(part.ids))
        run = self._net.resume(
            self._nx, [Continued(p.ids, p.state.length, p.state.layers) for p in parts]
        )
        with pass_of(run.ids.shape[1], self._size):
            streams, at, some = self._net.trunk(run)[0], 0, []
            for part in parts:
                part.state.advance(len(part.ids))
                n, end = len(part.ids), at + len(part.ids)
                if part.trail is not None:
                    part.trail.add(streams[at:end])
                some.append(streams[end - (n if part.wanted is None else part.wanted) : end])
                at = end
            counts = [len(s) for s in some]
            wanted = torch.cat(some) if len(some) > 1 else some[0]
            logits = torch.empty(0, self.config.vocab_size)
            if len(wanted):
                logits = self._net.logits(wanted, run)
        return list(logits.split(counts))

    @torch.inference_mode()
    def guess(self, timelines: Sequence[Continued], trails: Sequence[Trail]) -> Tensor:
        """The MTP block's logits ``[n, vocab]`` of the token after the last of each timeline.

        Of a timeline: the tokens after those that its trail has not seen, the position of the
        first of these, and its trail.
        """
        run = self._net.resume(self._nx, timelines)
        streams = torch.cat([trail.take() for trail in trails]).unsqueeze(0)
        with pass_of(run.ids.shape[1], self._draft_size):
            streams = self._net.mtp_ahead(streams, run)[0]
            if len(timelines) > 1:
                streams = streams[torch.tensor([len(t.ids) for t in timelines]).cumsum(0) - 1]
            return self._net.mtp_logits(streams[-len(timelines) :], run)


class Session:
    """A timeline of tokens and the attention state they left; used by one thread at a time.

        s = model.session()
        logits = s.extend(ids)       # [len(ids), vocab]
        s.rewind(100)                # keep the first 100 tokens
        t = s.fork()                 # two timelines from here on
    """

    def __init__(self, net: Transformer, nx: Numerics) -> None:
        self._runner = Runner(net, nx)
        self._state = KVState(self._runner.layout)
        self._tokens: list[int] = []
        self._cuts: dict[int, Cut] = {}  # at multiples of 128

    @property
    def tokens(self) -> list[int]:
        """A copy of the tokens so far."""
        return list(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def bytes(self) -> int:
        """Memory of the attention state, in bytes: what it is now, and what makes rewinding cheap.
        Blocks that forks share count for each."""
        return self._state.bytes() + sum(cut.bytes for cut in self._cuts.values())

    def extend(self, ids: Sequence[int], last: bool = False) -> Tensor:
        """Append tokens; return float32 logits ``[n, vocab]``, or ``[1, vocab]`` with ``last``.

        Raises RequestError for an empty list or an id outside the vocabulary and
        ContextLengthError when the context is full; the session is then unchanged.
        """
        ids = [int(i) for i in ids]
        check_ids(ids, self._runner.config.vocab_size)
        limit = self._runner.config.max_position_embeddings
        if len(self._tokens) + len(ids) > limit:
            raise ContextLengthError(
                "the context is full", expected=f"at most {limit} tokens",
                got=len(self._tokens) + len(ids), hint="shorten the prompt",
            )
        out = self._feed(ids, 1 if last else None)
        self._tokens += ids
        return out

    @torch.inference_mode()
    def _feed(self, ids: list[int], wanted: int | None) -> Tensor:
        """Logits of the last ``wanted`` (0 or 1) tokens, or of all."""
        state, out, done = self._state, [], 0
        while done < len(ids):
            n = min(len(ids) - done, self._runner.chunk - state.length % GRAIN)
            now = wanted if wanted is None or done + n == len(ids) else 0
            out += self._runner.run([Part(state, ids[done : done + n], now)])
            done += n
            first = ((state.length - n) // GRAIN + 1) * GRAIN
            for at in range(first, state.length + 1, GRAIN):
                self._cuts[at] = state.cut(at)
            state.settle()
            if first <= state.length:
                self._thin(self._cuts[first].bytes)
            memory.after(n)
        return torch.cat(out) if len(out) > 1 else out[0]

    def _thin(self, size: int) -> None:
        """Keep as many of the newest cuts of ``size`` bytes as fit into DENSE_BYTES, then ever
        fewer: every 2nd, every 4th of twice as many, ..."""
        dense = max(DENSE_LEAST, DENSE_BYTES // size)
        for at in list(self._cuts):
            age = (self._state.length - at) // GRAIN
            stride = 1 << (age // dense).bit_length()
            if at // GRAIN % stride:
                del self._cuts[at]

    def rewind(self, n_tokens_to_keep: int) -> None:
        """Forget all but the first ``n`` tokens. At most 127 are computed again, or further back
        than DENSE_BYTES of cuts (which for v4-nano are 37,000 tokens) twice, 4 times, ... that."""
        if not 0 <= n_tokens_to_keep <= len(self._tokens):
            raise RequestError(
                "cannot rewind there", expected=f"0..{len(self._tokens)}", got=n_tokens_to_keep
            )
        if n_tokens_to_keep == len(self._tokens):
            return
        at = max((p for p in self._cuts if p <= n_tokens_to_keep), default=0)
        self._cuts = {p: cut for p, cut in self._cuts.items() if p <= at}
        self._state = KVState.resume(self._runner.layout, self._state.blocks, self._cuts.get(at))
        self._tokens = self._tokens[:n_tokens_to_keep]
        if at < n_tokens_to_keep:
            self._feed(self._tokens[at:], 0)

    def save(self, disk: DiskTier) -> None:
        """Write all of this timeline to ``disk``, when there is time (``disk.flush``)."""
        self._state.settle()
        disk.save(self._tokens, self._state.blocks, [self._state.cut(len(self._tokens))])

    def restore(self, disk: DiskTier, tokens: Sequence[int]) -> int:
        """Become the longest beginning of ``tokens`` that is on ``disk`` and longer than this
        session, whatever it held; how long this session is then. Something of ``tokens`` is left.
        """
        found = disk.find(tokens, len(self._tokens), ())
        if found is not None:
            at = found.cut.position
            self._state = KVState.resume(self._runner.layout, found.blocks, found.cut)
            self._tokens, self._cuts = list(tokens[:at]), {}
        return len(self._tokens)

    def fork(self) -> Session:
        """Another session at the same point; the two do not affect each other. Nothing is copied
        until one of them goes on, and then one block of 128 tokens."""
        other = Session.__new__(Session)
        other._runner, other._state = self._runner, self._state.fork()
        other._tokens = list(self._tokens)
        other._cuts = dict(self._cuts)
        return other


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """RequestError unless ``ids`` is a non-empty list of tokens of this vocabulary."""
    if not ids:
        raise RequestError("no tokens", expected="at least one token id", got="an empty list")
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise RequestError("token id outside the vocabulary", expected=f"0..{vocab_size - 1}",
                           got=bad)
