"""From one row of logits to one token: greedy, temperature, exact top-p, and log-probabilities.

The randomness is counter-based: the number drawn for a token depends on the request's seed and on
the token's position in the timeline, and on nothing else. So an answer does not change with the
requests that happen to run beside it, and a rewound timeline draws the same numbers again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import DSV4Error, RequestError

Array = npt.NDArray[np.float64]
Allowed = npt.NDArray[np.bool_]

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


class Guide(Protocol):
    """Says which tokens may come next in one generation: a grammar, or a limit on reasoning.

    The engine asks ``allowed`` before it chooses a token and then tells ``accept`` which one it
    chose, the stop token included: strictly in turns, in the order of the timeline, in its worker's
    thread. A token that is only guessed at (speculation) is not accepted until it is chosen.
    """

    def allowed(self) -> Allowed | None:
        """True for the ids that may come; ids beyond the array may not. None = all may."""
        ...

    def accept(self, token: int) -> None: ...


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


def sample(
    logits: Tensor, params: SamplingParams, position: int, allowed: Allowed | None = None
) -> int:
    """Choose the token that stands at ``position`` of its timeline from ``logits`` ``[V]``.

    Minus infinity in ``logits`` forbids a token, and so does a ``Guide``'s ``allowed``. Raises
    DSV4Error when nothing is left to choose from, or when a logit is NaN.
    """
    values = _float64(logits)
    if allowed is not None:
        known = min(len(allowed), len(values))
        values[:known][~allowed[:known]] = -np.inf
        values[known:] = -np.inf
    best = int(values.argmax())  # the lowest id on ties; a NaN counts as largest
    if not np.isfinite(values[best]):
        raise DSV4Error(
            "the model gave no usable logits",
            expected="at least one finite value and no NaN",
            got=f"a maximum of {values[best]}",
            hint="check the checkpoint (dsv4 inspect), or load it with numerics='float32'",
        )
    if params.temperature == 0:
        return best
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest token only
        weight = np.exp((values - values[best]) / params.temperature)
    mass = weight.cumsum()
    ids = None
    if params.top_p < 1:
        weight, ids = _likeliest(weight, params.top_p * mass[-1])
        mass = weight.cumsum()
    seed = secrets.randbits(64) if params.seed is None else params.seed
    point = uniform(seed, position) * mass[-1]
    index = int(mass.searchsorted(point, side="right"))
    if index == len(mass):  # the point rounded up to the total: the last possible token
        index = int(mass.searchsorted(mass[-1]))
    return index if ids is None else int(ids[index])


def logprob(logits: Tensor, token: int, top: int) -> Logprob:
    """The log-probability of ``token`` under ``logits`` ``[V]``, and the ``top`` likeliest."""
    values = _float64(logits)
    largest = values.max()
    values = values - (largest + np.log(np.exp(values - largest).sum()))
    values = values.clip(min=UNLIKELY)
    best = np.argsort(-values, kind="stable")[:top].tolist() if top else []
    return Logprob(float(values[token]), tuple((i, float(values[i])) for i in best))


def _float64(logits: Tensor) -> Array:
    """In numpy, which uses one thread: no result depends on the number of threads.

    float64, because a float32 running sum over 129280 tokens can lose the tail.
    """
    return logits.detach().float().numpy().astype(np.float64)


def _likeliest(weight: Array, enough: float) -> tuple[Array, npt.NDArray[np.intp]]:
    """The fewest largest weights that sum to ``enough``, largest first, and their ids.

    Of equal weights the lowest ids come first. Sorting 129280 weights takes tens of
    milliseconds, so only as many as needed are sorted.
    """
    count = 256
    while True:
        count = min(count, len(weight))
        smallest = np.partition(weight, -count)[-count]
        ids = (weight >= smallest).nonzero()[0]  # all that tie with the last one too
        ids = ids[np.argsort(-weight[ids], kind="stable")]
        kept = int(weight[ids].cumsum().searchsorted(enough)) + 1
        if kept <= len(ids) or len(ids) == len(weight):
            return weight[ids[:kept]], ids[:kept]
        count *= 8


def _mix(value: int) -> int:
    """One SplitMix64 step: add the golden ratio, then scramble all 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
