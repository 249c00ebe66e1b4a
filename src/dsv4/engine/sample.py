"""From one row of logits to one token: greedy, temperature, exact top-p, and log-probabilities.

The randomness is counter-based: the number drawn for a token depends on the request's seed and on
the token's position in the timeline, and on nothing else. So an answer does not change with the
requests that happen to run beside it, and a rewound timeline draws the same numbers again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DSV4Error, RequestError

MAX_OUTPUT = 393216  # the hosted service's largest max_tokens (384K)
MAX_LOGPROBS = 20
UNLIKELY = -9999.0  # reported instead of minus infinity, as the hosted service does
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens. Immutable; checked when it is made.

    ``max_tokens``      tokens to generate at most; None = until the context is full
    ``temperature``     0 (greedy, the lowest id on ties) to 2
    ``top_p``           keep the smallest set of tokens whose probability reaches it; in (0, 1]
    ``seed``            any integer; None = fresh randomness
    ``stop_token_ids``  end before these; None = the model's end-of-sentence token, () = none
    ``logprobs``        None, or how many alternatives to report beside each token (0..20)

    Stop strings are text and so belong to the layers above the engine.
    Raises RequestError with the wording of the hosted API.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, valid: str) -> None:
            if not ok:
                raise RequestError(f"Invalid {name} value, the valid range of {name} is {valid}")

        limit, top = self.max_tokens, self.logprobs
        need(limit is None or 1 <= limit <= MAX_OUTPUT, "max_tokens", f"[1, {MAX_OUTPUT}]")
        need(0 <= self.temperature <= 2, "temperature", "[0, 2]")
        need(0 < self.top_p <= 1, "top_p", "(0, 1.0]")
        need(top is None or 0 <= top <= MAX_LOGPROBS, "top_logprobs", f"[0, {MAX_LOGPROBS}]")
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


class Logprob(NamedTuple):
    """A token's natural log-probability before temperature and top-p, and the likeliest ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to ``(seed, position)``: 53 bits of two SplitMix64 rounds.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    state = _mix(seed & _MASK) ^ (position & _MASK)
    return (_mix(state) >> 11) * 2.0**-53


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """Choose the token that stands at ``position`` of its timeline from ``logits`` ``[V]``.

    Minus infinity in ``logits`` forbids a token. Raises DSV4Error when nothing is left to choose
    from, or when a logit is NaN.
    """
    best = _argmax(logits)
    if params.temperature == 0:
        return best
    # float64, because a float32 running sum over 129280 tokens can lose the tail
    scaled = (logits.double() - logits[best].double()) / params.temperature
    weight = scaled.exp()
    order = None
    if params.top_p < 1:
        weight, order = weight.sort(descending=True, stable=True)
    mass = weight.cumsum(0)  # sequential, so the rounding does not depend on the thread count
    if order is not None:
        # the first index whose mass reaches top_p is the last one kept
        kept = int(torch.searchsorted(mass, params.top_p * mass[-1])) + 1
        mass = mass[: min(kept, len(mass))]
    seed = secrets.randbits(64) if params.seed is None else params.seed
    point = uniform(seed, position) * mass[-1]
    index = int(torch.searchsorted(mass, point, right=True))
    if index >= len(mass):  # the point rounded up to the total; take the last possible token
        index = int(torch.searchsorted(mass, mass[-1]))
    return index if order is None else int(order[index])


def logprob(logits: Tensor, token: int, top: int) -> Logprob:
    """The log-probability of ``token`` under ``logits`` ``[V]``, and the ``top`` likeliest."""
    values = logits.double().log_softmax(0).clamp_min(UNLIKELY)
    best = values.topk(min(top, len(values)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Logprob(float(values[token]), tuple(pairs))


def _argmax(logits: Tensor) -> int:
    """The lowest id among the largest logits (torch's argmax promises no order on ties)."""
    largest = logits.max()
    if not torch.isfinite(largest):  # max carries a NaN through
        raise DSV4Error(
            "the model gave no usable logits",
            expected="at least one finite value and no NaN",
            got=f"a maximum of {float(largest)}",
            hint="check the checkpoint (dsv4 inspect), or load it with numerics='float32'",
        )
    return int((logits == largest).nonzero()[0])


def _mix(value: int) -> int:
    """One SplitMix64 step: add the golden ratio, then scramble all 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
