"""Session: one timeline of tokens. What can be reused is decided inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ContextLengthError, RequestError
from ..model import Numerics, Transformer
from . import memory
from .kvstate import GRAIN, KVState
from .threads import suitable_threads

PREFILL_CHUNK = 512  # tokens in one pass; a multiple of 128, so that snapshots fall on its end
RELEASE_EVERY = 16  # tokens; single tokens, too, scatter their working memory over ever more pages


class Session:
    """A timeline of tokens and the attention state they left; used by one thread at a time.

        s = model.session()
        logits = s.extend(ids)       # [len(ids), vocab]
        s.rewind(100)                # keep the first 100 tokens
        t = s.fork()                 # two timelines from here on
    """

    def __init__(self, net: Transformer, nx: Numerics) -> None:
        self._net, self._nx = net, nx
        memory.reuse()
        self._size = net.config.parameter_counts().active
        self._state = KVState(net.config)
        self._tokens: list[int] = []

    @property
    def tokens(self) -> list[int]:
        """A copy of the tokens so far."""
        return list(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def bytes(self) -> int:
        """Memory of the attention state, in bytes."""
        return self._state.bytes()

    def extend(self, ids: Sequence[int], last: bool = False) -> Tensor:
        """Append tokens; return float32 logits ``[n, vocab]``, or ``[1, vocab]`` with ``last``.

        Raises RequestError for an empty list or an id outside the vocabulary and
        ContextLengthError when the context is full; the session is then unchanged.
        """
        ids = [int(i) for i in ids]
        check_ids(ids, self._net.config.vocab_size)
        limit = self._net.config.max_position_embeddings
        if len(self._tokens) + len(ids) > limit:
            raise ContextLengthError(
                "the context is full", expected=f"at most {limit} tokens",
                got=len(self._tokens) + len(ids), hint="shorten the prompt",
            )
        out = self._feed(ids, last)
        self._tokens += ids
        return out

    @torch.inference_mode()
    def _feed(self, ids: list[int], last: bool, logits: bool = True) -> Tensor:
        state, out, done = self._state, [], 0
        while done < len(ids):
            # passes end on multiples of 128, where a snapshot is small
            n = min(len(ids) - done, PREFILL_CHUNK - state.length % GRAIN)
            chunk = torch.tensor([ids[done : done + n]])
            run = self._net.start(chunk, self._nx, state.length, list(state.layers))
            with suitable_threads(self._size, n):
                streams = self._net.trunk(run)[0]
                state.length += n
                done += n
                state.snapshot()
                if logits and (done == len(ids) or not last):
                    out.append(self._net.logits(streams[-1:] if last else streams, run))
        if len(ids) >= GRAIN or state.length % RELEASE_EVERY == 0:
            memory.release()
        return torch.cat(out) if out else torch.empty(0, self._net.config.vocab_size)

    def rewind(self, n_tokens_to_keep: int) -> None:
        """Forget all but the first ``n`` tokens; at most 127 near the tail are computed again."""
        if not 0 <= n_tokens_to_keep <= len(self._tokens):
            raise RequestError(
                "cannot rewind there", expected=f"0..{len(self._tokens)}", got=n_tokens_to_keep
            )
        if n_tokens_to_keep == len(self._tokens):
            return
        at = self._state.restore(n_tokens_to_keep)
        self._tokens = self._tokens[:n_tokens_to_keep]
        if at < n_tokens_to_keep:
            self._feed(self._tokens[at:], last=True, logits=False)

    def fork(self) -> Session:
        """Another session at the same point; the two do not affect each other."""
        other = Session.__new__(Session)
        other._net, other._nx, other._size = self._net, self._nx, self._size
        other._state, other._tokens = self._state.fork(), list(self._tokens)
        return other


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """RequestError unless ``ids`` is a non-empty list of tokens of this vocabulary."""
    if not ids:
        raise RequestError("no tokens", expected="at least one token id", got="an empty list")
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise RequestError("token id outside the vocabulary", expected=f"0..{vocab_size - 1}",
                           got=bad)
