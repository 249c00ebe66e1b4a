"""The simulation beside a real server: calibrate it, replay a trace, compare.

The calibration, half of it before and half after, sends one request at a time and fits what a
prompt, its tokens and a generated token cost; then a few at once, for what each further user adds
to a step. It knows nothing of arrivals: queueing, and prompts in the way of answers, is what the
simulation predicts and the replay tests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from ..errors import ConfigError, DSV4Error
from .fleet import MeasuredCosts, Serving, named, simulate
from .workload import Request, percentiles

LENGTHS = (16, 128, 512, 1024)  # prompt tokens of the calibration
ANSWER = 24
CROWD = 8  # users at once, with answers of ...
CROWD_ANSWER = 96
COSTS = ("prompt", "overhead", "token", "further")  # what is calibrated
WORDS = "time year people way day man thing woman life child world school state family".split()


@dataclass
class Served:
    """One answered request, as its client saw it; times in seconds from the trace's start."""

    request: Request  # with the token counts that the server reports
    sent: float = 0.0
    times: list[float] = field(default_factory=list)  # when tokens of the answer came

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def ask(
    client: httpx.AsyncClient, request: Request, begin: float, seed: str, per_word: float
) -> Served:
    """Send a prompt of about ``request.prompt`` tokens and read the stream to its end.

    The prompt starts with ``seed``, and follows from it. Raises DSV4Error when the server refuses
    or does not report its usage.
    """
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(max(1, round(request.prompt / per_word)))]
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"{seed} {' '.join(words)}"}],
        "max_tokens": request.output,
        "thinking": {"type": "disabled"},
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,  # tells of tokens that are no text yet, too
    }
    served, usage = Served(request, time.perf_counter() - begin), dict[str, Any]()
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode(errors="replace")
            raise DSV4Error("the server refused", expected="status 200", got=text[:300])
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            came = sum(map(_tokens, chunk["choices"]))
            served.times += [time.perf_counter() - begin] * came
    if not usage:
        raise DSV4Error("the server did not say what it did", expected="usage", got="none")
    served.times = served.times or [time.perf_counter() - begin]  # an empty answer ends too
    served.request = Request(
        served.sent, usage["prompt_tokens"], max(1, usage["completion_tokens"])
    )
    return served


def _tokens(choice: dict[str, Any]) -> int:
    """How many tokens a part of a stream brings; one for a text of a server that does not say."""
    told = choice.get("logprobs") or {}
    count = sum(len(told.get(key) or ()) for key in ("content", "reasoning_content"))
    delta = choice["delta"]
    return count or int(bool(delta.get("content") or delta.get("reasoning_content")))


async def alone(
    client: httpx.AsyncClient, begin: float, seed: str, per_word: float
) -> list[Served]:
    """Prompts of LENGTHS, twice, one at a time."""
    lengths = [*LENGTHS, *LENGTHS]
    return [
        await ask(client, Request(0, length, ANSWER), begin, f"{seed}-{i}", per_word)
        for i, length in enumerate(lengths)
    ]


async def together(
    client: httpx.AsyncClient, begin: float, seed: str, per_word: float
) -> list[Served]:
    """CROWD short prompts with long answers, at once."""
    request = Request(0, LENGTHS[0], CROWD_ANSWER)
    seeds = [f"{seed}-crowd-{i}" for i in range(CROWD)]
    return await asyncio.gather(*(ask(client, request, begin, s, per_word) for s in seeds))


def calibrate(served: Sequence[Served], crowds: Sequence[Sequence[Served]]) -> MeasuredCosts:
    """What requests cost, ``served`` alone and in ``crowds``: medians throughout, because machines
    have bad moments.

    A prompt token costs the median slope between any two prompts; its growth with position is
    below the noise at such lengths. A crowd's step is timed while all of it decodes.
    """
    points = [(s.request.prompt, s.ttft) for s in served]
    slopes = [
        (b - a) / (n - m) for (m, a), (n, b) in itertools.combinations(points, 2) if n > 2 * m
        or m > 2 * n
    ]  # fmt: skip
    prompt = max(0.0, statistics.median(slopes))
    overhead = max(0.0, statistics.median(ttft - prompt * n for n, ttft in points))
    gaps = [gap for s in served for gap in s.gaps]
    if not gaps:
        raise DSV4Error("the server answers with single tokens", expected="longer answers")
    token = statistics.median(gaps)
    steps = []  # seconds, users
    for crowd in crowds:
        full, over = max(s.times[0] for s in crowd), min(s.times[-1] for s in crowd)
        came = sum(full < at <= over for s in crowd for at in s.times)
        if over > full and came:
            steps.append(((over - full) * len(crowd) / came, len(crowd)))
    slopes = [(step - token) / (users - 1) for step, users in steps if users > 1]
    further = max(0.0, statistics.median(slopes)) if slopes else 0.0
    return MeasuredCosts(prompt, 0.0, token, 0.0, overhead, further)


class _Replayed(NamedTuple):
    """What was served before a trace, in it and after it."""

    alone_before: list[Served]
    crowd_before: list[Served]
    trace: list[Served]
    alone_after: list[Served]
    crowd_after: list[Served]


async def _replay(url: str, trace: Sequence[Request]) -> _Replayed:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begin, run = time.perf_counter(), f"{time.time_ns():x}"  # nothing is in a cache yet
        first = await ask(client, Request(0, 200, 2), begin, run, 1.0)
        per_word = first.request.prompt / 200
        before = await alone(client, begin, f"{run}-before", per_word)
        crowd_before = await together(client, begin, f"{run}-before", per_word)
        begin = time.perf_counter()

        async def one(number: int, request: Request) -> Served:
            await asyncio.sleep(max(0.0, begin + request.arrival - time.perf_counter()))
            return await ask(client, request, begin, f"{run}-{number}", per_word)

        served = await asyncio.gather(*(one(i, r) for i, r in enumerate(trace)))
        after = await alone(client, begin, f"{run}-after", per_word)
        crowd_after = await together(client, begin, f"{run}-after", per_word)
    return _Replayed(before, crowd_before, served, after, crowd_after)


def measure(url: str, trace: Sequence[Request], serving: Serving) -> dict[str, Any]:
    """Replay ``trace`` on the server at ``url`` in real time, and simulate what it was asked.

    Prompts are random words, each its own: sessions are not replayed. Lengths are those that the
    server reports, so that both sides did the same work. ``drift`` is how much slower a token
    alone was after the trace than before it: unless it is small, the machine had other work and
    the comparison says little. Raises ConfigError when there is no such server and DSV4Error when
    it refuses.
    """
    try:
        done = asyncio.run(_replay(url, trace))
    except httpx.HTTPError as e:
        raise ConfigError(
            f"no answer from {url}", expected="a server", got=repr(e), hint="dsv4 serve"
        ) from e
    served, crowds = done.trace, [done.crowd_before, done.crowd_after]
    costs = calibrate([*done.alone_before, *done.alone_after], crowds)
    before, after = (calibrate(s, ()).token for s in (done.alone_before, done.alone_after))
    requests = sorted(s.request for s in served)
    predicted = simulate(requests, costs, serving)
    tokens = sum(r.output for r in requests)
    found: dict[str, Any] = {
        "ttft": named(percentiles([s.ttft for s in served])),
        "inter_token": named(percentiles([g for s in served for g in s.gaps])),
        "output_tokens_per_second": tokens / max(s.times[-1] for s in served),
    }
    expected = {key: predicted[key] for key in found}
    speed = "output_tokens_per_second"
    error = {
        "ttft_p50": expected["ttft"]["p50"] / found["ttft"]["p50"] - 1,
        speed: expected[speed] / found[speed] - 1,
    }
    return {
        "requests": len(requests),
        "calibration": {key: getattr(costs, key) for key in COSTS},
        "drift": after / before - 1,
        "measured": found,
        "predicted": expected,
        "error": error,
    }
